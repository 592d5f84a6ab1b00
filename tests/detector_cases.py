"""Model folders with made-up heads, and the detections that Python's Detector finds with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import spec_cases

from odtrt_lib.detector import Detections, Detector, host_backend
from odtrt_lib.folder import seal
from odtrt_lib.spec import DetectorSpec, InputSpec, NmsSpec, Resizer

NMS = NmsSpec(0.3, 0.5, 10, 20, False, True)
PADDED = spec_cases.padded(32)
RESIZERS = {
    "stretched": (24, 32, spec_cases.STRETCHED),
    "padded": (32, 32, PADDED),
    "keep_aspect_ratio": (24, 32, Resizer("keep_aspect_ratio", 24, 32)),
}
NUM_ANCHORS = 60


@dataclasses.dataclass(frozen=True)
class Case:
    """A model folder, and heads for it. The network adds the first number of its input to box_encodings, and
    the one in the middle to class_logits."""

    folder: Path
    spec: DetectorSpec
    anchors: np.ndarray
    box_encodings: np.ndarray
    class_logits: np.ndarray

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flat = batch.reshape(len(batch), 1, -1)
        return self.box_encodings + flat[..., :1], self.class_logits + flat[..., [flat.shape[2] // 2]]

    def detect(self, image: np.ndarray) -> Detections:
        """The detections of the oracle."""
        return Detector(
            self.spec, self.anchors, host_backend("made up", self.infer, self.spec, self.anchors)
        ).detect(image)


def spec_of(
    resizer: str, *, batch: int | None = 1, nms: NmsSpec = NMS, name: str = "made_up"
) -> DetectorSpec:
    height, width, kind = RESIZERS[resizer]
    network = InputSpec(height, width, kind, (0.011, 0.012, 0.013), (-1.0, 0.5, 0.25), batch=batch)
    labels = spec_cases.named("bolt", "nut", "Schraube ö")
    return spec_cases.example(spec_cases.ssd(NUM_ANCHORS, 3, True), nms, network, name=name, labels=labels)


def make_case(folder: Path, spec: DetectorSpec, seed: int = 0) -> Case:
    """Writes ``folder`` with spec.json, anchors.npy and the seal."""
    rng = np.random.default_rng(seed)
    anchors = rng.uniform(0.2, 0.8, (NUM_ANCHORS, 4)).astype(np.float32)
    encodings = rng.normal(0, 1, (NUM_ANCHORS, 4)).astype(np.float32)
    logits = rng.normal(-1, 2, (NUM_ANCHORS, spec.heads.num_columns)).astype(np.float32)
    folder.mkdir(parents=True)
    write_spec(folder, spec.to_json())
    np.save(folder / "anchors.npy", anchors)
    seal(folder)
    return Case(folder, spec, anchors, encodings, logits)


def write_spec(folder: Path, text: str | bytes) -> None:
    (folder / "spec.json").write_bytes(text.encode() if isinstance(text, str) else text)


def pictures(resizer: str) -> list[np.ndarray]:
    """RGB pictures that fit the network's input; also BGR and regions, which lie otherwise in memory."""
    rng = np.random.default_rng(1)
    sizes = [(48, 64), (24, 32), (240, 320)] + (
        [] if resizer == "keep_aspect_ratio" else [(37, 91), (90, 33)]
    )
    whole = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    large = rng.integers(0, 256, (100, 200, 3), np.uint8)
    return [*whole, large[10:58, 20:84], large[20:68, 9:73, ::-1], large[::2, ::2][:24, :32]]


def assert_same(found: Detections | None, expected: Detections) -> None:
    """The same bits, types and names."""
    assert found is not None
    for field in ("boxes", "scores", "class_ids"):
        one, other = getattr(found, field), getattr(expected, field)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), field
        assert one.tobytes() == other.tobytes(), field
    assert found.names == expected.names


Change = Callable[[str], str]


def swap(old: str, new: str) -> Change:
    def change(text: str) -> str:
        assert old in text, f"spec.json has no {old!r} to change"
        return text.replace(old, new, 1)

    return change


_SWAPS = [
    swap(*pair)
    for pair in (
        ('"schema": 2', '"schema": 3'),
        ('"schema": 2', '"schema": true'),
        ('"schema": 2', '"schema": 2.0'),
        ('"schema": 2,', ""),
        ('"height": 24', '"height": 0'),
        ('"height": 24', '"height": 24.0'),
        ('"height": 24', '"height": "24"'),
        ('"height": 24', '"height": 16777216'),
        ('"height": 24', '"height": 024'),
        ('"height": 24', '"height": 24, "height": 24'),
        ('"height": 24', '"height": 24, "depth": 3'),
        ('"kind": "fixed_shape"', '"kind": "any"'),
        ('"kind": "fixed_shape"', '"kind": "keep_aspect_ratio"'),
        ('"method": "bilinear"', '"method": "nearest"'),
        ('"min_dimension": null', '"min_dimension": 24'),
        ('"pad_to_max_dimension": false', '"pad_to_max_dimension": true'),
        ('"pad_to_max_dimension": false', '"pad_to_max_dimension": 0'),
        ("0.011,", "0.0,"),
        ("0.011,", "1e39,"),
        ("0.011,", "NaN,"),
        ("0.011,", "-0.011,"),
        ("0.011,", "0.011, 1.0,"),
        ("0.011,", ""),
        ("-1.0,", "-1,"),
        ("-1.0,", "-01.0,"),
        ("-1.0,", "-1.,"),
        ('"batch": 1', '"batch": null'),
        ('"batch": 1', '"batch": 65537'),
        ('"family": "ssd"', '"family": "centernet"'),
        ('"num_anchors": 60', '"num_anchors": 61'),
        ('"num_anchors": 60', '"num_anchors": 2147483647'),
        ('"num_classes": 3', '"num_classes": 2'),
        ('"background_column": true', '"background_column": 1'),
        ('"y_scale": 10.0', '"y_scale": 0'),
        ('"converter": "sigmoid"', '"converter": "tanh"'),
        ('"logit_scale": 1.0', '"logit_scale": 1e-39'),
        ('"logit_scale": 1.0', '"logit_scale": 1e0'),
        ('"iou_threshold": 0.5', '"iou_threshold": 1.5'),
        ('"iou_threshold": 0.5', '"iou_threshold": 1'),
        ('"max_detections_per_class": 10', '"max_detections_per_class": 0'),
        ('"max_total_detections": 20', '"max_total_detections": 4096'),
        ('"class_agnostic": false,', ""),
        ('"id": 2', '"id": 3'),
        ('"name": "bolt"', '"name": 5'),
        ('"name": "bolt"', '"name": "\\ud800"'),
        ('"name": "bolt"', '"name": "\\ud83d\\udd29"'),
        ('"name": "bolt"', '"name": "a\tb"'),
        ('"labels": [', '"labels": [,'),
        ("}\n", "} x\n"),
    )
]
SPEC_CHANGES: tuple[Change, ...] = (
    *_SWAPS,
    lambda text: text[:-3],
    lambda text: "[" * 100_000,
    lambda text: "",
)
