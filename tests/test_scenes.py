"""The rendered scenes: repeatable, boxed tightly, readable by pycocotools. COCO folders: errors that help."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from odtrt_lib import scenes as renderer
from odtrt_lib.errors import InputError


@pytest.fixture(scope="module")
def scenes():
    return [renderer.render_scene(seed) for seed in renderer.TEST_SEEDS[:12]]


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory):
    return renderer.write_coco(tmp_path_factory.mktemp("coco") / "parts", 3)


def test_a_seed_is_a_scene():
    first, again, other = (renderer.render_scene(seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    np.testing.assert_array_equal(first.class_ids, again.class_ids)
    assert (first.image != other.image).mean() > 0.5


def test_a_scene_depends_on_no_global_state():
    expected = renderer.render_scene(11).image
    np.random.seed(0)
    cv2.setRNGSeed(5)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        np.testing.assert_array_equal(renderer.render_scene(11).image, expected)
    finally:
        cv2.setNumThreads(threads)


def test_shapes_and_dtypes(scenes):
    for scene in scenes:
        count = len(scene.class_ids)
        assert (scene.image.shape, scene.image.dtype) == ((480, 640, 3), np.uint8)
        assert (scene.boxes.shape, scene.boxes.dtype) == ((count, 4), np.float32)
        assert scene.class_ids.dtype == np.int64
        assert ((scene.boxes >= 0) & (scene.boxes <= [480, 640, 480, 640])).all()
        assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()


def test_every_class_occurs_and_belts_are_busy(scenes):
    ids = np.concatenate([scene.class_ids for scene in scenes])
    assert set(ids.tolist()) == set(range(1, len(renderer.PARTS_CLASSES) + 1))
    assert 3 < len(ids) / len(scenes) < 14


def test_splits_do_not_meet():
    ranges = sorted(
        (renderer.TRAIN_SEEDS, renderer.VALIDATION_SEEDS, renderer.TEST_SEEDS), key=lambda part: part.start
    )
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ranges))


@pytest.mark.parametrize("seed", renderer.TEST_SEEDS[:6])
def test_boxes_are_where_the_picture_changes_when_the_part_is_taken_away(seed):
    """Paints the scene with and without each part: what differs is the part's visible extent."""
    layout = renderer._lay_out(seed, 480, 640)
    scene = renderer.render_scene(seed)
    whole = renderer._paint(layout, shadows=False)
    parts = [number for number, sprite in enumerate(layout.sprites) if sprite.class_id]
    assert [layout.sprites[number].class_id for number in parts] == scene.class_ids.tolist()
    for number, box in zip(parts, scene.boxes, strict=True):
        others = layout.sprites[:number] + layout.sprites[number + 1 :]
        without = renderer._paint(dataclasses.replace(layout, sprites=others), shadows=False)
        changed = np.abs(whole - without).max(axis=2) > 0.02
        ys, xs = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        np.testing.assert_allclose([ys[0], xs[0], ys[-1] + 1, xs[-1] + 1], box, atol=2.0)


def test_hidden_parts_are_not_in_the_scene():
    for seed in renderer.TEST_SEEDS[:4]:
        layout = renderer._lay_out(seed, 480, 640)
        owner = renderer._owners(layout, 480, 640)
        for number, sprite in enumerate(layout.sprites):
            if sprite.class_id:
                seen = np.count_nonzero(owner == number) / np.count_nonzero(sprite.alpha >= 0.5)
                assert seen >= renderer.MINIMUM_VISIBLE


def test_other_image_sizes():
    scene = renderer.render_scene(3, height=240, width=320)
    assert scene.image.shape == (240, 320, 3)
    assert (scene.boxes <= [240, 320, 240, 320]).all()


def test_the_shipped_detector_knows_the_same_classes():
    shipped = Path(__file__).parents[1] / "models" / "parts"
    named = re.findall(r'id:\s*(\d+)\s+name:\s*"(\w+)"', (shipped / "label_map.pbtxt").read_text())
    assert [(int(number), name) for number, name in named] == list(enumerate(renderer.PARTS_CLASSES, 1))
    assert f"num_classes: {len(named)}\n" in (shipped / "pipeline.config").read_text()


def test_written_folder_is_read_by_pycocotools(coco_folder):
    coco_module = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO(str(coco_folder / "instances.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(renderer.PARTS_CLASSES)
    for seed in renderer.TEST_SEEDS[:3]:
        scene = renderer.render_scene(seed)
        found = [annotation["bbox"] for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[seed]))]
        expected = np.concatenate(
            [scene.boxes[:, 1::-1], scene.boxes[:, 3:1:-1] - scene.boxes[:, 1::-1]], axis=1
        )
        np.testing.assert_allclose(np.asarray(found).reshape(-1, 4), expected)


def test_written_folder_is_read_back(coco_folder):
    folder = renderer.load_coco(coco_folder / "instances.json")
    assert folder.image_ids == tuple(renderer.TEST_SEEDS[:3])
    assert folder.class_names == dict(enumerate(renderer.PARTS_CLASSES, 1))
    for seed, path, boxes, class_ids in zip(
        folder.image_ids, folder.paths, folder.boxes, folder.class_ids, strict=True
    ):
        scene = renderer.render_scene(seed)
        image = cv2.imread(str(path))[..., ::-1]
        assert np.abs(image.astype(int) - scene.image).mean() < 3.0
        np.testing.assert_array_equal(boxes, scene.boxes)
        np.testing.assert_array_equal(class_ids, scene.class_ids)


def test_a_folder_in_use_is_not_overwritten(coco_folder):
    before = sorted(coco_folder.rglob("*"))
    with pytest.raises(InputError, match="not empty"):
        renderer.write_coco(coco_folder, 1)
    assert sorted(coco_folder.rglob("*")) == before


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(renderer, "render_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        renderer.write_coco(tmp_path / "parts", 2)
    assert not list(tmp_path.iterdir())
