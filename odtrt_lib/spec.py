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
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from odtrt_lib.errors import InputError, UnsupportedError, one_line

SCHEMA_VERSION = 1
MAX_SPEC_BYTES = 1 << 24


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
    ``message`` is the parsed ``TrainEvalPipelineConfig`` and ``path`` where it was read. ``label_map`` is the
    file that ``labels`` come from, None where none was found; ``label_map_note`` then says which was passed
    over, and why, or nothing.
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


_MAX_INT = 2**31 - 1
_MAX_FLOAT = 3.4028234663852886e38
_POSITIVE = (2.0**-126, _MAX_FLOAT)  # float32, and so is the reciprocal
_RANGES: Dict[str, Tuple[float, float]] = {
    "Resizer.min_dimension": (1, 2**24 - 1),
    "Resizer.max_dimension": (1, 2**24 - 1),
    "InputSpec.height": (1, 2**24 - 1),
    "InputSpec.width": (1, 2**24 - 1),
    "InputSpec.scale": _POSITIVE,
    "InputSpec.batch": (1, 2**16),
    "HeadsSpec.num_anchors": (1, _MAX_INT),
    "HeadsSpec.num_classes": (1, 2**16),
    "BoxCoder.y_scale": _POSITIVE,
    "BoxCoder.x_scale": _POSITIVE,
    "BoxCoder.height_scale": _POSITIVE,
    "BoxCoder.width_scale": _POSITIVE,
    "ScoreSpec.logit_scale": _POSITIVE,
    "NmsSpec.iou_threshold": (0, 1),
    "NmsSpec.max_detections_per_class": (1, _MAX_INT),
    "NmsSpec.max_total_detections": (1, 2**20),  # 24 MiB an image
}
"""What the fields of a DetectorSpec may hold. Any other whole number is an int32, any other float finite."""

_CHOICES: Dict[str, Tuple[str, ...]] = {
    "Resizer.kind": ("fixed_shape", "keep_aspect_ratio"),
    "Resizer.method": ("bilinear",),
    "ScoreSpec.converter": ("sigmoid", "softmax", "identity"),
}


def problems(part: Any) -> Iterator[str]:
    """What is wrong with the values of a DetectorSpec, or of one of its parts; nothing where it is valid.

    Each names a field, its value and what was expected: ``nms.iou_threshold: 2.0, expected 0 to 1``.
    """
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from (f"{field.name}.{problem}" for problem in problems(value))
        elif field.name == "labels":
            for i, label in enumerate(value):
                yield from (f"labels[{i}].{problem}" for problem in problems(label))
        else:
            expected = _expected_instead(f"{type(part).__name__}.{field.name}", value)
            if expected:
                yield f"{field.name}: {_shown(value)}, expected {expected}"
    if isinstance(part, Resizer):
        yield from _resizer_problems(part)
    elif isinstance(part, InputSpec):
        yield from _input_problems(part)
    elif isinstance(part, DetectorSpec):
        yield from _detector_problems(part)


def load_spec(path: Union[str, Path], content: Optional[bytes] = None) -> DetectorSpec:
    """Reads a ``spec.json``. content: the bytes of the file, where they were read already.

    Raises InputError, naming the file and the field, where the file is absent, too large, not JSON, of
    another schema version, or has a missing or unknown field, a value of another type or out of its range.
    """
    path = Path(path)
    data = _read_json(path, content)
    schema = data.pop("schema", None) if isinstance(data, dict) else type(data).__name__
    if type(schema) is not int or schema != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema {_shown(schema)}, expected {SCHEMA_VERSION}; run `odtrt export` again "
            "with the installed version of odtrt"
        )
    spec = _from_dict(DetectorSpec, data, f"{path}: spec")
    assert isinstance(spec, DetectorSpec)
    for problem in problems(spec):
        raise InputError(f"{path}: spec.{problem}; run `odtrt export` again")
    return spec


def read_pipeline(path: Union[str, Path], label_map: Union[str, Path, None] = None) -> PipelineSettings:
    """Parses an OD API ``pipeline.config`` and checks that odtrt supports every setting that matters.

    label_map: a label map (see :mod:`odtrt_lib.label_map`); by default the file that the config names is
        looked for at that path, then by its name beside the config, then ``label_map.pbtxt`` beside it, all
        in the config's folder; where none is found classes are called ``class 1`` and so on.

    Raises InputError where the file is absent or not a pipeline.config, where a setting is out of its range,
    and where the label map is not one of these classes; UnsupportedError, naming the setting, where the
    config asks for something else than an SSD (EfficientDet is one) with settings that odtrt reproduces
    exactly; MissingDependencyError without the OD API.
    """
    from odtrt_lib import label_map as label_maps

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
    most = int(_RANGES["HeadsSpec.num_classes"][1])
    if not 1 <= num_classes <= most:
        raise InputError(f"{path}: model.ssd.num_classes is {ssd.num_classes}, expected 1 to {most} classes")
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

    Raises InputError where the file is absent or no such file, MissingDependencyError without the OD API.
    """
    from odtrt_lib import prototext

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
        if min(resizer.height, resizer.width) < 1 or 3 * resizer.height * resizer.width > _MAX_INT:
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


def _expected_instead(name: str, value: Any) -> str:
    """What the field ``Class.field`` should hold instead of ``value``; nothing where that is right."""
    if name in _CHOICES:
        return "" if value in _CHOICES[name] else " or ".join(_CHOICES[name])
    if isinstance(value, str):
        return "" if _is_unicode(value) else "text without half surrogate pairs"
    if value is None or isinstance(value, bool):
        return ""
    numbers = value if isinstance(value, tuple) else (value,)
    limit = _MAX_FLOAT if all(isinstance(number, float) for number in numbers) else _MAX_INT
    low, high = _RANGES.get(name, (-limit, limit))
    if all(low <= number <= high for number in numbers):
        return ""
    if high == _MAX_FLOAT:
        return f"a {'positive, ' if low > 0 else ''}finite float32"
    return f"{low} to {high}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _resizer_problems(resizer: Resizer) -> Iterator[str]:
    if resizer.kind == "fixed_shape" and resizer != Resizer("fixed_shape", method=resizer.method):
        yield "kind: 'fixed_shape', expected no min_dimension, max_dimension or padding with it"
    low, high = resizer.min_dimension, resizer.max_dimension
    if resizer.kind == "keep_aspect_ratio" and (low is None or high is None or low > high):
        yield f"min_dimension {low}, max_dimension {high}, expected 1 <= min_dimension <= max_dimension"


def _input_problems(network: InputSpec) -> Iterator[str]:
    size = f"height, width, batch: {network.height}, {network.width}, {network.batch}"
    if 3 * network.height * network.width * (network.batch or 1) > _MAX_INT:
        yield f"{size}, expected less than 2^31 values in all"
    side = network.resizer.max_dimension
    if network.resizer.pad_to_max_dimension and not network.height == network.width == side:
        yield f"{size}, expected the square of resizer.max_dimension, {side}"


def _detector_problems(spec: DetectorSpec) -> Iterator[str]:
    heads = spec.heads
    if heads.num_anchors * heads.num_columns > _MAX_INT:
        yield f"heads.num_anchors: {heads.num_anchors}, expected less than 2^31 scores in all"
    if len(spec.labels) != heads.num_classes:
        yield f"labels: {len(spec.labels)}, expected one for each of heads.num_classes, {heads.num_classes}"
    for i, label in enumerate(spec.labels):
        if label.id != i + 1:
            yield f"labels[{i}].id: {_shown(label.id)}, expected {i + 1}, the place in the list"


_NESTED: Dict[str, type] = {
    kind.__name__: kind for kind in (Source, Resizer, InputSpec, HeadsSpec, BoxCoder, ScoreSpec, NmsSpec)
}
_JSON_TYPES: Dict[str, Tuple[type, str]] = {
    "int": (int, "a whole number"),
    "Optional[int]": (int, "a whole number or null"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
    "Tuple[float, float, float]": (tuple, "3 numbers"),
    "Tuple[Label, ...]": (tuple, "a list of labels"),
}
_MAX_DIGITS = 100  # more than any field can hold; a longer number takes time quadratic in its length
_MAX_SHOWN = 60


def _read_json(path: Path, content: Optional[bytes]) -> Any:
    try:
        if content is None:
            with path.open("rb") as file:
                content = file.read(MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected the spec.json that `odtrt export` writes"
        ) from error
    if len(content) > MAX_SPEC_BYTES:
        raise InputError(f"{path}: larger than {MAX_SPEC_BYTES >> 20} MiB; run `odtrt export` again")
    try:
        return json.loads(
            content.decode("utf-8"),
            parse_int=lambda digits: int(digits[:_MAX_DIGITS]),
            object_pairs_hook=_object_without_repetition,
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({one_line(error)}); run `odtrt export` again") from error


def _object_without_repetition(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice in one object")
    return found


def _from_dict(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(f"{where}: {_shown(data)}, expected an object; run `odtrt export` again")
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    for name in sorted(set(data) ^ set(fields)):
        named = f"{where}.{name}" if name.isidentifier() else f"{where}: {_shown(name)}"
        raise InputError(
            f"{named}: {'missing' if name in fields else 'unknown'} field; run `odtrt export` again"
        )
    return kind(**{name: _value(fields[name], data[name], f"{where}.{name}") for name in fields})


def _value(annotation: str, value: Any, where: str) -> Any:
    """A JSON value as a field of that annotation; :func:`problems` judges its range."""
    if annotation in _NESTED:
        return _from_dict(_NESTED[annotation], value, where)
    if annotation == "Tuple[Label, ...]" and isinstance(value, list):
        return tuple(_from_dict(Label, item, f"{where}[{i}]") for i, item in enumerate(value))
    if annotation == "Tuple[float, float, float]" and isinstance(value, list) and len(value) == 3:
        return tuple(_value("float", number, f"{where}[{i}]") for i, number in enumerate(value))
    if annotation == "Optional[int]" and value is None:
        return None
    if annotation == "float" and type(value) is int and abs(value) <= _MAX_FLOAT:
        return float(value)
    expected, in_words = _JSON_TYPES[annotation]
    if type(value) is not expected:
        raise InputError(f"{where}: {_shown(value)}, expected {in_words}; run `odtrt export` again")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
