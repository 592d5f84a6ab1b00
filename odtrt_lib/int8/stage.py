"""Stage 6: ``heads.onnx`` and calibration pictures -> ``heads_int8.onnx``.

It also writes ``int8/calibration.json``: the range of each tensor, and what they were measured on.
``odtrt build --precision int8`` builds a plan from it; ONNX Runtime runs it too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from odtrt_lib import folder as folders
from odtrt_lib import onnx_model
from odtrt_lib.errors import InputError, one_line
from odtrt_lib.int8 import calibrate, drift, qdq, sensitivity
from odtrt_lib.preprocess import load_image, preprocess
from odtrt_lib.sources import PICTURE_SUFFIXES
from odtrt_lib.spec import DetectorSpec, InputSpec, load_spec
from odtrt_lib.variants import Variant

if TYPE_CHECKING:
    import onnx

MODEL = Variant("int8", "heads")
CALIBRATION = "int8/calibration.json"
FEWEST_IMAGES = 8
FROZEN = "frozen.pb"

Picture = Union[str, Path, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """ranges: tensor -> amax, the absolute value that becomes code 127. images: how many were used.
    drift: how far they are from the training pictures (:func:`odtrt_lib.int8.drift.measured`); None if that
    is not known."""

    rule: str
    ranges: Mapping[str, float]
    images: int
    drift: Optional[float]


def quantise(
    folder: Union[str, Path],
    images: Sequence[Picture] = (),
    *,
    rule: str = "mse",
    in_float: Sequence[str] = (),
    ranges: Optional[Path] = None,
    min_box_sqnr_db: Optional[float] = None,
    force: bool = False,
) -> folders.StageResult:
    """Writes ``heads_int8.onnx``: every convolution in INT8 but those named in ``in_float``.

    images: pictures as the detector will see them, as files or as uint8 ``[height, width, 3]``, RGB; 64 of
    them suffice, fewer than FEWEST_IMAGES are refused. rule: a key of :data:`calibrate.RULES`. ranges: a file
    that has the ranges already, for which no images are needed (:func:`read_ranges`). min_box_sqnr_db: more
    convolutions stay in floating point, those first that disturb the boxes most according to
    ``int8/sensitivity.json``, until the boxes' predicted signal over noise is that many decibels; the record
    also has it as measured on the images. force: write even if the file is up to date. The same inputs give
    the same bytes on one machine. The result's note warns of pictures that are far from training's.

    Raises InputError if a file of the model is missing or damaged, if it is quantised already, for too few or
    unreadable pictures, one that has one colour only, and a tensor that is not finite or always 0 on them;
    MissingDependencyError without onnx or ONNX Runtime; CheckError if the ONNX checker refuses the result.
    Nothing is written then.
    """
    folder = Path(folder)
    files = folders.sealed(folder, "heads.onnx", "spec.json")
    spec = load_spec(folder / "spec.json", files["spec.json"])
    model = onnx_model.load(folder / "heads.onnx", files["heads.onnx"], "quantise")
    target: Dict[str, Any] = {}
    if min_box_sqnr_db is not None:
        in_float, target = _quiet_enough(folder, files["heads.onnx"], min_box_sqnr_db, in_float)
    where = qdq.placement(model, in_float)
    pictures = calibration_pictures(images, fewest=FEWEST_IMAGES if ranges is None else 0)
    given = None if ranges is None else read_ranges(ranges, where)
    settings: Dict[str, Any] = {
        "rule": rule,
        "in_float": sorted(in_float),
        "images": digest(pictures),
        "ranges": given,
    }
    settings = {**settings, **target}
    stage = folders.Stage(folder, MODEL.model.stage, folders.made_from(MODEL.file, files), settings)
    record = stage.finished(force)
    if record is not None:
        return folders.StageResult(record, is_up_to_date=True)

    found = Calibration("given", given or {}, 0, None)
    if given is None:
        found = calibrated(model, spec, where, pictures, rule, _training_statistics(folder))
    result = qdq.quantised(model, where, found.ranges)
    onnx_model.require_valid(folder / MODEL.file, result)
    if target and pictures:
        target["box_sqnr_db"] = _box_sqnr_db(model, result, list(network_inputs(pictures, spec.input)))
    record = _write(stage, result, found, {**_checks(where, in_float, found), **target})
    return folders.StageResult(record, is_up_to_date=False, note=_note(found))


def _write(
    stage: folders.Stage, result: onnx.ModelProto, found: Calibration, checks: Mapping[str, Any]
) -> Dict[str, Any]:
    """Writes the model, its ranges and the record, which it returns."""
    with folders.staging(stage.folder) as staged:
        (staged / MODEL.file).write_bytes(result.SerializeToString(deterministic=True))
        (staged / CALIBRATION).parent.mkdir()
        (staged / CALIBRATION).write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        return stage.record(
            staged,
            outputs=[MODEL.file],
            versions={each: importlib.metadata.version(each) for each in ("onnx", "onnxruntime")},
            checks=checks,
        )


def calibrated(
    model: onnx.ModelProto,
    spec: DetectorSpec,
    where: qdq.Placement,
    pictures: Sequence[np.ndarray],
    rule: str,
    statistics: Mapping[str, drift.Channels],
) -> Calibration:
    """The ranges of ``where``'s tensors on pictures, uint8 ``[height, width, 3]``, RGB.

    statistics: of the channels in training (:func:`odtrt_lib.int8.drift.training_statistics`).
    """
    if rule not in calibrate.RULES:
        raise InputError(f"calibrator {rule!r}: expected one of {', '.join(calibrate.RULES)}")
    found = calibrate.histograms(model, where.tensors, lambda: network_inputs(pictures, spec.input))
    ranges = {tensor: calibrate.amax(histogram, rule) for tensor, histogram in found.items()}
    distance = drift.measured(model, statistics, network_inputs(pictures, spec.input))
    return Calibration(rule, ranges, len(pictures), distance)


def _quiet_enough(
    folder: Path, heads: bytes, min_box_sqnr_db: float, in_float: Sequence[str]
) -> Tuple[List[str], Dict[str, Any]]:
    """What stays in floating point, and the prediction for the record."""
    report = sensitivity.read_report(folder, hashlib.sha256(heads).hexdigest())
    kept = report.quiet_enough(min_box_sqnr_db, in_float)
    return kept, {"predicted_box_sqnr_db": sensitivity.sqnr_db(report.predicted(kept).box)}


def _box_sqnr_db(model: onnx.ModelProto, result: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> float:
    wanted = sensitivity.heads_of(model, inputs)
    return sensitivity.sqnr_db(sensitivity.noise(wanted, sensitivity.heads_of(result, inputs))[0])


def network_inputs(pictures: Sequence[np.ndarray], spec: InputSpec) -> Iterator[np.ndarray]:
    """What the detector feeds to the network: one input of batch 1 for each picture."""
    for picture in pictures:
        yield preprocess(picture, spec)[0][None]


def _checks(where: qdq.Placement, in_float: Sequence[str], found: Calibration) -> Dict[str, Any]:
    return {
        "onnx_checker": "full check passed",
        "int8_convolutions": len(where.convs),
        "float_convolutions": len(in_float),
        "calibrated_tensors": len(found.ranges),
        "images": found.images,
        "drift_from_training": found.drift,
    }


def _note(found: Calibration) -> str:
    if found.drift is None or found.drift <= drift.LIMIT:
        return ""
    return (
        f"on these pictures the network's channels are {found.drift:.2f} of a standard deviation from their "
        f"means in training; pictures like those that it was trained on stay below {drift.LIMIT}. Is it "
        "another camera, exposure or subject? (Weights trained with frozen BatchNorm differ so, too.)"
    )


# ---- Ranges in files ---------------------------------------------------------------------------------------


def read_ranges(path: Path, where: qdq.Placement) -> Dict[str, float]:
    """The ranges of ``where``'s tensors: of ``int8/calibration.json``, or a calibration table of TensorRT.

    Raises InputError if the file is missing or is neither, and if it is another model's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); expected ranges") from error
    if text.startswith("TRT-"):
        return read_table(text, where)
    try:
        found = json.loads(text)["ranges"]
        ranges = {tensor: float(found[tensor]) for tensor in where.tensors if tensor in found}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: neither {CALIBRATION} of a model folder nor TensorRT's calibration table"
        ) from error
    return _complete(str(path), ranges, where)


def _complete(name: str, ranges: Mapping[str, float], where: qdq.Placement) -> Dict[str, float]:
    missing = [tensor for tensor in where.tensors if tensor not in ranges]
    if missing:
        raise InputError(
            f"{name}: {len(missing)} of {len(where.tensors)} tensors are not in it, among them "
            f"{missing[0]!r}; it is another model's"
        )
    return {tensor: ranges[tensor] for tensor in where.tensors}


def write_table(ranges: Mapping[str, float], version: Tuple[int, int, int]) -> str:
    """TensorRT's calibration cache of IInt8EntropyCalibrator2, for TensorRT before 11.

    A line for each tensor: its name, a colon, and the big-endian float32 of amax / 127 in hexadecimal digits
    (TensorRT's samples/common/sampleEngines.cpp reads it so). version: TensorRT's major, minor and patch.
    """
    major, minor, patch = version
    number = major * 1000 + minor * 100 + patch if major < 10 else major * 10000 + minor * 100 + patch
    lines = [f"TRT-{number}-EntropyCalibration2"]
    lines += [f"{name}: {struct.pack('>f', amax / qdq.LEVELS).hex()}" for name, amax in ranges.items()]
    return "\n".join(lines) + "\n"


def read_table(text: str, where: qdq.Placement) -> Dict[str, float]:
    """The ranges of ``where``'s tensors in a calibration cache.

    Raises InputError for another format, and if tensors are missing: then it is another model's.
    """
    lines = text.splitlines()
    if not lines or not lines[0].startswith("TRT-"):
        raise InputError(f"not TensorRT's calibration table: it begins with {one_line(text[:40])!r}")
    found = {}
    for number, line in enumerate(lines[1:], 2):
        name, _, digits = line.rpartition(": ")
        try:
            (scale,) = struct.unpack(">f", bytes.fromhex(digits))
        except (ValueError, struct.error) as error:
            raise InputError(
                f"calibration table, line {number}: expected `NAME: 8 hexadecimal digits`"
            ) from error
        found[name] = scale * qdq.LEVELS
    return _complete("calibration table", found, where)


# ---- Input -------------------------------------------------------------------------------------------------


def _training_statistics(folder: Path) -> Dict[str, drift.Channels]:
    """Nothing without ``frozen.pb``, which a folder that was unpacked from a bundle lacks."""
    if not (folder / FROZEN).is_file():
        return {}
    from odtrt_lib.convert.stage import load_frozen  # a device does without `convert`

    content = folders.sealed(folder, FROZEN)[FROZEN]
    return drift.training_statistics(load_frozen(folder / FROZEN, content))


def calibration_pictures(images: Sequence[Picture], fewest: int = FEWEST_IMAGES) -> List[np.ndarray]:
    """Each uint8 ``[height, width, 3]``, RGB. Raises InputError for too few, and as :func:`quantise` says."""
    pictures = [pixels(one, number) for number, one in enumerate(images, 1)]
    if len(pictures) < fewest:
        raise InputError(f"{len(pictures)} calibration pictures; at least {fewest} are needed")
    return pictures


def pixels(picture: Picture, number: int) -> np.ndarray:
    """The picture as uint8 ``[height, width, 3]``. number: its place, for the error's text.

    Raises InputError if the file cannot be read, and if the picture has one colour only.
    """
    found = picture if isinstance(picture, np.ndarray) else load_image(picture)
    if int(found.max()) == int(found.min()):
        name = f"calibration picture {number}" if isinstance(picture, np.ndarray) else str(picture)
        raise InputError(f"{name}: one colour only, which shows nothing of what the detector will see")
    return found


def digest(pictures: Sequence[np.ndarray]) -> str:
    """The SHA-256 of their pixels."""
    found = hashlib.sha256()
    for picture in pictures:
        found.update(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes())
    return found.hexdigest()


def pictures_in(folder: Path, count: Optional[int] = None) -> List[Path]:
    """The pictures of a folder in the order of their names; with ``count``, so many of them, evenly spaced.

    Raises InputError if the folder is missing or has none.
    """
    folders.require_folder(folder)
    every = sorted(one for one in folder.iterdir() if one.suffix.lower() in PICTURE_SUFFIXES)
    if not every:
        raise InputError(f"{folder}: no pictures in it ({', '.join(sorted(PICTURE_SUFFIXES))})")
    if count is None:
        return every
    chosen = np.unique(np.linspace(0, len(every) - 1, min(count, len(every))).astype(int))
    return [every[i] for i in chosen]
