"""preprocess.py against the OD API's own resizers and normalisation, run by TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import struct
import subprocess
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odtrt_lib import native
from odtrt_lib import preprocess as preprocessing
from odtrt_lib.errors import InputError
from odtrt_lib.preprocess import (
    Frame,
    boxes_to_pixels,
    check_image,
    half_pixel_shift,
    load_image,
    network_size,
    preprocess,
)
from odtrt_lib.spec import InputSpec, NmsSpec, Resizer, load_spec

TOLERANCE = 1e-4  # of the value range
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """One feature extractor's ``preprocess``, and what it is as scale and offset."""

    module: str
    extractor: str
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]


MOBILENET = Normalisation(
    "ssd_mobilenet_v2_fpn_keras_feature_extractor",
    "SSDMobileNetV2FpnKerasFeatureExtractor",
    (2 / 255,) * 3,
    (-1.0,) * 3,
)
RESNET = Normalisation(
    "ssd_resnet_v1_fpn_keras_feature_extractor",
    "SSDResNet50V1FpnKerasFeatureExtractor",
    (1.0,) * 3,
    (-123.68, -116.779, -103.939),
)
EFFICIENTNET = Normalisation(
    "ssd_efficientnet_bifpn_feature_extractor",
    "SSDEfficientNetB0BiFPNKerasFeatureExtractor",
    (1 / 255 / 0.229, 1 / 255 / 0.224, 1 / 255 / 0.225),
    (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225),
)

FIXED = Resizer("fixed_shape")
PADDED = Resizer("keep_aspect_ratio", 512, 512, True)
GREY_PADDED = Resizer("keep_aspect_ratio", 320, 448, True, (0.25, -0.5, 0.125))
UNPADDED = Resizer("keep_aspect_ratio", 240, 400)
RESIZERS = {
    "fixed 300x300": (FIXED, (300, 300), MOBILENET),
    "fixed 96x128": (FIXED, (96, 128), RESNET),
    "fixed 640x640": (FIXED, (640, 640), RESNET),
    "padded 512": (PADDED, (512, 512), EFFICIENTNET),
    "padded 320..448, own pad value": (GREY_PADDED, (448, 448), MOBILENET),
    "unpadded 240..400": (UNPADDED, None, EFFICIENTNET),
}
SIZES = ((1, 1), (1, 37), (37, 1), (37, 53), (96, 128), (300, 300), (720, 405), (405, 720), (1080, 1920))


def input_spec(name: str, height: int, width: int) -> InputSpec:
    """The InputSpec of one of RESIZERS; without padding its size is the one that this image needs."""
    resizer, size, normalisation = RESIZERS[name]
    spec = InputSpec(*(size or (0, 0)), resizer, normalisation.scale, normalisation.offset)
    if size is None:
        size = network_size(spec, height, width)
    return dataclasses.replace(spec, height=size[0], width=size[1])


@functools.lru_cache(maxsize=1)
def odapi_modules() -> Any:
    from odtrt_lib.export import odapi

    odapi.prepare()
    import tensorflow as tf
    from google.protobuf import text_format
    from object_detection.builders import image_resizer_builder
    from object_detection.protos import image_resizer_pb2

    return tf, text_format, image_resizer_builder, image_resizer_pb2


@functools.lru_cache(maxsize=32)
def odapi_resizer(resizer: Resizer, height: int, width: int) -> Any:
    _, text_format, builder, protos = odapi_modules()
    if resizer.kind == "fixed_shape":
        text = f"fixed_shape_resizer {{ height: {height} width: {width} }}"
    else:
        pad = "".join(f" per_channel_pad_value: {value}" for value in resizer.pad_value)
        text = (
            f"keep_aspect_ratio_resizer {{ min_dimension: {resizer.min_dimension} "
            f"max_dimension: {resizer.max_dimension} "
            f"pad_to_max_dimension: {str(resizer.pad_to_max_dimension).lower()}{pad} }}"
        )
    return builder.build(text_format.Parse(text, protos.ImageResizer()))


def odapi_preprocess(name: str, image: np.ndarray, spec: InputSpec) -> tuple[np.ndarray, tuple[int, int]]:
    """What ``SSDMetaArch.preprocess`` does: the extractor's normalisation, then the image resizer."""
    import importlib

    tf, *_ = odapi_modules()
    normalisation = RESIZERS[name][2]
    module = importlib.import_module(f"object_detection.models.{normalisation.module}")
    extractor = getattr(module, normalisation.extractor)
    normalised = extractor.preprocess(None, tf.constant(image[None], tf.float32))[0]
    resized, shape = odapi_resizer(spec.resizer, spec.height, spec.width)(normalised)
    return resized.numpy(), tuple(np.array(shape)[:2].tolist())


def pictures(height: int, width: int) -> dict[str, np.ndarray]:
    rows, columns = np.mgrid[:height, :width]
    stripes = ((rows + columns) % 2 * 255)[..., None] * np.array([1, 0, 1]) + np.array([0, 255, 0])
    noise = np.random.default_rng(height * 10007 + width).integers(0, 256, (height, width, 3))
    return {"noise": noise.astype(np.uint8), "checkerboard": stripes.astype(np.uint8)}


def error_in_value_range(found: np.ndarray, expected: np.ndarray, spec: InputSpec) -> float:
    """Largest difference of [3, H, W] ``found`` and [H, W, 3] ``expected``, in units of ``255 * scale``."""
    difference = np.abs(found.astype(np.float64) - expected.transpose(2, 0, 1))
    return float((difference / (255 * np.reshape(spec.scale, (3, 1, 1)))).max())


WAYS = ("native", "with OpenCV", "numpy alone")


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``preprocess`` go one of WAYS."""
    if way != "native":
        monkeypatch.setattr(native, "load", lambda: None)
    if way == "numpy alone":
        monkeypatch.setattr(preprocessing, "_opencv_strays", lambda *_: None)


@pytest.fixture(params=WAYS)
def path(request, monkeypatch) -> str:
    """Runs a test on all ways through the code."""
    if request.param == "native":
        request.getfixturevalue("native_library")
    elif request.param == "with OpenCV":
        pytest.importorskip("cv2")
    take(request.param, monkeypatch)
    return request.param


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize("name", RESIZERS)
def test_equals_the_od_api(name, size, monkeypatch, native_library):
    spec = input_spec(name, *size)
    for kind, image in pictures(*size).items():
        expected, true_size = odapi_preprocess(name, image, spec)
        results = {}
        for way in WAYS:
            with monkeypatch.context() as patch:
                take(way, patch)
                results[way] = preprocess(image, spec)
        for way, (found, frame) in results.items():
            error = error_in_value_range(found, expected, spec)
            assert error <= TOLERANCE, f"{kind}, {way}: {error}"
            assert found.flags.c_contiguous and found.dtype == np.float32
            assert (frame.true_height, frame.true_width) == true_size
            assert (frame.image_height, frame.image_width) == size


@pytest.mark.parametrize("size", [(2160, 3840), (8, 7680), (1279, 719), (1000, 8), (299, 301), (90, 540)])
def test_equals_tensorflow_on_awkward_sizes(size, path):
    """Large prime ratios, enlargements, and axes so long that float32 positions are not exact."""
    tf, *_ = odapi_modules()
    spec = InputSpec(300, 300, FIXED, (1.0,) * 3, (0.0,) * 3)
    for image in pictures(*size).values():
        expected = tf.compat.v1.image.resize_bilinear(image[None], (300, 300)).numpy()[0]
        assert error_in_value_range(preprocess(image, spec)[0], expected, spec) <= TOLERANCE


def test_opencv_is_used_where_it_is_installed():
    """Also where it rounds some positions to another column than TensorFlow, as in 540 -> 300."""
    pytest.importorskip("cv2")
    assert preprocessing._opencv_strays(1280, 300) is not None
    assert preprocessing._opencv_strays(540, 300) is not None
    assert preprocessing._byte_weights(1920, 512) is not None
    assert preprocessing._byte_weights(1280, 300) is None


def test_network_size_rounds_as_tensorflow_does():
    """Sizes where exact arithmetic, or rounding half up, would come to another answer."""
    tf, *_ = odapi_modules()
    resizer = Resizer("keep_aspect_ratio", 320, 448)
    spec = InputSpec(448, 448, resizer, (1.0,) * 3, (0.0,) * 3)
    resize = odapi_resizer(resizer, 0, 0)
    sizes = [(h, w) for h in range(8, 640, 3) for w in range(8, 640, 5)]

    def by_exact_scale(height, width, rounding):
        largest = (320, 448) if height < width else (448, 320)
        scale = min(largest[0] / height, largest[1] / width)
        return rounding(scale * height), rounding(scale * width)

    half_up = [s for s in sizes if network_size(spec, *s) != by_exact_scale(*s, lambda x: int(x + 0.5))]
    exact = [s for s in sizes if network_size(spec, *s) != by_exact_scale(*s, round)]
    assert half_up, "no size tells half to even from half up"
    for height, width in half_up[:20] + exact[:20] + sizes[:: len(sizes) // 40]:
        _, shape = resize(tf.zeros([height, width, 3]))
        assert network_size(spec, height, width) == tuple(np.array(shape)[:2].tolist()), (height, width)


def test_whole_model_preprocess(tiny_model, tiny_folder):
    """``model.preprocess`` of the OD API's own model, with the spec.json that stage 1 wrote."""
    from odtrt_lib.export import odapi
    from odtrt_lib.export.pipeline import read_pipeline

    tf, *_ = odapi_modules()
    settings = read_pipeline(tiny_model / "pipeline.config")
    model = odapi.build_model(settings.path, settings.message)  # without weights: it only preprocesses
    spec = load_spec(tiny_folder / "spec.json").input
    image = pictures(123, 217)["noise"]
    expected, shapes = model.preprocess(tf.constant(image[None], tf.float32))
    found, frame = preprocess(image, spec)
    assert error_in_value_range(found, expected.numpy()[0], spec) <= TOLERANCE
    window = model._compute_clip_window(expected, shapes).numpy()[0]
    np.testing.assert_allclose(frame.clip_window, window, rtol=1e-6)


def test_clip_window_of_a_padded_image():
    _, frame = preprocess(pictures(405, 720)["noise"], input_spec("padded 512", 405, 720))
    assert frame == Frame(405, 720, 288, 512, 512, 512)
    assert frame.clip_window == (0.0, 0.0, 0.5625, 1.0)


def gaussian_spot(height: int, width: int, centre: tuple[float, float], sigma: float = 25) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    distance = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2
    spot = np.rint(255 * np.exp(-distance / (2 * sigma**2)))
    return np.repeat(spot[..., None], 3, axis=2).astype(np.uint8)


def centre_of_mass(plane: np.ndarray) -> np.ndarray:
    rows, columns = np.mgrid[: plane.shape[0], : plane.shape[1]]
    return np.array([(plane * rows).sum(), (plane * columns).sum()], np.float64) / plane.sum()


@pytest.mark.parametrize("source, target", [((720, 1280), (300, 300)), ((480, 640), (320, 320))])
def test_half_pixel_resizing_moves_every_box_by_the_stated_shift(source, target):
    """A known spot, through both rules and back: cv2.resize moves it, odtrt's rule does not."""
    cv2 = pytest.importorskip("cv2")
    spec = InputSpec(*target, FIXED, (1.0,) * 3, (0.0,) * 3)
    truth = np.array([source[0] * 0.4, source[1] * 0.6])
    image = gaussian_spot(*source, tuple(truth))
    found, frame = preprocess(image, spec)
    half_pixel = cv2.resize(image.astype(np.float32), target[::-1])

    def in_image_pixels(plane):
        point = centre_of_mass(plane) / target
        box = boxes_to_pixels([[*point, *point]], frame, nms_spec(True))[0]
        return box[:2]

    shift = np.array([half_pixel_shift(s, t) for s, t in zip(source, target, strict=True)])
    np.testing.assert_allclose(in_image_pixels(found[0]) - truth, 0, atol=0.02)
    np.testing.assert_allclose(in_image_pixels(half_pixel[..., 0]) - truth, -shift, atol=0.02)
    assert shift.max() >= 0.5


def test_half_pixel_shift_in_figures():
    assert half_pixel_shift(720, 300) == pytest.approx(0.7)
    assert half_pixel_shift(1280, 300) == pytest.approx(1.6333333)
    assert half_pixel_shift(640, 640) == 0
    assert half_pixel_shift(320, 640) == -0.25


def wrong_variants(image: np.ndarray, spec: InputSpec) -> dict[str, np.ndarray]:
    """Mistakes that people make when they write this by hand, as [3, H, W]."""
    cv2 = pytest.importorskip("cv2")
    scale, offset = np.float32(spec.scale), np.float32(spec.offset)
    right, frame = preprocess(image, spec)
    size = (frame.true_width, frame.true_height)

    def padded(resized: np.ndarray, value: Any = (0.0, 0.0, 0.0)) -> np.ndarray:
        planes = np.empty_like(right)
        planes[:] = np.reshape(np.float32(value), (3, 1, 1))
        planes[:, : frame.true_height, : frame.true_width] = resized.transpose(2, 0, 1)
        return planes

    exact, _ = preprocess(image, dataclasses.replace(spec, scale=(1.0,) * 3, offset=(0.0,) * 3))
    grey_levels = np.rint(exact[:, : frame.true_height, : frame.true_width]).transpose(1, 2, 0)
    return {
        "half-pixel centres": padded(cv2.resize(image.astype(np.float32), size) * scale + offset),
        "rounded to grey levels": padded(grey_levels * scale + offset),
        "BGR": preprocess(np.ascontiguousarray(image[..., ::-1]), spec)[0],
        "padded before normalising": padded(
            right[:, : frame.true_height, : frame.true_width].transpose(1, 2, 0), offset
        ),
        "stretched": (cv2.resize(image.astype(np.float32), (512, 512)) * scale + offset).transpose(2, 0, 1),
    }


def test_wrong_rules_are_caught():
    image = pictures(405, 720)["noise"]
    spec = input_spec("padded 512", 405, 720)
    expected, _ = odapi_preprocess("padded 512", image, spec)
    for mistake, wrong in wrong_variants(image, spec).items():
        assert error_in_value_range(wrong, expected, spec) > 10 * TOLERANCE, mistake


def test_exact_positions_are_caught_on_long_axes(path):
    """TensorFlow's float32 positions matter: exact arithmetic differs by more than the tolerance."""
    tf, *_ = odapi_modules()
    image = pictures(4, 7680)["checkerboard"]
    expected = tf.compat.v1.image.resize_bilinear(image[None], (4, 1300)).numpy()[0]
    position = np.arange(1300) * (7680 / 1300)
    lower = np.floor(position).astype(int)
    weight = (position - lower)[None, :, None]
    exact = image[:, lower] * (1 - weight) + image[:, np.minimum(lower + 1, 7679)] * weight
    assert np.abs(exact - expected).max() / 255 > TOLERANCE
    spec = InputSpec(4, 1300, FIXED, (1.0,) * 3, (0.0,) * 3)
    assert error_in_value_range(preprocess(image, spec)[0], expected, spec) <= TOLERANCE


def test_opencv_that_picks_other_columns_is_not_used(monkeypatch):
    """A nearest-neighbour rule with half-pixel centres would blend the wrong pixels: numpy takes over."""
    cv2 = pytest.importorskip("cv2")
    true_resize = cv2.resize

    def half_pixel_nearest(source, size, dst=None, interpolation=cv2.INTER_LINEAR):
        if interpolation != cv2.INTER_NEAREST:
            return true_resize(source, size, interpolation=interpolation)
        width = source.shape[1]
        columns = np.floor((np.arange(size[0]) + 0.5) * (width / size[0])).astype(int)
        return np.ascontiguousarray(source[:, np.minimum(columns, width - 1)])

    take("with OpenCV", monkeypatch)
    monkeypatch.setattr(cv2, "resize", half_pixel_nearest)
    preprocessing._opencv_strays.cache_clear()
    try:
        assert preprocessing._opencv_strays(1280, 300) is None
        test_equals_tensorflow_on_awkward_sizes((1279, 719), "with OpenCV")
    finally:
        preprocessing._opencv_strays.cache_clear()


def test_writes_into_a_batch(path):
    spec = input_spec("padded 512", 37, 53)
    batch = np.full((2, 3, 512, 512), np.nan, np.float32)
    image = pictures(37, 53)["noise"]
    found, _ = preprocess(image, spec, out=batch[1])
    assert found.base is batch or found is batch[1] or np.shares_memory(found, batch)
    np.testing.assert_array_equal(batch[1], preprocess(image, spec)[0])
    assert np.isnan(batch[0]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        np.empty((512, 512, 3), np.float32),
        np.empty((3, 512, 512)),
        np.empty((3, 512, 1024), np.float32)[..., ::2],
    ],
)
def test_refuses_a_wrong_out(wrong):
    with pytest.raises(InputError, match=r"out: found .* expected C-contiguous float32 \[3, 512, 512\]"):
        preprocess(pictures(37, 53)["noise"], input_spec("padded 512", 37, 53), out=wrong)


def test_does_not_change_its_input_and_accepts_views(path):
    spec = input_spec("fixed 300x300", 405, 720)
    image = pictures(405, 720)["noise"]
    copy = image.copy()
    expected, _ = preprocess(image, spec)
    bgr = np.ascontiguousarray(image[..., ::-1])
    np.testing.assert_array_equal(preprocess(bgr[..., ::-1], spec)[0], expected)
    image.flags.writeable = False
    np.testing.assert_array_equal(preprocess(image, spec)[0], expected)
    np.testing.assert_array_equal(image, copy)


def test_threads_do_not_share_scratch_memory(path):
    spec = input_spec("fixed 300x300", 405, 720)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (405, 720, 3), dtype=np.uint8) for _ in range(4)]
    alone = [preprocess(image, spec)[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: preprocess(images[i % 4], spec)[0], range(40)))
    for i, found in enumerate(together):
        np.testing.assert_array_equal(found, alone[i % 4])


def test_results_do_not_share_memory():
    spec = input_spec("fixed 300x300", 37, 53)
    first, _ = preprocess(pictures(37, 53)["noise"], spec)
    kept = first.copy()
    preprocess(pictures(37, 53)["checkerboard"], spec)
    np.testing.assert_array_equal(first, kept)


def test_needs_numpy_only():
    """On a device without OpenCV, Pillow and TensorFlow."""
    script = """
        import sys
        for absent in ("cv2", "PIL", "tensorflow", "scipy", "rich", "typer"):
            sys.modules[absent] = None
        import numpy as np
        from odtrt_lib import native
        from odtrt_lib.preprocess import preprocess, load_image
        from odtrt_lib.errors import MissingDependencyError
        from odtrt_lib.spec import InputSpec, Resizer
        spec = InputSpec(2, 2, Resizer("fixed_shape"), (1.0,) * 3, (0.0,) * 3)
        image = np.arange(9, dtype=np.uint8).reshape(3, 3, 1).repeat(3, axis=2)
        native.load = lambda: None
        print(preprocess(image, spec)[0][0].tolist())
        try:
            load_image("README.md")
        except MissingDependencyError as error:
            print(error)
    """
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert answer[0] == "[[0.0, 1.5], [4.5, 6.0]]"
    assert "pip install pillow" in answer[1]


@pytest.mark.parametrize(
    "image, found, advice",
    [
        (np.zeros((4, 5), np.uint8), "uint8 [4, 5]", "reshape(h, w, 1)"),
        (np.zeros((4, 5, 1), np.uint8), "uint8 [4, 5, 1]", "reshape(h, w, 1)"),
        (np.zeros((4, 5, 4), np.uint8), "uint8 [4, 5, 4]", "[:, :, :3]"),
        (np.zeros((3, 4, 5), np.uint8), "uint8 [3, 4, 5]", "moveaxis"),
        (np.zeros((2, 4, 5, 3), np.uint8), "uint8 [2, 4, 5, 3]", "one image"),
        (np.zeros((4, 5, 3), np.uint16), "uint16 [4, 5, 3]", ">> 8"),
        (np.zeros((4, 5, 3), np.float32), "float32 [4, 5, 3]", "raw pixels 0..255 as uint8"),
        (np.zeros((4, 5, 3), np.int64), "int64 [4, 5, 3]", "astype(numpy.uint8)"),
        (np.zeros((0, 5, 3), np.uint8), "uint8 [0, 5, 3]", "empty"),
        ("image.jpg", "found str", "load_image"),
        (None, "found NoneType", "load_image"),
    ],
)
def test_check_image_says_what_to_do(image, found, advice):
    with pytest.raises(InputError) as caught:
        check_image(image)
    message = str(caught.value)
    assert found in message and advice in message and "expected" in message
    assert "\n" not in message
    with pytest.raises(InputError):
        preprocess(image, input_spec("fixed 300x300", 4, 5))


def test_unpadded_aspect_ratio_must_fit_the_fixed_input():
    spec = input_spec("unpadded 240..400", 480, 640)
    assert (spec.height, spec.width) == (240, 320)
    with pytest.raises(
        InputError, match=r"640x480 becomes 320x240 .* fixed at 240x320; .*pad_to_max_dimension"
    ):
        preprocess(pictures(640, 480)["noise"], spec)


def test_image_too_narrow_to_resize():
    """TensorFlow refuses it too: `output dimensions must be positive`."""
    tf, *_ = odapi_modules()
    with pytest.raises(InputError, match="1x2000 becomes 0x512"):
        preprocess(np.zeros((1, 2000, 3), np.uint8), input_spec("padded 512", 1, 1))
    with pytest.raises(tf.errors.InvalidArgumentError):
        odapi_resizer(PADDED, 512, 512)(tf.zeros([1, 2000, 3]))


def nms_spec(change_coordinate_frame: bool) -> NmsSpec:
    return NmsSpec(1e-8, 0.5, 100, 100, False, change_coordinate_frame)


LANDSCAPE = Frame(1080, 1920, 288, 512, 512, 512)
PORTRAIT = Frame(720, 405, 512, 288, 512, 512)
STRETCHED = Frame(1080, 1920, 300, 300, 300, 300)


@pytest.mark.parametrize(
    "frame, changed, box, pixels",
    [
        (LANDSCAPE, False, (0.0, 0.0, 0.5625, 1.0), (0, 0, 1080, 1920)),
        (LANDSCAPE, False, (0.28125, 0.25, 0.375, 0.75), (540, 480, 720, 1440)),
        (LANDSCAPE, True, (0.0, 0.0, 1.0, 1.0), (0, 0, 1080, 1920)),
        (LANDSCAPE, True, (0.5, 0.25, 0.75, 0.75), (540, 480, 810, 1440)),
        (PORTRAIT, False, (0.5, 0.28125, 1.0, 0.5625), (360, 202.5, 720, 405)),
        (PORTRAIT, True, (0.5, 0.5, 1.0, 1.0), (360, 202.5, 720, 405)),
        (STRETCHED, False, (0.25, 0.5, 0.75, 1.0), (270, 960, 810, 1920)),
        (STRETCHED, True, (0.25, 0.5, 0.75, 1.0), (270, 960, 810, 1920)),
    ],
)
def test_boxes_in_pixels(frame, changed, box, pixels):
    found = boxes_to_pixels(np.array([box], np.float32), frame, nms_spec(changed))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [pixels], rtol=1e-6)


@pytest.mark.parametrize("size", [(405, 720), (720, 405), (37, 53), (1080, 1920)])
def test_boxes_come_back_through_the_od_api(size):
    """Boxes in image pixels, to the padded input, through the OD API's change of frame, and back."""
    tf, *_ = odapi_modules()
    from object_detection.core import box_list, box_list_ops

    _, frame = preprocess(pictures(*size)["noise"], input_spec("padded 512", *size))
    corners = np.random.default_rng(0).uniform(0, 1, (50, 2, 2)) * size
    pixels = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    to_input = np.array([frame.true_height / size[0], frame.true_width / size[1]] * 2) / 512
    in_input = box_list.BoxList(tf.constant(pixels * to_input, tf.float32))
    changed = box_list_ops.change_coordinate_frame(in_input, tf.constant(frame.clip_window))
    tolerance = 1e-6 * max(size)
    for boxes, is_changed in ((in_input, False), (changed, True)):
        found = boxes_to_pixels(boxes.get().numpy(), frame, nms_spec(is_changed))
        np.testing.assert_allclose(found, pixels, atol=tolerance)
    mixed_up = boxes_to_pixels(changed.get().numpy(), frame, nms_spec(False))
    assert np.abs(mixed_up - pixels).max() > 1, "the two frames must not be interchangeable here"


def test_no_boxes():
    assert boxes_to_pixels(np.zeros((0, 4), np.float32), LANDSCAPE, nms_spec(True)).shape == (0, 4)


@pytest.fixture(scope="module")
def picture_files(tmp_path_factory) -> Path:
    """One picture in the forms in which users bring it."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    colour = Image.fromarray(gaussian_spot(45, 61, (20, 30), 12) // 2 + pictures(45, 61)["noise"] // 8)
    grey = colour.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(45 * 61, dtype=np.uint16).reshape(45, 61) * 20
    colour.save(folder / "colour.png")
    colour.save(folder / "colour.bmp")
    colour.save(folder / "colour.jpg", quality=92)
    colour.save(folder / "rotated.jpg", exif=exif)
    colour.quantize(16).save(folder / "palette.png")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("RGBA").save(folder / "alpha.png")
    colour.quantize(16).save(folder / "palette_alpha.png", transparency=0)
    colour.save(folder / "colour_alpha.png", transparency=(0, 0, 0))
    colour.save(folder / "colour.tif")
    grey.save(folder / "grey.png")
    grey.save(folder / "grey.jpg")
    grey.convert("LA").save(folder / "grey_alpha.png")
    for name, options in gifs(Image).items():
        colour.quantize(16).save(folder / name, **options)
    part = bytearray((folder / "colour.gif").read_bytes())
    part[6:10] = struct.pack("<HH", 80, 60)  # the picture's size; the frame's stays
    (folder / "part.gif").write_bytes(part)
    colour.save(folder / "colour.webp", quality=80)
    adobe = (folder / "cmyk.jpg").read_bytes()
    marker = adobe.index(b"\xff\xee")
    (folder / "cmyk_plain.jpg").write_bytes(adobe[:marker] + adobe[marker + 16 :])
    (folder / "ycck.jpg").write_bytes(adobe[: marker + 15] + b"\2" + adobe[marker + 16 :])
    colour.save(folder / "huge.png")
    huge = bytearray((folder / "huge.png").read_bytes())
    huge[16:24] = struct.pack(">II", 13_300, 13_301)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    (folder / "huge.png").write_bytes(huge)
    grey.point(lambda value: 255 * (value > 60)).convert("1").save(folder / "bits.png")
    Image.fromarray(deep).save(folder / "deep_grey.png")
    (folder / "deep_colour.png").write_bytes(deep_colour_png(deep))
    for name in ("colour.png", "colour.jpg", "colour.bmp"):
        (folder / f"cut_{name}").write_bytes((folder / name).read_bytes()[:-1500])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image at all, but long enough to have a header " * 3)
    (folder / "pointer.jpg").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    )
    (folder / "folder.jpg").mkdir()
    return folder


def gifs(pillow: Any) -> dict[str, dict[str, Any]]:
    later = pillow.new("RGB", (61, 45), "red")
    return {
        "colour.gif": {},
        "transparent.gif": {"transparency": 3},
        "moving.gif": {"save_all": True, "append_images": [later]},
    }


def deep_colour_png(grey: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write (and silently reads as 8-bit)."""
    tf, *_ = odapi_modules()
    return tf.io.encode_png(np.repeat(grey[..., None], 3, axis=2)).numpy()


@pytest.mark.parametrize(
    "name",
    [
        "colour.png",
        "colour.bmp",
        "colour.jpg",
        "rotated.jpg",
        "palette.png",
        "grey.png",
        "grey.jpg",
        "bits.png",
        "alpha.png",
        "grey_alpha.png",
        "palette_alpha.png",
        "colour_alpha.png",
        "deep_grey.png",
        "deep_colour.png",
        "cmyk.jpg",
        "cmyk_plain.jpg",
        "ycck.jpg",
        "colour.gif",
        "transparent.gif",
        "moving.gif",
        "colour.webp",
    ],
)
def test_load_image_equals_tensorflows_decoder(picture_files, name):
    tf, *_ = odapi_modules()
    data = tf.io.read_file(str(picture_files / name))
    expected = (
        tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        if name.endswith("jpg")
        else tf.io.decode_image(data, channels=3, expand_animations=False)
    ).numpy()
    found = load_image(picture_files / name)
    assert found.dtype == np.uint8 and found.flags.writeable
    np.testing.assert_array_equal(found, expected)
    check_image(found)


@pytest.mark.parametrize(
    "name, says",
    [
        ("absent.jpg", "No such file"),
        ("folder.jpg", "Is a directory"),
        ("empty.jpg", "empty"),
        ("pointer.jpg", "git lfs pull"),
        ("text.jpg", "not an image"),
        ("colour.tif", "expected a JPEG, PNG, GIF, BMP or WebP file"),
        ("cut_colour.png", "damaged"),
        ("cut_colour.jpg", "damaged"),
        ("cut_colour.bmp", "damaged"),
        ("part.gif", "(0, 0, 61, 45) of (80, 60)"),
        ("huge.png", "13300 x 13301 is 176,903,300 pixels"),
    ],
)
def test_load_image_says_what_to_do(picture_files, name, says):
    with pytest.raises(InputError) as caught:
        load_image(picture_files / name)
    message = str(caught.value)
    assert message.startswith(str(picture_files / name)) and says in message
    assert "\n" not in message


def test_a_large_image_is_refused_without_a_warning_or_decoding(picture_files, recwarn, monkeypatch):
    monkeypatch.setattr(preprocessing, "_rgb", lambda image: pytest.fail("decoded"))
    with pytest.raises(InputError, match="scale it down"):
        load_image(picture_files / "huge.png")
    assert not recwarn.list


def test_too_little_memory_is_an_error_about_the_file(picture_files, monkeypatch):
    def exhausted(image):
        raise MemoryError

    monkeypatch.setattr(preprocessing, "_rgb", exhausted)
    with pytest.raises(InputError, match=r"colour.png: not enough memory"):
        load_image(picture_files / "colour.png")


@pytest.mark.corpus
def test_photographs_equal_the_od_api(corpus, path):
    tf, *_ = odapi_modules()
    files = sorted((corpus / "coco128" / "images").rglob("*.jpg"))[::24]
    assert files
    for file in files:
        image = load_image(file)
        data = tf.io.read_file(str(file))
        decoded = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        np.testing.assert_array_equal(image, decoded)
        for name in ("fixed 300x300", "padded 512"):
            spec = input_spec(name, *image.shape[:2])
            expected, _ = odapi_preprocess(name, image, spec)
            assert error_in_value_range(preprocess(image, spec)[0], expected, spec) <= TOLERANCE


@pytest.mark.corpus
def test_git_lfs_pointers_from_the_wild(corpus):
    pointers = [
        path
        for path in (corpus / "negative").rglob("*")
        if path.is_file() and path.read_bytes()[:7] == b"version"
    ]
    assert pointers
    for path in pointers:
        with pytest.raises(InputError, match="git lfs pull"):
            load_image(path)
