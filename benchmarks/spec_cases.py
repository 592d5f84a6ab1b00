"""Specs of detectors that no checkpoint made, for tests and benchmarks. Needs odtrt_lib alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from odtrt_lib.export.pipeline import PipelineSettings

SSD_CODER, EFFICIENTDET_CODER = BoxCoder(10.0, 10.0, 5.0, 5.0), BoxCoder(1.0, 1.0, 1.0, 1.0)
SIGMOID = ScoreSpec("sigmoid", 1.0)
STRETCHED = Resizer("fixed_shape")


def padded(side: int) -> Resizer:
    """The picture keeps its aspect ratio on a square of ``side`` pixels."""
    return Resizer("keep_aspect_ratio", side, side, pad_to_max_dimension=True)


def network_input(
    height: int,
    width: int,
    resizer: Resizer = STRETCHED,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    batch: int | None = 1,
) -> InputSpec:
    return InputSpec(height, width, resizer, (scale,) * 3, (offset,) * 3, batch=batch)


def ssd(
    anchors: int,
    classes: int,
    background: bool = False,
    *,
    coder: BoxCoder = SSD_CODER,
    scores: ScoreSpec = SIGMOID,
) -> SsdHeads:
    return SsdHeads(anchors, classes, background, coder, scores)


def ssd_of(settings: PipelineSettings, anchors: int) -> SsdHeads:
    """The heads that a pipeline.config describes, for ``anchors`` anchors."""
    return SsdHeads(
        anchors, settings.num_classes, settings.background_column, settings.box_coder, settings.scores
    )


def named(*names: str) -> tuple[Label, ...]:
    """Labels with the ids 1, 2, 3, …"""
    return tuple(Label(i, name) for i, name in enumerate(names, 1))


def example(
    heads: SsdHeads,
    nms: NmsSpec,
    image: InputSpec | None = None,
    *,
    name: str = "example",
    labels: Sequence[Label] | None = None,
) -> DetectorSpec:
    """A detector of these parts. image: 64 x 64 pixels if not given; labels: else the classes' numbers."""
    if labels is None:
        labels = named(*(str(i + 1) for i in range(heads.num_classes)))
    return DetectorSpec(
        name=name,
        source=Source("0" * 64, "ckpt-0", "1" * 64, "ssd_mobilenet_v2_keras", "2.8.0", "2.20.0"),
        input=image or network_input(64, 64),
        heads=heads,
        nms=nms,
        labels=tuple(labels),
    )


SPEC = example(
    ssd(5, 2, True),
    NmsSpec(0.25, 0.6000000238418579, 4, 8, False, True),
    network_input(8, 8, padded(8), scale=0.0078125, offset=-1.0),
    name="small",
    labels=named("bolt", "nut"),
)
"""A small detector, to write and to damage."""
