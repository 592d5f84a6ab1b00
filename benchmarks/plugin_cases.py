"""Writes cases for the driver of the TensorRT plugin (plugins/tensorrt/drive): inputs, expected detections.

PYTHONPATH=. python benchmarks/plugin_cases.py FOLDER

One file a case, ``FOLDER/<name>.case``: the attributes of ``OdtrtDetect``, the anchors, and several sets of
random heads, each with the bits that the numpy reference (:func:`odtrt_lib.nms.postprocess_reference`) gives.
``FOLDER/short/<name>.case`` has one set only, for tools under which a call takes ten seconds.
Little-endian, in the order that drive.cpp's ``read_case`` reads. Needs numpy only.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from pathlib import Path

import numpy as np
import spec_cases

from odtrt_lib import fuse, nms
from odtrt_lib.spec import DetectorSpec, NmsSpec, Resizer, ScoreSpec, SsdHeads
from odtrt_lib.tensors import DETECTIONS, has_clip_windows

SETS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings, and what random heads are like: logits of a mean and a spread, float32 or float16."""

    name: str
    batch: int
    heads: SsdHeads
    nms: NmsSpec
    resizer: Resizer
    logit_mean: float
    dtype: type

    @property
    def spec(self) -> DetectorSpec:
        """The detector that has these settings."""
        image = spec_cases.network_input(512, 512, self.resizer, batch=self.batch)
        return spec_cases.example(self.heads, self.nms, image, name=self.name, labels=())


CASES = (
    Case(
        "ssd",
        1,
        spec_cases.ssd(1917, 90, True),
        NmsSpec(0.3, 0.6, 100, 100, False, True),
        spec_cases.STRETCHED,
        -6.0,
        np.float32,
    ),
    Case(
        "padded_half",
        3,
        spec_cases.ssd(4910, 90, coder=spec_cases.EFFICIENTDET_CODER),
        NmsSpec(1e-8, 0.5, 100, 100, False, True),
        spec_cases.padded(512),
        -5.0,
        np.float16,
    ),
    Case(
        "softmax_capped",
        2,
        spec_cases.ssd(1001, 7, True, scores=ScoreSpec("softmax", 2.0)),
        NmsSpec(0.05, 0.4, 3, 50, False, False),
        spec_cases.padded(512),
        0.0,
        np.float32,
    ),
    Case(
        "agnostic",
        8,
        spec_cases.ssd(333, 3),
        NmsSpec(0.01, 0.5, 10, 20, True, True),
        spec_cases.STRETCHED,
        -2.0,
        np.float16,
    ),
)


def write_case(path: Path, case: Case, seed: int = 0, sets: int = SETS) -> None:
    """Writes one case with so many sets of heads; see the module."""
    rng = np.random.default_rng(seed)
    spec, heads = case.spec, case.heads
    has_windows = has_clip_windows(spec)
    attributes = fuse.plugin_attributes(spec)
    anchors = np.concatenate(
        [rng.uniform(0, 1, (heads.num_anchors, 2)), rng.uniform(0.05, 0.4, (heads.num_anchors, 2))], axis=1
    ).astype(np.float32)
    parts = [
        b"ODTRTC01",
        struct.pack("<4i", sets, case.batch, heads.num_anchors, heads.num_columns),
        struct.pack("<2i", case.dtype is np.float16, has_windows),
        struct.pack(
            "<ii f 4f ff iiii",
            attributes["background_column"],
            attributes["score_converter"],
            attributes["logit_factor"],
            *attributes["box_scales"],
            attributes["score_threshold"],
            attributes["iou_threshold"],
            attributes["max_detections_per_class"],
            attributes["max_total_detections"],
            attributes["class_agnostic"],
            attributes["change_coordinate_frame"],
        ),
        anchors.tobytes(),
    ]
    for number in range(sets):
        encodings = rng.normal(0, 1, (case.batch, heads.num_anchors, 4)).astype(case.dtype)
        logits = rng.normal(case.logit_mean - number, 2, (case.batch, heads.num_anchors, heads.num_columns))
        logits = logits.astype(case.dtype)
        windows = np.tile(np.float32([0, 0, 1, 1]), (case.batch, 1))
        if has_windows:
            windows[:, 2] = rng.uniform(0.4, 1, case.batch)
        expected = nms.postprocess_reference(encodings, logits, anchors, spec, windows)
        parts += [encodings.tobytes(), logits.tobytes()]
        parts += [windows.tobytes()] if has_windows else []
        parts += [getattr(expected, name).tobytes() for name in DETECTIONS]
    path.write_bytes(b"".join(parts))


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/plugin_cases.py FOLDER")
    folder = Path(sys.argv[1])
    (folder / "short").mkdir(parents=True, exist_ok=True)
    for seed, case in enumerate(CASES):
        write_case(folder / f"{case.name}.case", case, seed)
        write_case(folder / "short" / f"{case.name}.case", case, seed, sets=1)
        print(folder / f"{case.name}.case")


if __name__ == "__main__":
    main()
