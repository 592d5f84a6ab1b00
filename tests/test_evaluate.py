"""mAP against hand arithmetic and the OD API's evaluator; agreement against seeded differences."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import json
import multiprocessing
import pickle
import sys

import numpy as np
import pytest

from odtrt_lib import evaluate
from odtrt_lib.coco import read_instances
from odtrt_lib.detector import Detections
from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.evaluate import (
    MIN_IMAGES,
    ClassMatches,
    MapDrop,
    Recipe,
    Verdict,
    agreement,
    check_limit,
    coco_metrics,
    coco_results,
    detect_folder,
    detect_shard,
    load_detections,
    map_drop,
    match,
    merge,
    resampled_map,
    shards,
)


def detection(image_id: int, category_id: int, bbox: list[float], score: float) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


# --- COCO metrics


def truth_of_two_squares() -> dict:
    return {
        "images": [{"id": 7, "width": 200, "height": 200}],
        "categories": [{"id": 3, "name": "bolt"}, {"id": 5, "name": "nut"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [10, 10, 50, 50]},
            {"image_id": 7, "category_id": 3, "bbox": [100, 100, 50, 50]},
        ],
    }


HIT, MISS, HALF_HIT = (
    detection(7, 3, [10, 10, 50, 50], 0.9),
    detection(7, 3, [150, 10, 40, 40], 0.8),
    detection(7, 3, [100, 100, 50, 32], 0.7),  # IoU 0.64: a hit at 0.50, 0.55 and 0.60 only
)


def test_metrics_are_those_computed_by_hand():
    found = coco_metrics(truth_of_two_squares(), [HIT, MISS, HALF_HIT])
    # 101 recall points. Precision is 1 up to recall 0.5, then 2/3 where the third detection is a hit.
    with_half, without = (51 + 50 * 2 / 3) / 101, 51 / 101
    expected = (3 * with_half + 7 * without) / 10
    assert found.map == pytest.approx(expected, abs=1e-12)
    assert found.map50 == pytest.approx(with_half, abs=1e-12)
    assert found.map75 == pytest.approx(without, abs=1e-12)
    assert found.map_medium == pytest.approx(expected, abs=1e-12)  # 50 x 50 is a medium object
    assert found.map_small == found.map_large == -1
    assert found.ar1 == pytest.approx(0.5)
    assert found.ar100 == pytest.approx((3 * 1.0 + 7 * 0.5) / 10)
    assert found.ap_per_class == {3: pytest.approx(expected)}
    assert found.images == 1


def test_nothing_found_is_zero():
    found = coco_metrics(truth_of_two_squares(), [])
    assert (found.map, found.map50, found.ar100) == (0, 0, 0)
    assert found.ap_per_class == {3: 0}


def test_only_the_images_asked_for_count():
    truth = truth_of_two_squares()
    truth["images"].append({"id": 8, "width": 200, "height": 200})
    truth["annotations"].append({"image_id": 8, "category_id": 3, "bbox": [10, 10, 50, 50]})
    both = [HIT, detection(7, 3, [100, 100, 50, 50], 0.6)]
    assert coco_metrics(truth, both).map == pytest.approx(67 / 101)
    only = coco_metrics(truth, both, image_ids=[7])
    assert (only.map, only.images) == (pytest.approx(1), 1)


def test_neither_input_is_changed_and_nothing_is_printed(capsys):
    truth, found = truth_of_two_squares(), [dict(HIT)]
    before = copy.deepcopy((truth, found))
    coco_metrics(truth, found)
    assert (truth, found) == before
    assert capsys.readouterr() == ("", "")


def random_truth_and_detections(images: int) -> tuple[dict, list[dict]]:
    """Objects of three classes and all sizes, a tenth of them crowds; found, missed, moved, invented."""
    rng = np.random.default_rng(17)
    truth = {
        "images": [{"id": i, "width": 400, "height": 300} for i in range(images)],
        "categories": [{"id": c, "name": str(c)} for c in (1, 2, 4)],
        "annotations": [],
    }
    found = []
    for image_id in range(images):
        for _ in range(rng.integers(0, 7)):
            sides = np.exp(rng.uniform(np.log(8), np.log(150), 2))
            corner = rng.uniform(0, [400, 300] - sides)
            box = np.concatenate([corner, sides])
            category = int(rng.choice([1, 2, 4]))
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box.tolist(),
                    "area": float(sides.prod()),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 3)):
                moved = box + rng.normal(0, 0.12, 4) * np.tile(sides, 2)
                moved[2:] = np.maximum(moved[2:], 1)
                seen = category if rng.random() < 0.85 else 2
                found.append(detection(image_id, seen, moved.tolist(), float(rng.random())))
    return truth, found


def from_zero(truth):
    for i, one in enumerate(truth["annotations"]):
        one["id"] = i


def all_the_same(truth):
    for one in truth["annotations"]:
        one["id"] = 7


def once_an_image(truth):
    for one in truth["annotations"]:
        one["id"] = 1 + sum(o["image_id"] == one["image_id"] for o in truth["annotations"])


def partly_absent(truth):
    for one in truth["annotations"][::2]:
        del one["id"]


def words_and_nulls(truth):
    for one in truth["annotations"]:
        one.update(id=f"a-{one['id']}", image_id=str(one["image_id"]), area=str(one["area"]))
        one["iscrowd"] = one["iscrowd"] or None


@pytest.fixture(scope="module")
def figures_of_the_odapi():
    """What the OD API's evaluator says of ``random_truth_and_detections(60)``."""
    pytest.importorskip("tensorflow")
    from odtrt_lib.export import odapi

    odapi.prepare()
    from object_detection.metrics.coco_evaluation import CocoDetectionEvaluator

    truth, found = random_truth_and_detections(images=60)
    evaluator = CocoDetectionEvaluator(truth["categories"])
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        evaluator.add_single_ground_truth_image_info(
            image["id"],
            {
                "groundtruth_boxes": corners([a["bbox"] for a in own]),
                "groundtruth_classes": np.array([a["category_id"] for a in own], np.int64),
                "groundtruth_is_crowd": np.array([a["iscrowd"] for a in own], np.int64),
            },
        )
        seen = [d for d in found if d["image_id"] == image["id"]]
        evaluator.add_single_detected_image_info(
            image["id"],
            {
                "detection_boxes": corners([d["bbox"] for d in seen]),
                "detection_scores": np.array([d["score"] for d in seen]),
                "detection_classes": np.array([d["category_id"] for d in seen], np.int64),
            },
        )
    return evaluator.evaluate()


@pytest.mark.parametrize(
    "change",
    [lambda truth: None, from_zero, all_the_same, once_an_image, partly_absent, words_and_nulls],
    ids=["as they should be", "from 0", "all the same", "once an image", "partly absent", "words, nulls"],
)
def test_metrics_are_those_of_the_odapis_evaluator(figures_of_the_odapi, change):
    expected = figures_of_the_odapi
    truth, found = random_truth_and_detections(images=60)
    change(truth)
    ours = dataclasses.asdict(coco_metrics(truth, found))
    names = {
        "map": "Precision/mAP",
        "map50": "Precision/mAP@.50IOU",
        "map75": "Precision/mAP@.75IOU",
        "map_small": "Precision/mAP (small)",
        "map_medium": "Precision/mAP (medium)",
        "map_large": "Precision/mAP (large)",
        "ar1": "Recall/AR@1",
        "ar10": "Recall/AR@10",
        "ar100": "Recall/AR@100",
        "ar_small": "Recall/AR@100 (small)",
        "ar_medium": "Recall/AR@100 (medium)",
        "ar_large": "Recall/AR@100 (large)",
    }
    assert 0.1 < ours["map"] < 0.9
    for own, theirs in names.items():
        assert ours[own] == pytest.approx(expected[f"DetectionBoxes_{theirs}"], abs=1e-9), own


def corners(boxes: list[list[float]]) -> np.ndarray:
    x, y, width, height = np.array(boxes, np.float64).reshape(-1, 4).T
    return np.stack([y, x, y + height, x + width], axis=1)


@pytest.mark.corpus
def test_the_odapis_detections_have_the_odapis_map(corpus):
    """The corpus states the mAP that the OD API itself gave for these detections."""
    found = coco_metrics(
        corpus / "coco128" / "instances_val128.json",
        load_detections(corpus / "coco_ssd_mnv1" / "ref_detections_odapi.json"),
    )
    assert (round(found.map, 3), round(found.map50, 3), found.images) == (0.255, 0.400, 128)


def one_line(call, kind: type = InputError) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"images": [], "annotations": []}'])
def test_unusable_annotations_are_named(tmp_path, content):
    path = tmp_path / "instances.json"
    if content is not None:
        path.write_text(content)
    message = one_line(lambda: coco_metrics(path, [HIT]))
    assert message.startswith(str(path)) and "expected" in message


@pytest.mark.parametrize("bbox", [None, [1, 2, 3], "abcd"])
def test_a_malformed_annotation_is_named(bbox):
    truth = truth_of_two_squares()
    truth["annotations"][1]["bbox"] = bbox
    assert "annotations[1]" in one_line(lambda: coco_metrics(truth, [HIT]))


@pytest.mark.parametrize("content", [None, "", "{", "{}", '[{"image_id": 1}]', "[[1, 2]]"])
def test_unusable_detections_are_named(tmp_path, content):
    path = tmp_path / "found.json"
    if content is not None:
        path.write_text(content)
    assert one_line(lambda: load_detections(path)).startswith(str(path))


@pytest.mark.parametrize(
    "wrong", [{"score": float("nan")}, {"bbox": [1, 2, 3]}, {"bbox": 4}, {"score": "high"}, {"score": None}]
)
def test_a_malformed_detection_is_named(wrong):
    found = [HIT, {**MISS, **wrong}]
    for call in (
        lambda: coco_metrics(truth_of_two_squares(), found),
        lambda: agreement([HIT], found),
        lambda: agreement(found, [HIT]),
    ):
        assert "[1]" in one_line(call)


def test_detections_of_other_images_are_refused():
    stray = {**HIT, "image_id": 12}
    assert "image 12 " in one_line(lambda: coco_metrics(truth_of_two_squares(), [HIT, stray]))
    assert "image 4 " in one_line(lambda: coco_metrics(truth_of_two_squares(), [HIT], image_ids=[4]))


def test_pycocotools_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    message = one_line(lambda: coco_metrics(truth_of_two_squares(), [HIT]), MissingDependencyError)
    assert "pip install pycocotools" in message


# --- from a folder of images


def test_a_folder_of_images_gives_coco_results(tmp_path):
    from PIL import Image

    from odtrt_lib.coco import load_coco

    for name, grey in (("a.png", 10), ("b.png", 20)):
        Image.new("RGB", (30, 20), (grey, grey, grey)).save(tmp_path / name)
    (tmp_path / "instances.json").write_text(
        json.dumps(
            {
                "images": [
                    {"id": 4, "file_name": "a.png", "width": 30, "height": 20},
                    {"id": 9, "file_name": "b.png", "width": 30, "height": 20},
                ],
                "annotations": [],
                "categories": [{"id": 1, "name": "bolt"}],
            }
        )
    )

    class Grey:
        def detect(self, image: np.ndarray) -> Detections:
            """One box whose left edge is the image's grey level."""
            assert image.shape == (20, 30, 3)
            left = float(image[0, 0, 0])
            return Detections(
                boxes=np.array([[1, left, 6, left + 7]], np.float32),
                scores=np.array([0.5], np.float32),
                class_ids=np.array([1]),
                names=("bolt",),
            )

    found = detect_folder(Grey(), load_coco(tmp_path / "instances.json", tmp_path))
    assert found == [detection(4, 1, [10, 1, 7, 5], 0.5), detection(9, 1, [20, 1, 7, 5], 0.5)]
    assert json.loads(json.dumps(found)) == found


# --- in shards


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """A model folder and seven pictures with their annotations; the third picture is damaged."""
    pytest.importorskip("onnxruntime")
    from PIL import Image
    from tiny_model import SPEC, model_folder

    from odtrt_lib.coco import load_coco
    from odtrt_lib.folder import seal

    path = tmp_path_factory.mktemp("evaluation")
    rng = np.random.default_rng(0)
    many = dataclasses.replace(
        SPEC,
        input=dataclasses.replace(SPEC.input, scale=(1e-4,) * 3),  # boxes near their anchors
        nms=dataclasses.replace(SPEC.nms, score_threshold=1e-8),
    )
    folder = model_folder(path / "tiny", many)
    np.save(folder / "anchors.npy", rng.uniform(0.1, 0.9, (16 * 16, 4)).astype(np.float32))
    seal(folder)
    images = []
    for number in range(7):
        size = (40 + number, 30)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
        images.append({"id": 70 - number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
    (path / "2.png").write_bytes(b"no picture")
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (path / "instances.json").write_text(json.dumps(content))
    return Recipe(folder, "onnxruntime"), load_coco(path / "instances.json")


def test_three_shards_in_other_processes_are_one_here_to_the_bit(evaluation):
    recipe, coco = evaluation
    (whole,) = shards(coco, 1)
    here = merge([detect_shard(recipe, whole)])
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    parts = shards(coco, 3)
    assert [len(part) for part in parts] == [2, 2, 3]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=spawn) as pool:
        there = merge(pool.map(detect_shard, [recipe] * 3, parts))
    assert there == here  # floats too: equal means the same bits, and nothing is NaN
    assert here.image_ids == [70, 69, 67, 66, 65, 64]
    assert list(here.unreadable) == [coco.paths[2]]
    assert here.unreadable[coco.paths[2]].startswith(f"{coco.paths[2]}: damaged")
    assert {row["image_id"] for row in here.detections} == set(here.image_ids)
    assert len(here.detections) > 30
    with recipe.open() as detector, pytest.raises(InputError, match=r"2\.png: damaged"):
        detect_folder(detector, coco)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 20])
def test_shards_are_the_pictures_in_their_order(evaluation, count):
    _, coco = evaluation
    parts = shards(coco, count)
    pictures = [picture for part in parts for picture in part]
    assert pictures == list(zip(coco.image_ids, coco.paths, strict=True))
    sizes = {len(part) for part in parts}
    assert len(parts) == min(count, 7) and min(sizes) > 0 and max(sizes) - min(sizes) <= 1
    assert sum(len(part) for part in shards(coco, count, limit=2)) == 2
    assert shards(coco, count, limit=0) == []
    with pytest.raises(ValueError, match="0 shards"):
        shards(coco, 0)


def test_what_a_detector_refuses_is_the_pictures_problem(evaluation, monkeypatch):
    from odtrt_lib.detector import Detector

    recipe, coco = evaluation

    def refuse(self, image):
        raise InputError("too large")

    monkeypatch.setattr(Detector, "detect", refuse)
    found = merge([detect_shard(recipe, shards(coco, 1, limit=1)[0])])
    assert found.unreadable == {coco.paths[0]: f"{coco.paths[0]}: too large"}
    assert (found.detections, found.image_ids) == ([], [])


def test_a_recipe_that_opens_nothing_says_why(tmp_path):
    assert one_line(lambda: detect_shard(Recipe(tmp_path, "onnxruntime"), [])).startswith(str(tmp_path))


def test_no_detections_is_an_empty_list():
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), ())
    assert coco_results(1, none) == []


# --- the drop of mAP


def rounded(found: list[dict]) -> list[dict]:
    """With many equal scores, in one image and in different ones."""
    return [{**one, "score": round(one["score"], 1)} for one in found]


@pytest.mark.parametrize("change", [lambda found: found, rounded, lambda found: []])
def test_the_map_of_the_whole_set_is_pycocotools(change):
    truth, found = random_truth_and_detections(images=60)
    found = change(found)
    matches = match(read_instances(truth), found)
    assert resampled_map(matches, np.ones((1, 60), int))[0] == pytest.approx(
        coco_metrics(truth, found).map, abs=1e-12
    )


def duplicated(truth: dict, found: list[dict], counts: np.ndarray) -> tuple[dict, list[dict]]:
    """The data set with each image as often as ``counts`` says, every copy an image of its own."""
    copies = np.repeat(np.arange(len(counts)), counts).tolist()
    images = [{"id": new} for new in range(len(copies))]
    objects, detections = (
        [{**one, "image_id": new} for new, old in enumerate(copies) for one in rows if one["image_id"] == old]
        for rows in (truth["annotations"], found)
    )
    return {**truth, "images": images, "annotations": objects}, detections


def test_the_map_of_a_resample_is_pycocotools_of_duplicated_images():
    truth, found = random_truth_and_detections(images=40)
    rng = np.random.default_rng(2)
    counts = np.stack([np.bincount(rng.integers(0, 40, 40), minlength=40) for _ in range(3)])
    counts[2] = 0
    with_class_4 = {one["image_id"] for one in truth["annotations"] if one["category_id"] == 4}
    counts[2, sorted(set(range(40)) - with_class_4)] = 3  # a class without objects, only false detections
    expected = [coco_metrics(*duplicated(truth, found, row)).map for row in counts]
    assert len(set(expected)) == 3
    np.testing.assert_allclose(resampled_map(match(read_instances(truth), found), counts), expected, 0, 1e-12)


def test_a_resample_without_objects_has_no_map():
    truth, found = truth_of_two_squares(), [HIT]
    truth["images"].append({"id": 8})
    counts = np.array([[1, 1], [0, 2]])
    maps = resampled_map(match(read_instances(truth), found), counts)
    assert maps[0] == pytest.approx(51 / 101) and np.isnan(maps[1])
    drop = map_drop(truth, found, [], resamples=40)
    assert (drop.points, drop.low, drop.high) == pytest.approx([5100 / 101] * 3)


def simulated(images: int, rng: np.random.Generator) -> list[tuple[ClassMatches]]:
    """A detector and a slightly worse one, which see the same objects well or badly, on random images."""
    objects = rng.integers(0, 6, images)
    of_object = np.repeat(np.arange(images), objects)
    of_false = np.repeat(np.arange(images), rng.poisson(2, images))
    visible = rng.normal(0, 1, images)[of_object] + rng.normal(0, 1, len(of_object))
    sides = []
    for worse in (0.0, 0.1):
        quality = visible - worse + rng.normal(0, 0.3, len(of_object))
        scores = [quality + rng.normal(0, 1, len(of_object)), rng.normal(-1, 1, len(of_false))]
        order = np.argsort(-np.concatenate(scores))
        is_hit = np.zeros((2, len(order)), bool)
        is_hit[:, : len(of_object)] = quality > np.array([[-1.0], [0.3]])
        image = np.concatenate([of_object, of_false])
        sides.append((ClassMatches(objects, image[order], is_hit[:, order], np.zeros_like(is_hit)),))
    return sides


def test_the_interval_covers_the_true_drop(monkeypatch):
    """The truth is the drop on very many images. A percentile interval of so few is a little too narrow."""
    rng = np.random.default_rng(5)
    everything = simulated(100_000, rng)
    whole = [100 * resampled_map(side, np.ones((1, 100_000), int))[0] for side in everything]
    true_drop = whole[0] - whole[1]
    assert 1 < true_drop < 5
    truth = {"images": [], "categories": [], "annotations": []}
    truth["images"] = [{"id": i} for i in range(50)]
    truth["categories"] = [{"id": 1, "name": "a"}]
    truth["annotations"] = [{"image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9]}]
    drops = []
    for _ in range(200):
        sides = iter(simulated(50, rng))
        monkeypatch.setattr(evaluate, "match", lambda *_, sides=sides: next(sides))
        drops.append(map_drop(truth, [], [], resamples=200))
    below = sum(true_drop < drop.low for drop in drops)
    above = sum(true_drop > drop.high for drop in drops)
    assert 0.9 * 200 <= 200 - below - above <= 0.98 * 200
    assert min(below, above) > 0
    spread = np.std([drop.points for drop in drops]) * 2 * 1.96
    assert np.mean([drop.high - drop.low for drop in drops]) == pytest.approx(spread, rel=0.15)


@pytest.fixture(scope="module")
def good():
    """A truth, and detections that are nearly right."""
    truth, _ = random_truth_and_detections(images=60)
    rng = np.random.default_rng(8)
    found = [
        detection(
            one["image_id"],
            one["category_id"],
            (np.array(one["bbox"]) + np.tile(one["bbox"][2:], 2) * rng.normal(0, 0.02, 4)).tolist(),
            float(rng.uniform(0.5, 1)),
        )
        for one in truth["annotations"]
    ]
    false = [
        detection(
            i, int(rng.choice([1, 2, 4])), [*rng.uniform(0, 200, 2), 60, 60], float(rng.uniform(0, 0.6))
        )
        for i in range(60)
        for _ in range(3)
    ]
    return truth, found + false


def shuffled_scores(found: list[dict]) -> list[dict]:
    scores = np.random.default_rng(1).permutation([one["score"] for one in found]).tolist()
    return [{**one, "score": score} for one, score in zip(found, scores, strict=True)]


def shifted_boxes(found: list[dict]) -> list[dict]:
    moved = []
    for one in found:
        x, y, width, height = one["bbox"]
        moved.append({**one, "bbox": [x + 0.1 * width, y, width, height]})
    return moved


@pytest.mark.parametrize("spoil", [shuffled_scores, shifted_boxes, lambda found: []])
def test_a_bad_model_does_not_pass(good, spoil):
    truth, found = good
    drop = map_drop(truth, found, spoil(found), resamples=100)
    assert drop.points == pytest.approx(
        100 * (coco_metrics(truth, found).map - coco_metrics(truth, spoil(found)).map), abs=1e-10
    )
    assert 2 < drop.low < drop.points < drop.high
    assert check_limit(drop, 0.5) == Verdict("failed", 0.5)
    back = map_drop(truth, spoil(found), found, resamples=100)
    assert (back.points, back.low, back.high) == pytest.approx((-drop.points, -drop.high, -drop.low))
    assert check_limit(back, 0).name == "passed"


def test_the_same_model_passes_and_loses_nothing(good):
    truth, found = good
    drop = map_drop(truth, found, copy.deepcopy(found), resamples=50)
    assert (drop.points, drop.low, drop.high, drop.images) == (0, 0, 0, 60)
    assert drop.reference_map == drop.candidate_map > 0.3
    assert check_limit(drop, 0) == Verdict("passed", 0)


def test_equal_seeds_give_equal_bits(good, monkeypatch):
    truth, found = good
    worse = [one for i, one in enumerate(found) if i % 20]
    first = map_drop(truth, found, worse, resamples=60)
    monkeypatch.setattr(evaluate, "_RESAMPLES_AT_ONCE", 7)
    assert map_drop(truth, found, worse, resamples=60) == first
    other = map_drop(truth, found, worse, resamples=60, seed=1)
    assert (other.points == first.points, other.low == first.low) == (True, False)


def test_only_the_images_asked_for_are_compared(good):
    truth, found = good
    half = [one for one in found if one["image_id"] < 30]
    assert map_drop(truth, found, half, image_ids=range(30), resamples=20) == MapDrop(
        *[pytest.approx(coco_metrics(truth, found, range(30)).map)] * 2, 0, 0, 0, 30
    )


@pytest.mark.parametrize(
    "points, high, images, limit, expected",
    [
        (0.2, 0.4, 200, 0.5, Verdict("passed", 0.5)),
        (0.2, 0.5, 200, 0.5, Verdict("passed", 0.5)),
        (0.5, 0.5, 200, 0.5, Verdict("passed", 0.5)),
        (0.51, 0.6, 200, 0.5, Verdict("failed", 0.5)),
        (0.125, 0.625, 200, 0.375, Verdict("not shown", 0.375, 800)),  # half as wide: four times as many
        (0.17, 0.37, 200, 0.3, Verdict("not shown", 0.3, 474)),  # 200 * (0.20 / 0.13)^2 = 473.4
        (0.3, 0.4, 200, 0.3, Verdict("not shown", 0.3)),
        (0.0, 0.0, MIN_IMAGES - 1, 0.5, Verdict("not shown", 0.5, MIN_IMAGES)),
        (0.0, 0.55, 20, 0.5, Verdict("not shown", 0.5, MIN_IMAGES)),
        (-0.4, -0.1, MIN_IMAGES, 0, Verdict("passed", 0)),
    ],
)
def test_a_limit_is_kept_only_if_that_is_shown(points, high, images, limit, expected):
    drop = MapDrop(0.5, 0.5 - points / 100, points, points - 0.1, high, images)
    assert check_limit(drop, limit) == expected


def test_what_cannot_be_compared_is_said_in_one_line(good):
    truth, found = good
    nothing = {**truth, "annotations": []}
    crowds = {**truth, "annotations": [{**one, "iscrowd": 1} for one in truth["annotations"]]}
    for empty in (nothing, crowds):
        message = one_line(lambda truth=empty: map_drop(truth, found, found))
        assert "no object that counts in 60 images" in message
    assert "in 0 images" in one_line(lambda: map_drop(truth, found, found, image_ids=[]))
    stray = [*found, {**HIT, "image_id": 99}]
    assert "image 99 " in one_line(lambda: map_drop(truth, found, stray))
    assert "image 99 " in one_line(lambda: map_drop(truth, stray, found))
    for limit in (-0.1, 101, float("nan"), float("inf")):
        assert "0 to 100" in one_line(lambda x=limit: check_limit(MapDrop(0.5, 0.5, 0, 0, 0, 60), x))


# --- agreement


def scene() -> list[dict]:
    rng = np.random.default_rng(1)
    found = []
    for image_id in range(3):
        for k in range(8):
            box = [40.0 * k, 10.0 + k, *rng.uniform(20, 60, 2)]
            found.append(detection(image_id, 1 + k % 2, box, round(float(rng.uniform(0.1, 0.99)), 6)))
    return found


def test_a_list_agrees_with_itself_in_any_order_and_with_rounding():
    reference = scene()
    candidate = [
        {**d, "score": d["score"] + 4e-4, "bbox": [v + 0.01 for v in d["bbox"]]} for d in reference[::-1]
    ]
    compared = agreement(reference, candidate)
    assert compared.agrees
    assert (compared.images, compared.references, compared.matched) == (3, 24, 24)
    assert compared.max_score_difference == pytest.approx(4e-4)
    assert 0.99 < compared.min_iou < 1


@pytest.mark.parametrize(
    "change, missing, extra",
    [
        (lambda found: found.pop(5), 1, 0),
        (lambda found: found.append(detection(1, 1, [300, 200, 30, 30], 0.4)), 0, 1),
        (lambda found: found.append(dict(found[5])), 0, 1),
        (lambda found: found[5].update(bbox=[v + 1 for v in found[5]["bbox"]]), 1, 1),
        (lambda found: found[5].update(category_id=9), 1, 1),
        (lambda found: found[5].update(image_id=2), 1, 1),
        (lambda found: found[5].update(score=0.01), 1, 0),
        (lambda found: found.clear(), 24, 0),
    ],
    ids=["dropped", "extra", "twice", "shifted", "other class", "other image", "sunk", "nothing"],
)
def test_a_difference_is_caught_from_both_sides(change, missing, extra):
    reference, candidate = scene(), scene()
    change(candidate)
    compared = agreement(reference, candidate)
    assert not compared.agrees
    assert (len(compared.missing), len(compared.extra)) == (missing, extra)
    mirrored = agreement(candidate, reference)
    assert not mirrored.agrees
    assert (len(mirrored.missing), len(mirrored.extra)) == (extra, missing)


def test_a_changed_score_is_caught():
    reference, candidate = scene(), scene()
    candidate[5]["score"] += 2e-3
    compared = agreement(reference, candidate)
    assert compared.matched == 24 and not compared.missing and not compared.extra
    assert compared.max_score_difference == pytest.approx(2e-3)
    assert not compared.agrees
    assert agreement(reference, candidate, score_tolerance=3e-3).agrees


def test_the_missing_detection_is_shown():
    reference, candidate = scene(), scene()
    dropped = candidate.pop(11)
    assert agreement(reference, candidate).missing == (dropped,)


def test_pairing_is_one_to_one_and_best_first():
    """Two boxes of a class, a pixel apart: each must find its own, whatever the order."""
    near = [detection(0, 1, [0, 0, 200, 200], 0.9), detection(0, 1, [1, 0, 200, 200], 0.8)]
    compared = agreement(near, near[::-1])
    assert compared.agrees and compared.min_iou == 1 and compared.max_score_difference == 0


def test_a_score_at_the_threshold_is_excused_and_counted():
    reference = [*scene(), detection(0, 1, [300, 200, 30, 30], 0.0504)]
    compared = agreement(reference, scene())
    assert compared.agrees and compared.at_threshold == 1 and compared.references == 25
    mirrored = agreement(scene(), reference)
    assert mirrored.agrees and mirrored.at_threshold == 1 and mirrored.references == 24
    lowered = [*scene(), detection(0, 1, [300, 200, 30, 30], 0.0499)]
    assert agreement(reference, lowered).matched == 25
    assert agreement(scene(), lowered).at_threshold == 0
    above = [*scene(), detection(0, 1, [300, 200, 30, 30], 0.06)]
    assert not agreement(above, scene()).agrees


def test_a_score_at_the_end_of_a_full_list_is_excused_only_there():
    full = [detection(0, 1, [50 * k, 0, 40, 40], 0.9 - 0.1 * k) for k in range(5)]
    swapped = [*full[:4], detection(0, 1, [0, 100, 40, 40], 0.5002)]
    compared = agreement(full, swapped, max_detections=5)
    assert compared.agrees and compared.at_threshold == 2
    assert not agreement(full, swapped).agrees
    assert not agreement(full, swapped, max_detections=6).agrees
    other = [full[0], *full[2:], detection(0, 1, [0, 100, 40, 40], 0.5002)]
    assert agreement(full, other, max_detections=5).missing == (full[1],)


def test_two_empty_lists_agree():
    compared = agreement([], [])
    assert compared.agrees and (compared.images, compared.min_iou) == (0, 1)
