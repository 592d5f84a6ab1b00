"""Reads an OD API ``pipeline.config``, and checks the settings that ``spec.json`` takes from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Optional, Tuple, Union

from odtrt_lib.errors import InputError, UnsupportedError
from odtrt_lib.export import label_map as label_maps
from odtrt_lib.export import prototext
from odtrt_lib.spec import MAX_CLASSES, MAX_INT, BoxCoder, Label, NmsSpec, Resizer, ScoreSpec, problems


@dataclasses.dataclass(frozen=True)
class PipelineSettings:
    """The settings of a pipeline.config that change a result. They come from the config alone.

    ``input_size`` is ``(height, width)``, or None if the resizer alone does not determine it. ``message`` is
    the parsed ``TrainEvalPipelineConfig``, and ``path`` its file. ``label_map`` is the file from which
    ``labels`` come, None if none was found; ``label_map_note`` then names a file that was passed over, with
    the reason, or is empty.
    """

    path: Path
    message: Any
    feature_extractor: str
    resizer: Resizer
    input_size: Optional[Tuple[int, int]]
    num_classes: int
    background_column: bool
    box_coder: BoxCoder
    scores: ScoreSpec
    nms: NmsSpec
    labels: Tuple[Label, ...]
    label_map: Optional[Path] = None
    label_map_note: str = ""


def read_pipeline(path: Union[str, Path], label_map: Union[str, Path, None] = None) -> PipelineSettings:
    """Parses an OD API ``pipeline.config`` and checks that odtrt supports every setting that matters.

    label_map: a label map (see :mod:`odtrt_lib.export.label_map`). By default the file that the config names
        is looked for at that path, then by its name beside the config, then ``label_map.pbtxt`` beside it,
        all in the config's folder. If none is found, classes are called ``class 1`` and so on.

    Raises InputError if the file is absent or not a pipeline.config, if a setting is out of its range, and if
    the label map is not for these classes; UnsupportedError, naming the setting, if the config is not that of
    an SSD (EfficientDet is one) or has a setting that odtrt cannot reproduce exactly; MissingDependencyError
    without the OD API.
    """
    path = Path(path)
    message = parse_pipeline(path)
    architecture = message.model.WhichOneof("model")
    if architecture != "ssd":
        raise UnsupportedError(
            f"{path}: model.{architecture or '(empty)'} is not supported; odtrt converts model.ssd "
            "(all SSD and EfficientDet configs)"
        )
    ssd = message.model.ssd
    _refuse_unsupported(path, ssd)
    background = bool(ssd.add_background_class or ssd.explicit_background_class)
    num_columns = ssd.num_classes + int(ssd.add_background_class)
    num_classes = num_columns - int(background)
    if not 1 <= num_classes <= MAX_CLASSES:
        raise InputError(
            f"{path}: model.ssd.num_classes is {ssd.num_classes}, expected 1 to {MAX_CLASSES} classes"
        )
    resizer, input_size = _read_resizer(path, ssd.image_resizer)
    for problem in problems(resizer):
        raise InputError(f"{path}: model.ssd.image_resizer: {problem}; correct the config")
    box_coder, scores, nms = _read_postprocessing(path, ssd)
    readers = [message.train_input_reader, *message.eval_input_reader]
    found, note = (
        (Path(label_map), "")
        if label_map is not None
        else label_maps.find(path, [reader.label_map_path for reader in readers])
    )
    names = label_maps.read(found, num_classes) if found else {}
    return PipelineSettings(
        path=path,
        message=message,
        feature_extractor=ssd.feature_extractor.type,
        resizer=resizer,
        input_size=input_size,
        num_classes=num_classes,
        background_column=background,
        box_coder=box_coder,
        scores=scores,
        nms=nms,
        labels=tuple(Label(i, names.get(i, f"class {i}")) for i in range(1, num_classes + 1)),
        label_map=found,
        label_map_note=note,
    )


def parse_pipeline(path: Path) -> Any:
    """The ``TrainEvalPipelineConfig`` of a pipeline.config, as the OD API reads it.

    Raises InputError if the file is absent or no pipeline.config, MissingDependencyError without the OD API.
    """
    message = prototext.messages("pipeline_pb2").TrainEvalPipelineConfig()
    problem = prototext.merge(prototext.read_text(path, "an OD API pipeline.config"), message)
    if problem:
        raise InputError(
            f"{path}: not a valid pipeline.config ({problem}); expected the text-format "
            "TrainEvalPipelineConfig that lies beside the checkpoint"
        )
    if not message.HasField("model"):
        raise InputError(f"{path}: has no `model` section; expected an OD API pipeline.config")
    return message


def _refuse_unsupported(path: Path, ssd: Any) -> None:
    post = ssd.post_processing
    nms = post.batch_non_max_suppression
    anchors = ssd.anchor_generator.WhichOneof("anchor_generator_oneof")
    coder = ssd.box_coder.WhichOneof("box_coder_oneof")
    predictor = ssd.box_predictor.WhichOneof("box_predictor_oneof")
    refused = {
        "feature_extractor.replace_preprocessor_with_placeholder: true": (
            ssd.feature_extractor.replace_preprocessor_with_placeholder
        ),
        f"box_coder.{coder}": coder != "faster_rcnn_box_coder",
        f"box_predictor.{predictor}": predictor
        not in ("convolutional_box_predictor", "weight_shared_convolutional_box_predictor"),
        f"anchor_generator: {anchors}": anchors is None,
        "mask_head_config": ssd.HasField("mask_head_config"),
        "post_processing.calibration_config": post.HasField("calibration_config"),
        f"post_processing.logit_scale: {post.logit_scale}": not post.logit_scale > 0,
        f"batch_non_max_suppression.soft_nms_sigma: {nms.soft_nms_sigma}": nms.soft_nms_sigma != 0,
        "batch_non_max_suppression.use_combined_nms: true": nms.use_combined_nms,
        "batch_non_max_suppression.use_partitioned_nms: true": nms.use_partitioned_nms,
        "batch_non_max_suppression.use_static_shapes: true": nms.use_static_shapes,
        f"batch_non_max_suppression.max_classes_per_detection: {nms.max_classes_per_detection}": (
            nms.use_class_agnostic_nms and nms.max_classes_per_detection != 1
        ),
    }
    for setting, is_refused in refused.items():
        if is_refused:
            raise UnsupportedError(
                f"{path}: model.ssd.{setting} is not supported, because its result would differ from "
                "TensorFlow's; change the setting and check the accuracy before converting"
            )


def _read_postprocessing(path: Path, ssd: Any) -> Tuple[BoxCoder, ScoreSpec, NmsSpec]:
    coder, post = ssd.box_coder.faster_rcnn_box_coder, ssd.post_processing
    nms = post.batch_non_max_suppression
    converter = post.ScoreConverter.Name(post.score_converter).lower()
    parts = {
        "box_coder.faster_rcnn_box_coder": BoxCoder(
            coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale
        ),
        "post_processing": ScoreSpec(converter, post.logit_scale),
        "post_processing.batch_non_max_suppression": NmsSpec(
            score_threshold=nms.score_threshold,
            iou_threshold=nms.iou_threshold,
            max_detections_per_class=nms.max_detections_per_class,
            max_total_detections=nms.max_total_detections,
            class_agnostic=nms.use_class_agnostic_nms,
            change_coordinate_frame=nms.change_coordinate_frame,
        ),
    }
    for name, part in parts.items():
        for problem in problems(part):
            raise InputError(f"{path}: model.ssd.{name}.{problem}; correct the config")
    box_coder, scores, suppression = parts.values()
    return box_coder, scores, suppression  # type: ignore[return-value]


def _read_resizer(path: Path, config: Any) -> Tuple[Resizer, Optional[Tuple[int, int]]]:
    kind = config.WhichOneof("image_resizer_oneof")
    where = f"{path}: model.ssd.image_resizer.{kind or '(empty)'}"
    if kind not in ("fixed_shape_resizer", "keep_aspect_ratio_resizer"):
        raise UnsupportedError(
            f"{where} is not supported; expected fixed_shape_resizer or keep_aspect_ratio_resizer"
        )
    resizer = getattr(config, kind)
    method = resizer.DESCRIPTOR.fields_by_name["resize_method"].enum_type.values_by_number[
        resizer.resize_method
    ]
    if method.name != "BILINEAR":
        raise UnsupportedError(f"{where}.resize_method: {method.name} is not supported; expected BILINEAR")
    if resizer.convert_to_grayscale:
        raise UnsupportedError(f"{where}.convert_to_grayscale: true is not supported")
    if kind == "fixed_shape_resizer":
        if min(resizer.height, resizer.width) < 1 or 3 * resizer.height * resizer.width > MAX_INT:
            raise InputError(
                f"{where}: {resizer.height}x{resizer.width}, expected at least 1x1 and less than 2^31 values"
            )
        return Resizer(kind="fixed_shape"), (resizer.height, resizer.width)
    if not 0 < resizer.min_dimension <= resizer.max_dimension:
        raise InputError(
            f"{where}: min_dimension {resizer.min_dimension}, max_dimension {resizer.max_dimension}; "
            "expected 0 < min_dimension <= max_dimension"
        )
    padding = tuple(resizer.per_channel_pad_value) or (0.0, 0.0, 0.0)
    if len(padding) != 3:
        raise InputError(f"{where}.per_channel_pad_value has {len(padding)} values, expected 3")
    side = resizer.max_dimension
    return (
        Resizer(
            kind="keep_aspect_ratio",
            min_dimension=resizer.min_dimension,
            max_dimension=resizer.max_dimension,
            pad_to_max_dimension=resizer.pad_to_max_dimension,
            pad_value=padding,
        ),
        (side, side) if resizer.pad_to_max_dimension else None,
    )
