"""The yardstick of numerical noise: what float64 says, what float32 may say, and what would be seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from odtrt_lib.export import noise

tf = pytest.importorskip("tensorflow")

SIDE, ANCHORS = 16, 64
HEADS = ("box_encodings", "class_logits")


def network(gain: float = 1.0, depth: int = 2, resize=None, seed: int = 0):
    """A frozen graph of raw heads: convolutions with a batch norm, or, for a large gain, chaos."""
    v1, random = tf.compat.v1, np.random.default_rng(seed)

    def kernel(*shape):
        return tf.constant(random.normal(0, shape[2] ** -0.5 / 3, shape).astype(np.float32))

    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, [None, SIDE, SIDE, 3], name="image")
        x = tf.nn.conv2d(x, kernel(3, 3, 3, 8), 2, "SAME")
        ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
        x = v1.nn.fused_batch_norm(
            x, ones * 0.7, zeros + 0.1, zeros + 0.2, ones * 0.3, epsilon=1e-3, is_training=False
        )[0]
        if resize is not None:
            x = resize(x)
        for _ in range(depth):
            x = tf.sin(gain * tf.nn.conv2d(x, kernel(3, 3, 8, 8), 1, "SAME"))
        x = x * tf.sigmoid(tf.reduce_mean(x, [1, 2], keepdims=True))
        for name, columns in zip(HEADS, (4, 5), strict=True):
            flat = tf.nn.conv2d(x, kernel(1, 1, 8, columns), 1, "SAME")
            tf.identity(tf.reshape(flat, [tf.shape(flat)[0], -1, columns]), name=name)
        return graph.as_graph_def()


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(3).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def calm(pictures):
    return noise.measure(network(), pictures, None)


def constants(graph_def):
    return {
        node.name: tf.make_ndarray(node.attr["value"].tensor)
        for node in graph_def.node
        if node.op == "Const" and node.attr["value"].tensor.dtype == tf.float32.as_datatype_enum
    }


def test_float64_is_numpys_float64(pictures):
    """The oracle is numpy: one convolution with a 1x1 kernel is a matrix product."""
    with tf.Graph().as_default() as graph:
        image = tf.compat.v1.placeholder(tf.float32, [None, SIDE, SIDE, 3], name="image")
        kernels = {
            name: np.random.default_rng(i).normal(0, 1, (1, 1, 3, columns)).astype(np.float32)
            for i, (name, columns) in enumerate(zip(HEADS, (4, 5), strict=True))
        }
        for name, kernel in kernels.items():
            flat = tf.nn.sigmoid(tf.nn.conv2d(image, kernel, 1, "SAME"))
            mean = tf.reduce_mean(flat, [1, 2], keepdims=True)
            tf.reshape(flat - mean, [-1, SIDE * SIDE, kernel.shape[-1]], name=name)
    found = noise.measure(graph.as_graph_def(), pictures, None)
    for name, kernel in kernels.items():
        product = pictures.reshape(2, -1, 3).astype(np.float64) @ kernel[0, 0].astype(np.float64)
        truth = 1 / (1 + np.exp(-product))
        truth -= truth.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(found.exact[name], truth, rtol=0, atol=1e-14)
        assert found.rounded[name].dtype == np.float32
        assert 1e-9 < np.abs(found.rounded[name] - truth).max() < 1e-6


@pytest.mark.parametrize(
    "resize",
    [
        None,
        lambda x: tf.raw_ops.ResizeBilinear(images=x, size=[8, 8], half_pixel_centers=True),
        lambda x: tf.image.resize(x, [8, 8], antialias=True),
        lambda x: tf.raw_ops.FakeQuantWithMinMaxArgs(inputs=x, min=-9, max=9, num_bits=16),
    ],
    ids=["none", "result is float32", "arguments are float32", "no float64"],
)
def test_the_wide_graph_is_the_same_network_whatever_its_operations(pictures, resize):
    frozen = network(resize=resize)
    found = noise.measure(frozen, pictures, None)
    for name in HEADS:
        assert found.exact[name].dtype == np.float64
        np.testing.assert_allclose(found.rounded[name], found.exact[name], rtol=0, atol=2e-3)
    if resize is None:
        wide = noise.in_float64(frozen)
        kinds = {tf.as_dtype(node.attr["T"].type) for node in wide.node if node.attr["T"].type}
        assert tf.float32 not in kinds
        for name, value in constants(frozen).items():
            node = next(node for node in wide.node if node.name == name)
            assert np.array_equal(tf.make_ndarray(node.attr["value"].tensor), value.astype(np.float64))


def test_tensorflow_itself_is_noise_and_a_thousandth_of_a_kernel_is_not(calm, pictures):
    own = noise.compare(calm, calm.rounded)
    assert all(distance.is_noise and distance.times_noise <= 1 for distance in own.values())
    assert calm.is_decisive and calm.sees_kernel_change < 1e-4
    broken = network()
    node = next(node for node in broken.node if node.op == "Const" and "Const_3" in node.name)
    values = tf.make_ndarray(node.attr["value"].tensor)
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values * np.float32(1.001)))
    other = noise.measure(broken, pictures, None)
    worst = max(distance.times_noise for distance in noise.compare(calm, other.rounded).values())
    assert worst > 20 * noise.FACTOR


def test_an_error_of_one_anchor_in_a_small_level_does_not_drown(calm):
    for anchor in (0, ANCHORS - 1):
        candidate = {name: calm.rounded[name].copy() for name in HEADS}
        candidate["class_logits"][1, anchor, 2] += np.float32(1e-4)
        found = noise.compare(calm, candidate)
        assert found["box_encodings"].is_noise
        assert not found["class_logits"].is_noise
        assert found["class_logits"].image == 1
        first, last = found["class_logits"].anchors
        assert first <= anchor < last


def test_what_is_not_finite_is_no_noise(calm):
    candidate = {name: calm.rounded[name].copy() for name in HEADS}
    candidate["box_encodings"][0, 5, 1] = np.nan
    found = noise.compare(calm, candidate)
    assert not found["box_encodings"].is_noise
    assert found["class_logits"].is_noise


def test_chaos_is_called_not_decisive(pictures):
    chaotic = noise.measure(network(gain=40, depth=8), pictures, None)
    assert all(distance.is_noise for distance in noise.compare(chaotic, chaotic.rounded).values())
    assert not chaotic.is_decisive
    assert chaotic.sees_kernel_change == 1


def test_the_groups_cover_every_anchor_once():
    for anchors in (1, 7, 32, 64, 1917, 49104):
        groups = noise.groups_of(anchors)
        assert [first for first, _ in groups] == [0, *(last for _, last in groups[:-1])]
        assert groups[-1][1] == anchors
        assert all(last > first for first, last in groups)
    assert noise.groups_of(49104)[0] == (0, 36828), "level 3 of EfficientDet-D0"


def test_a_fixed_batch_is_filled_and_cut(pictures):
    frozen = network()
    together = noise.measure(frozen, pictures, None)
    padded = noise.measure(frozen, pictures[:1], 3)
    for name in HEADS:
        assert padded.exact[name].shape[0] == 1
        np.testing.assert_allclose(padded.exact[name], together.exact[name][:1], atol=1e-12)


def test_what_is_seen_is_told_of_kernels_over_feature_maps():
    """A kernel behind a mean and a sigmoid that is saturated moves nothing, and that is no want of sight."""
    with tf.Graph().as_default() as graph:
        image = tf.compat.v1.placeholder(tf.float32, [None, SIDE, SIDE, 3], name="image")
        kernel = np.random.default_rng(0).normal(0, 1, (1, 1, 3, 3)).astype(np.float32)
        x = tf.nn.conv2d(image, tf.constant(kernel, name="seen"), 1, "SAME")
        mean = tf.reshape(tf.reduce_mean(x, [1, 2]), [-1, 1, 1, 3])
        gate = tf.sigmoid(40 + tf.nn.conv2d(mean, tf.constant(kernel, name="saturated"), 1, "SAME"))
        for name in HEADS:
            tf.reshape(x * gate, [-1, SIDE * SIDE, 3], name=name)
    frozen = graph.as_graph_def()
    with noise._Session(frozen) as session:
        assert session.kernels() == ["seen:0"]
    assert noise.measure(frozen, np.ones((1, SIDE, SIDE, 3), np.float32), None).is_decisive


def test_no_kernel_no_sight(pictures):
    with tf.Graph().as_default() as graph:
        image = tf.compat.v1.placeholder(tf.float32, [None, SIDE, SIDE, 3], name="image")
        tf.reshape(image[..., :1] * [1.0, 2.0, 3.0, 4.0], [-1, SIDE * SIDE, 4], name="box_encodings")
        tf.reshape(image, [-1, SIDE * SIDE, 3], name="class_logits")
    found = noise.measure(graph.as_graph_def(), pictures, None)
    assert not found.is_decisive
    assert dataclasses.asdict(found)["sees_kernel_change"] == 1
