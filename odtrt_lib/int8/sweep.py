"""Measures how much noise each convolution adds in INT8, for a model folder, on one machine or a Ray cluster.

Two sweeps: each convolution alone in INT8, and all but it. The unit of work is one network and a shard of
pictures; its result is the noise power of each picture, in float64. These are added in the order of the
pictures, whoever measured them. The networks run in one thread each. So a cluster finds the same bits as one
process, if its processors are of one kind: ONNX Runtime has other kernels for others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from odtrt_lib import folder as folders
from odtrt_lib import onnx_model
from odtrt_lib.distribute import mapped, require_cluster
from odtrt_lib.errors import InputError
from odtrt_lib.int8 import qdq, stage
from odtrt_lib.int8.blocks import blocks
from odtrt_lib.int8.sensitivity import REPORT, Noise, Ranked, Report, heads_of, powers, relative
from odtrt_lib.spec import load_spec

if TYPE_CHECKING:
    import onnx

MEASURED = 8
_SHARD = 4

Shard = Tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What any process needs that has the model folder and the pictures. ranges: (tensor, amax) pairs."""

    folder: Path
    heads_sha256: str
    ranges: Tuple[Tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """is_alone: ``conv`` is in INT8 and all else in float32; else all is in INT8 but ``conv``. conv: None:
    no convolution."""

    conv: Optional[str]
    is_alone: bool
    pictures: Shard


def measure_sensitivity(
    folder: Union[str, Path],
    images: Sequence[Path],
    *,
    rule: str = "mse",
    measured: int = MEASURED,
    ray_address: Optional[str] = None,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> folders.StageResult:
    """Writes ``int8/sensitivity.json``, a :class:`odtrt_lib.int8.sensitivity.Report`.

    images: as of :func:`odtrt_lib.int8.quantise`, as files. Ranges are calibrated on all of them; the noise
    is measured on ``measured`` of them, evenly spaced, or on all if there are fewer. rule: a key of
    :data:`odtrt_lib.int8.calibrate.RULES`. ray_address: see :func:`odtrt_lib.distribute.mapped`. force: write
    even if the file is up to date. progress: called with the units of work that are done, and with all.

    Raises what :func:`odtrt_lib.int8.quantise` and ``mapped`` raise, and InputError if ``measured`` is not
    positive. Nothing is written then.
    """
    if measured < 1:
        raise InputError(f"noise measured on {measured} pictures; expected one at least")
    if ray_address is not None:
        require_cluster(ray_address)
    folder = Path(folder)
    files = folders.sealed(folder, "heads.onnx", "spec.json")
    model = onnx_model.load(folder / "heads.onnx", files["heads.onnx"], "measure what INT8 costs")
    where = qdq.placement(model)
    pictures = stage.calibration_pictures(images)
    settings = {"rule": rule, "measured": measured, "images": stage.digest(pictures)}
    record_of = folders.Stage(folder, "sensitivity", folders.made_from(stage.MODEL.file, files), settings)
    record = record_of.finished(force)
    if record is not None:
        return folders.StageResult(record, is_up_to_date=True)

    spec = load_spec(folder / "spec.json", files["spec.json"])
    ranges = stage.calibrated(model, spec, where, pictures, rule, {}).ranges
    digest = hashlib.sha256(files["heads.onnx"]).hexdigest()
    sweep = Sweep(folder, digest, tuple(ranges.items()))
    chosen = np.unique(np.linspace(0, len(images) - 1, min(measured, len(images))).astype(int))
    noise = _measured(sweep, where.convs, [Path(images[i]) for i in chosen], ray_address, progress)
    report = Report(digest, rule, len(images), len(chosen), noise[None, False], _ranking(model, noise))
    with folders.staging(folder) as staged:
        (staged / REPORT).parent.mkdir()
        (staged / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
        record = record_of.record(
            staged,
            outputs=[REPORT],
            versions={each: importlib.metadata.version(each) for each in ("onnx", "onnxruntime")},
            checks={
                "convolutions": len(where.convs),
                "calibrated_on": len(images),
                "measured_on": len(chosen),
            },
        )
    return folders.StageResult(record, is_up_to_date=False)


Sums = Dict[Tuple[Optional[str], bool], Noise]


def _measured(
    sweep: Sweep,
    convs: Sequence[str],
    pictures: Sequence[Path],
    ray_address: Optional[str],
    progress: Callable[[int, int], None],
) -> Sums:
    """(Convolution, whether alone) -> its noise; (None, False): every convolution in INT8."""
    networks: List[Tuple[Optional[str], bool]] = [(None, False)]
    networks += [(conv, is_alone) for conv in convs for is_alone in (True, False)]
    shards = [tuple(pictures[i : i + _SHARD]) for i in range(0, len(pictures), _SHARD)]
    units = [Unit(conv, is_alone, shard) for shard in shards for conv, is_alone in networks]
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, len(units))

    found = mapped(functools.partial(unit_powers, sweep), units, ray_address, advance)
    of: Dict[Any, List[np.ndarray]] = {network: [] for network in networks}
    for unit, part in zip(units, found):
        of[unit.conv, unit.is_alone].append(part)
    return {network: relative(np.concatenate(parts)) for network, parts in of.items()}


def unit_powers(sweep: Sweep, unit: Unit) -> np.ndarray:
    """float64 ``[pictures, 2, 2]``, as of :func:`odtrt_lib.int8.sensitivity.powers`.

    Raises InputError if the folder's ``heads.onnx`` is not the one of the sweep, or a picture is unreadable.
    """
    model, inputs, wanted = _prepared(sweep.folder, sweep.heads_sha256, unit.pictures)
    in_float = [] if unit.conv is None else [unit.conv]
    if unit.is_alone:
        in_float = [conv for conv in qdq.placement(model).convs if conv != unit.conv]
    where = qdq.placement(model, in_float)
    return powers(wanted, heads_of(qdq.quantised(model, where, dict(sweep.ranges)), inputs, threads=1))


@functools.lru_cache(maxsize=2)
def _prepared(
    folder: Path, heads_sha256: str, pictures: Shard
) -> Tuple[onnx.ModelProto, List[np.ndarray], List[Tuple[Any, Any]]]:
    """The model, the network inputs, and their heads in float32. A process measures many networks on them."""
    files = folders.sealed(folder, "heads.onnx", "spec.json")
    if hashlib.sha256(files["heads.onnx"]).hexdigest() != heads_sha256:
        raise InputError(f"{folder / 'heads.onnx'}: another model than the one whose sweep this is")
    model = onnx_model.load(folder / "heads.onnx", files["heads.onnx"], "measure what INT8 costs")
    spec = load_spec(folder / "spec.json", files["spec.json"])
    inputs = list(stage.network_inputs([stage.load_image(one) for one in pictures], spec.input))
    return model, inputs, heads_of(model, inputs, threads=1)


def _ranking(model: onnx.ModelProto, noise: Sums) -> Tuple[Ranked, ...]:
    every = [
        Ranked(conv, block, noise[conv, True], noise[conv, False])
        for conv, block in blocks(model).items()
        if (conv, True) in noise
    ]
    return tuple(sorted(every, key=lambda one: one.alone.box + one.alone.classes, reverse=True))
