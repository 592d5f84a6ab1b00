"""A DetectorSpec of a small detector, to write and to damage."""

from __future__ import annotations

from odtrt_lib.spec import (
    BoxCoder,
    DetectorSpec,
    InputSpec,
    Label,
    NmsSpec,
    Resizer,
    ScoreSpec,
    Source,
    SsdHeads,
)

SPEC = DetectorSpec(
    name="small",
    source=Source("0" * 64, "ckpt-0", "1" * 64, "ssd_mobilenet_v2_keras", "2.8.0", "2.20.0"),
    input=InputSpec(8, 8, Resizer("keep_aspect_ratio", 8, 8, True), (0.0078125,) * 3, (-1.0,) * 3),
    heads=SsdHeads(5, 2, True, BoxCoder(10.0, 10.0, 5.0, 5.0), ScoreSpec("sigmoid", 1.0)),
    nms=NmsSpec(0.25, 0.6000000238418579, 4, 8, False, True),
    labels=(Label(1, "bolt"), Label(2, "nut")),
)
