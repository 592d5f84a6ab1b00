"""The contract between the stages: everything that later stages must know about one detector.

Chapter 1 writes ``spec.json`` from the model's ``pipeline.config``, and every later stage reads it. Nothing
in it is typed by hand or guessed from node names. If odtrt does not know or support a setting, this is an
error that names the setting; there are no defaults.

These conventions hold everywhere in odtrt:

* A box is ``[ymin, xmin, ymax, xmax]``. Inside the graph it is normalised to the network input, or to the
  valid part of it (see ``NmsSpec.change_coordinate_frame``). For the user it is in pixels of the original
  image.
* A class is, for the user, the label map's id, which starts at 1. Inside the graph it is the 0-based column
  of the class scores without the background column: ``id = column + 1``.
* An image is, for the user, RGB, uint8, height x width x 3.
* An anchor is ``(ycenter, xcenter, height, width)``, normalised to the network input.

This module needs the standard library only. :func:`odtrt_lib.export.pipeline.read_pipeline` reads the config.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Dict, Iterator, List, Optional, Tuple, Type, Union

from odtrt_lib.errors import InputError, one_line

SCHEMA_VERSION = 2
MAX_SPEC_BYTES = 1 << 24
MAX_CLASSES = 2**16


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of the detector."""

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
        scales it so that its shorter side is ``min_dimension``. If the longer side would then exceed
        ``max_dimension``, it scales it so that the longer side is ``max_dimension``. With
        ``pad_to_max_dimension`` it then adds ``pad_value`` (per channel, in the units of the *normalised*
        image) at the bottom and at the right, up to a square.
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
    ``batch`` is the fixed batch size, or None if it is dynamic.
    """

    height: int
    width: int
    resizer: Resizer
    scale: Tuple[float, float, float]
    offset: Tuple[float, float, float]
    batch: Optional[int] = 1
    name: str = "image"


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
class SsdHeads:
    """The raw outputs of an SSD, both float32, and what decodes them.

    ``box_encodings`` is ``[batch, num_anchors, 4]``; ``class_logits`` is
    ``[batch, num_anchors, num_classes + 1]`` with the background in column 0 if ``background_column``,
    else ``[batch, num_anchors, num_classes]``.
    """

    family: ClassVar[str] = "ssd"

    num_anchors: int
    num_classes: int
    background_column: bool
    box_coder: BoxCoder
    scores: ScoreSpec
    box_encodings: str = "box_encodings"
    class_logits: str = "class_logits"

    @property
    def num_columns(self) -> int:
        """The number of columns of ``class_logits``, with that of the background if there is one."""
        return self.num_classes + int(self.background_column)

    def in_words(self) -> Dict[str, str]:
        """How the outputs are decoded, for people: name -> description."""
        return {
            "Scores": f"{self.scores.converter}, logit scale {self.scores.logit_scale:g}",
            "Background column": "yes" if self.background_column else "no",
        }

    def problems(self) -> Iterator[str]:
        """As :func:`problems`, for rules about several fields."""
        if self.num_anchors * self.num_columns > MAX_INT:
            yield f"num_anchors: {self.num_anchors}, expected less than 2^31 scores in all"


Heads = Union[SsdHeads]
"""The outputs of a network, of one of :data:`FAMILIES`.

Every family has ``num_classes``, ``num_anchors`` (0 if it has no ``anchors.npy``), ``in_words`` and
``problems``. Its other fields concern only the stages that know families: export, nms, the kernels and their
binding, fuse, and the tables in :mod:`odtrt_lib.tensors`.
"""

FAMILIES: Dict[str, Type[Heads]] = {kind.family: kind for kind in (SsdHeads,)}
"""``heads.family`` in ``spec.json`` -> the class of ``DetectorSpec.heads``."""


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
    """One detector. For the conventions see the module's docstring."""

    name: str
    source: Source
    input: InputSpec
    heads: Heads
    nms: NmsSpec
    labels: Tuple[Label, ...]

    def to_json(self) -> str:
        """The text of ``spec.json``; :func:`load_spec` is its inverse."""
        data = {"schema": SCHEMA_VERSION, **dataclasses.asdict(self)}
        data["heads"] = {"family": self.heads.family, **data["heads"]}
        return json.dumps(data, indent=2) + "\n"

    def label_names(self) -> Dict[int, str]:
        """Label map id -> name."""
        return {label.id: label.name for label in self.labels}


MAX_INT = 2**31 - 1
_MAX_FLOAT = 3.4028234663852886e38
_POSITIVE = (2.0**-126, _MAX_FLOAT)  # float32 numbers whose reciprocals are float32 numbers, too
_RANGES: Dict[str, Tuple[float, float]] = {
    "Resizer.min_dimension": (1, 2**24 - 1),
    "Resizer.max_dimension": (1, 2**24 - 1),
    "InputSpec.height": (1, 2**24 - 1),
    "InputSpec.width": (1, 2**24 - 1),
    "InputSpec.scale": _POSITIVE,
    "InputSpec.batch": (1, 2**16),
    "SsdHeads.num_anchors": (1, MAX_INT),
    "SsdHeads.num_classes": (1, MAX_CLASSES),
    "BoxCoder.y_scale": _POSITIVE,
    "BoxCoder.x_scale": _POSITIVE,
    "BoxCoder.height_scale": _POSITIVE,
    "BoxCoder.width_scale": _POSITIVE,
    "ScoreSpec.logit_scale": _POSITIVE,
    "NmsSpec.iou_threshold": (0, 1),
    "NmsSpec.max_detections_per_class": (1, MAX_INT),
    "NmsSpec.max_total_detections": (1, 2**20),  # 24 MiB an image
}
"""What the fields of a DetectorSpec may hold. Any other whole number is an int32, any other float finite."""

_CHOICES: Dict[str, Tuple[str, ...]] = {
    "Resizer.kind": ("fixed_shape", "keep_aspect_ratio"),
    "Resizer.method": ("bilinear",),
    "ScoreSpec.converter": ("sigmoid", "softmax", "identity"),
}


def problems(part: Any) -> Iterator[str]:
    """The wrong values of a DetectorSpec, or of one of its parts; none if it is valid.

    Each text names a field, its value and what was expected: ``nms.iou_threshold: 2.0, expected 0 to 1``.
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
    elif type(part) in FAMILIES.values():
        yield from part.problems()


def load_spec(path: Union[str, Path], content: Optional[bytes] = None) -> DetectorSpec:
    """Reads a ``spec.json``, also of schema 1. content: the bytes of the file, if they have been read
    already.

    Raises InputError, naming the file and the field, if the file is absent, too large, not JSON or of another
    schema version; if its family of heads is not in :data:`FAMILIES`; if a field is missing or unknown; or if
    a value has another type or is out of range.
    """
    path = Path(path)
    data = _read_json(path, content)
    schema = data.pop("schema", None) if isinstance(data, dict) else type(data).__name__
    if type(schema) is not int or schema not in (1, SCHEMA_VERSION):
        raise InputError(
            f"{path}: schema {_shown(schema)}, expected {SCHEMA_VERSION} (or 1, of older versions); run "
            "`odtrt export` again with the installed version of odtrt"
        )
    if schema == 1:
        data = _of_schema_1(data, f"{path}: spec")
    spec = _from_dict(DetectorSpec, data, f"{path}: spec")
    assert isinstance(spec, DetectorSpec)
    for problem in problems(spec):
        raise InputError(f"{path}: spec.{problem}; run `odtrt export` again")
    return spec


def sections_for_records(content: bytes) -> Dict[str, Any]:
    """The sections of a ``spec.json`` that records and passports hash.

    They are arranged as in schema 1, so that equal specs of both schemas have equal hashes. So the decoding
    of the heads is a section of its own, null in a family without it, and the family ``ssd`` is not named.

    Raises ValueError, KeyError, TypeError, AttributeError or RecursionError if this is no spec.json.
    """
    data = json.loads(content.decode("utf-8"))
    if data.get("schema") != SCHEMA_VERSION:
        return dict(data)
    heads = dict(data["heads"])
    decoding = {name: heads.pop(name, None) for name in _DECODING}
    if heads["family"] == SsdHeads.family:
        del heads["family"]
    return {**data, "heads": heads, **decoding}


_DECODING = ("box_coder", "scores")  # beside `heads` in schema 1


def _of_schema_1(data: Dict[str, Any], where: str) -> Dict[str, Any]:
    """Data of schema 1, in the layout of today's schema. In schema 1 all heads were an SSD's."""
    heads = _object(data.get("heads", {}), f"{where}.heads")
    for name in ("family", *_DECODING):
        if name in heads:
            raise InputError(f"{where}.heads.{name}: unknown field; run `odtrt export` again")
    decoding = {name: data[name] for name in _DECODING if name in data}
    others = {name: value for name, value in data.items() if name not in _DECODING}
    return {**others, "heads": {"family": SsdHeads.family, **heads, **decoding}}


def _expected_instead(name: str, value: Any) -> str:
    """What was expected in the field ``Class.field`` instead of ``value``; empty if the value is right."""
    if name in _CHOICES:
        return "" if value in _CHOICES[name] else " or ".join(_CHOICES[name])
    if isinstance(value, str):
        return "" if _is_unicode(value) else "text without half surrogate pairs"
    if value is None or isinstance(value, bool):
        return ""
    numbers = value if isinstance(value, tuple) else (value,)
    limit = _MAX_FLOAT if all(isinstance(number, float) for number in numbers) else MAX_INT
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
    if 3 * network.height * network.width * (network.batch or 1) > MAX_INT:
        yield f"{size}, expected less than 2^31 values in all"
    side = network.resizer.max_dimension
    if network.resizer.pad_to_max_dimension and not network.height == network.width == side:
        yield f"{size}, expected the square of resizer.max_dimension, {side}"


def _detector_problems(spec: DetectorSpec) -> Iterator[str]:
    heads = spec.heads
    if len(spec.labels) != heads.num_classes:
        yield f"labels: {len(spec.labels)}, expected one for each of heads.num_classes, {heads.num_classes}"
    for i, label in enumerate(spec.labels):
        if label.id != i + 1:
            yield f"labels[{i}].id: {_shown(label.id)}, expected {i + 1}, the place in the list"


_NESTED: Dict[str, type] = {
    kind.__name__: kind for kind in (Source, Resizer, InputSpec, BoxCoder, ScoreSpec, NmsSpec)
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
_MAX_DIGITS = 100  # more than any field needs; parsing a longer number takes time quadratic in its length
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


def _object(data: Any, where: str) -> Dict[str, Any]:
    if not isinstance(data, dict):
        raise InputError(f"{where}: {_shown(data)}, expected an object; run `odtrt export` again")
    return data


def _from_dict(kind: type, data: Any, where: str) -> Any:
    data = _object(data, where)
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    for name in sorted(set(data) ^ set(fields)):
        named = f"{where}.{name}" if name.isidentifier() else f"{where}: {_shown(name)}"
        raise InputError(
            f"{named}: {'missing' if name in fields else 'unknown'} field; run `odtrt export` again"
        )
    return kind(**{name: _value(fields[name], data[name], f"{where}.{name}") for name in fields})


def _value(annotation: str, value: Any, where: str) -> Any:
    """Converts a JSON value to a field of that annotation. :func:`problems` checks its range."""
    if annotation == "Heads":
        return _heads(value, where)
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


def _heads(value: Any, where: str) -> Any:
    """The heads of the family that ``value`` names."""
    others = dict(_object(value, where))
    if "family" not in others:
        raise InputError(f"{where}.family: missing field; run `odtrt export` again")
    family = others.pop("family")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{where}.family: {_shown(family)} is unknown, expected {' or '.join(FAMILIES)}; install the "
            "version of odtrt that wrote it, or run `odtrt export` again"
        )
    return _from_dict(FAMILIES[family], others, where)


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
