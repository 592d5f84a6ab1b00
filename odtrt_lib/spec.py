"""The contract between the stages: everything that later stages must know about one detector.

``spec.json`` is written by chapter 1 from the model's ``pipeline.config`` and read by every room after
it. Nothing in it is typed by hand or guessed from node names; a setting that odtrt does not know or does
not support is an error that names the setting, never a default.

Conventions, everywhere in odtrt:

* A box is ``[ymin, xmin, ymax, xmax]``. Inside the graph it is normalised to the network input (or to
  the valid part of it, see ``NmsSpec.change_coordinate_frame``); at the user's side it is in pixels of
  the original image.
* A class at the user's side is the label map's id, which starts at 1. Inside it is the 0-based column
  of the class scores without the background column: ``id = column + 1``.
* An image at the user's side is RGB, uint8, height x width x 3.
* An anchor is ``(ycenter, xcenter, height, width)``, normalised to the network input.

This module needs the standard library only, except :func:`read_pipeline`, which parses the config with
the OD API's protobuf modules.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

from odtrt_lib.errors import InputError, MissingDependencyError, UnsupportedError, one_line

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the detector comes from."""

    pipeline_sha256: str
    checkpoint: str
    checkpoint_sha256: str
    feature_extractor: str
    odapi_version: str
    tensorflow_version: str


@dataclasses.dataclass(frozen=True)
class Resizer:
    """How an image of any size becomes a network input (OD API: ``image_resizer``).

    kind: ``fixed_shape`` stretches the image to ``InputSpec.height`` x ``width``. ``keep_aspect_ratio``
        scales it so that its shorter side is ``min_dimension``, or, where the longer side would then
        exceed ``max_dimension``, so that the longer side is ``max_dimension``; with
        ``pad_to_max_dimension`` it is then filled up at the bottom and at the right to a square with
        ``pad_value`` (per channel, in the units of the *normalised* image).
    method: ``bilinear``: TensorFlow 1's ResizeBilinear, ``align_corners=False``,
        ``half_pixel_centers=False``: output pixel i samples the input at ``i * (in / out)``.
    """

    kind: str
    min_dimension: Optional[int] = None
    max_dimension: Optional[int] = None
    pad_to_max_dimension: bool = False
    pad_value: Tuple[float, float, float] = (0.0, 0.0, 0.0)
    method: str = "bilinear"


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """The network input: float32 ``[batch, 3, height, width]``, RGB.

    A pixel value p in 0..255 enters as ``p * scale[channel] + offset[channel]``.
    ``batch`` is the fixed batch size, or None where it is dynamic.
    """

    height: int
    width: int
    resizer: Resizer
    scale: Tuple[float, float, float]
    offset: Tuple[float, float, float]
    batch: Optional[int] = 1
    name: str = "image"


@dataclasses.dataclass(frozen=True)
class HeadsSpec:
    """The network's raw outputs, both float32.

    ``box_encodings`` is ``[batch, num_anchors, 4]``; ``class_logits`` is
    ``[batch, num_anchors, num_classes + 1]`` with the background in column 0 if ``background_column``,
    else ``[batch, num_anchors, num_classes]``.
    """

    num_anchors: int
    num_classes: int
    background_column: bool
    box_encodings: str = "box_encodings"
    class_logits: str = "class_logits"

    @property
    def num_columns(self) -> int:
        """Columns of ``class_logits``, the background included where there is one."""
        return self.num_classes + int(self.background_column)


@dataclasses.dataclass(frozen=True)
class BoxCoder:
    """OD API ``faster_rcnn_box_coder``: encodings ``(ty, tx, th, tw)`` are divided by these scales."""

    y_scale: float
    x_scale: float
    height_scale: float
    width_scale: float


@dataclasses.dataclass(frozen=True)
class ScoreSpec:
    """``converter``: ``sigmoid``, ``softmax`` or ``identity``, applied to ``logits / logit_scale``."""

    converter: str
    logit_scale: float


@dataclasses.dataclass(frozen=True)
class NmsSpec:
    """OD API ``batch_non_max_suppression`` (dynamic path). Both thresholds are strict (``>``)."""

    score_threshold: float
    iou_threshold: float
    max_detections_per_class: int
    max_total_detections: int
    class_agnostic: bool
    change_coordinate_frame: bool


@dataclasses.dataclass(frozen=True)
class Label:
    """One class: ``id`` as in the label map (1-based), ``name`` for people."""

    id: int
    name: str


@dataclasses.dataclass(frozen=True)
class DetectorSpec:
    """One detector. See the module's docstring for the conventions."""

    name: str
    source: Source
    input: InputSpec
    heads: HeadsSpec
    box_coder: BoxCoder
    scores: ScoreSpec
    nms: NmsSpec
    labels: Tuple[Label, ...]

    def to_json(self) -> str:
        """The text of ``spec.json``; :func:`load_spec` is its inverse."""
        return json.dumps({"schema": SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"

    def label_names(self) -> Dict[int, str]:
        """Label map id -> name."""
        return {label.id: label.name for label in self.labels}


@dataclasses.dataclass(frozen=True)
class PipelineSettings:
    """The settings of a pipeline.config that change a result, before the model itself was looked at.

    ``input_size`` is ``(height, width)``, or None where the resizer alone does not fix it.
    ``message`` is the parsed ``TrainEvalPipelineConfig`` and ``path`` where it was read.
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


def load_spec(path: Union[str, Path], content: Optional[bytes] = None) -> DetectorSpec:
    """Reads a ``spec.json``. content: the bytes of the file, where they were read already.

    Raises InputError, naming the file and the field, where the file is absent, not JSON, of another
    schema version, or has a missing or unknown field or a value of another type.
    """
    path = Path(path)
    try:
        data = json.loads((path.read_bytes() if content is None else content).decode("utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected the spec.json that `odtrt export` writes"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run `odtrt export` again") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA_VERSION:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(
            f"{path}: schema {found!r}, expected {SCHEMA_VERSION}; run `odtrt export` again "
            "with the installed version of odtrt"
        )
    spec = _from_dict(DetectorSpec, {k: v for k, v in data.items() if k != "schema"}, f"{path}: spec")
    assert isinstance(spec, DetectorSpec)
    return spec


def read_pipeline(path: Union[str, Path], label_map: Union[str, Path, None] = None) -> PipelineSettings:
    """Parses an OD API ``pipeline.config`` and checks that odtrt supports every setting that matters.

    label_map: a label map (``.pbtxt``, or a text file with one name a line); by default the file that
        the config names is looked for at that path, then by its name beside the config, then
        ``label_map.pbtxt`` beside it; where none is found classes are called ``class 1`` and so on.

    Raises InputError where the file is absent or not a pipeline.config, UnsupportedError, naming the
    setting, where the config asks for something else than an SSD (EfficientDet is one) with settings
    that odtrt reproduces exactly, MissingDependencyError without the OD API.
    """
    path = Path(path)
    message = _parse_pipeline(path)
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
    if num_classes < 1:
        raise InputError(f"{path}: model.ssd.num_classes is {ssd.num_classes}, expected at least 1 class")
    resizer, input_size = _read_resizer(path, ssd.image_resizer)
    coder = ssd.box_coder.faster_rcnn_box_coder
    post = ssd.post_processing
    nms = post.batch_non_max_suppression
    return PipelineSettings(
        path=path,
        message=message,
        feature_extractor=ssd.feature_extractor.type,
        resizer=resizer,
        input_size=input_size,
        num_classes=num_classes,
        background_column=background,
        box_coder=BoxCoder(coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale),
        scores=ScoreSpec(post.ScoreConverter.Name(post.score_converter).lower(), post.logit_scale),
        nms=NmsSpec(
            score_threshold=nms.score_threshold,
            iou_threshold=nms.iou_threshold,
            max_detections_per_class=nms.max_detections_per_class,
            max_total_detections=nms.max_total_detections,
            class_agnostic=nms.use_class_agnostic_nms,
            change_coordinate_frame=nms.change_coordinate_frame,
        ),
        labels=_read_labels(path, message, label_map, num_classes),
    )


def _parse_pipeline(path: Path) -> Any:
    try:
        from google.protobuf import text_format
        from object_detection.protos import pipeline_pb2
    except (ImportError, TypeError) as error:
        raise MissingDependencyError(
            f"the OD API's protobuf modules cannot be imported ({one_line(error)}): run `make install`"
        ) from error
    text = _read_text(path, "an OD API pipeline.config")
    message = pipeline_pb2.TrainEvalPipelineConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise InputError(
            f"{path}: not a valid pipeline.config ({one_line(error)}); expected the text-format "
            "TrainEvalPipelineConfig that lies beside the checkpoint"
        ) from error
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
        if resizer.height < 1 or resizer.width < 1:
            raise InputError(f"{where}: {resizer.height}x{resizer.width}, expected at least 1x1")
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


def _read_labels(
    path: Path, message: Any, label_map: Union[str, Path, None], num_classes: int
) -> Tuple[Label, ...]:
    found = _find_label_map(path, message, label_map)
    names = _parse_label_map(found) if found else {}
    if label_map is not None and max(names, default=0) > num_classes:
        raise InputError(
            f"{found}: names a class with id {max(names)}, but {path} has model.ssd.num_classes for "
            f"{num_classes} classes; use the label map that the model was trained with"
        )
    return tuple(Label(i, names.get(i, f"class {i}")) for i in range(1, num_classes + 1))


def _find_label_map(path: Path, message: Any, label_map: Union[str, Path, None]) -> Optional[Path]:
    if label_map is not None:
        return Path(label_map)
    readers = [message.train_input_reader, *message.eval_input_reader]
    for named in (reader.label_map_path for reader in readers):
        for candidate in (path.parent / named, path.parent / Path(named).name):
            if named and candidate.is_file():
                return candidate
    beside = path.parent / "label_map.pbtxt"
    return beside if beside.is_file() else None


def _parse_label_map(path: Path) -> Dict[int, str]:
    text = _read_text(path, "a label map")
    if not re.search(r"^\s*item\s*\{", text, re.MULTILINE):
        names = text.splitlines()
        background = 0 if names and names[0].strip() in ("???", "background") else 1
        return {i: name.strip() for i, name in enumerate(names, background) if i and name.strip()}
    from google.protobuf import text_format
    from object_detection.protos import string_int_label_map_pb2

    message = string_int_label_map_pb2.StringIntLabelMap()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise InputError(f"{path}: not a valid label map ({one_line(error)})") from error
    return {item.id: item.display_name or item.name for item in message.item if item.id > 0}


def _read_text(path: Path, expected: str) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a binary file; expected {expected}") from error
    if text.startswith("version https://git-lfs.github.com/spec/"):
        raise InputError(
            f"{path}: a Git LFS pointer, not the file itself; expected {expected}: run `git lfs pull` "
            "where it was cloned"
        )
    return text


_NESTED: Dict[str, type] = {
    kind.__name__: kind for kind in (Source, Resizer, InputSpec, HeadsSpec, BoxCoder, ScoreSpec, NmsSpec)
}


def _from_dict(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(f"{where}: {type(data).__name__}, expected an object; run `odtrt export` again")
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    for name in sorted(set(data) ^ set(fields)):
        problem = "unknown" if name in data else "missing"
        raise InputError(f"{where}.{name}: {problem} field; run `odtrt export` again")
    return kind(**{name: _value(fields[name], data[name], f"{where}.{name}") for name in fields})


def _value(annotation: str, value: Any, where: str) -> Any:
    if annotation in _NESTED:
        return _from_dict(_NESTED[annotation], value, where)
    if annotation == "Tuple[Label, ...]":
        if not isinstance(value, list):
            raise InputError(f"{where}: {type(value).__name__}, expected a list of labels")
        return tuple(_from_dict(Label, item, f"{where}[{i}]") for i, item in enumerate(value))
    if annotation == "Tuple[float, float, float]":
        if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
            raise InputError(f"{where}: {value!r}, expected 3 numbers")
        return tuple(float(number) for number in value)
    is_right = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "Optional[int]": value is None or (isinstance(value, int) and not isinstance(value, bool)),
        "float": _is_number(value),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
    }[annotation]
    if not is_right:
        raise InputError(f"{where}: {value!r}, expected {annotation}")
    return float(value) if annotation == "float" else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
