"""What the book's notebooks start from: made here on a workstation, brought by the bundle to a device.

A bundle has none of the code that exports, converts and renders scenes, see
:data:`odtrt_lib.bundle.archive.WORKSTATION`. ``odtrt pack --notebooks`` puts its results into the bundle. The
functions here give a notebook the same in both places, so the same notebook runs in both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Sequence, Tuple, Union

import numpy as np

from odtrt_lib import IMPORT_PATH
from odtrt_lib.errors import InputError
from odtrt_lib.folder import last_record, require, seal, sha256
from odtrt_lib.machine import this_machine
from odtrt_lib.variants import RUNTIME_LIBRARIES

if TYPE_CHECKING:
    from odtrt_lib.engine.passport import Machine, Passport
    from odtrt_lib.portability import Environment

SCENES = 40
PICTURES, TRUTH, RECORDS = "pictures", "pictures/truth.json", "notebooks/records.json"
_BROUGHT, _PLUGIN = "model", "plugins/build/libodtrt_tensorrt.so"
_SPLIT_FILES = ("spec.json", "anchors.npy", "heads.onnx")


@dataclasses.dataclass(frozen=True)
class UnseenScene:
    """A rendered scene that the shipped detector was not trained on.

    image: RGB, uint8 [height, width, 3]. boxes: float32 [K, 4], ``[ymin, xmin, ymax, xmax]`` in pixels, and
    class_ids: int64 [K], of the objects that are really there. names: their K class names.
    """

    image: np.ndarray
    boxes: np.ndarray
    class_ids: np.ndarray
    names: Tuple[str, ...]


def is_workstation() -> bool:
    """Whether this is a checkout, which can export and convert, and no unpacked bundle."""
    return (Path(IMPORT_PATH) / "odtrt_lib" / "export").is_dir()


def prepare(
    model: Union[str, Path], folder: Union[str, Path], *, fused: bool = False, plan: bool = False
) -> Path:
    """Makes the model folder with which a notebook begins; returns its path.

    model: as of :func:`odtrt_lib.export.export`. On a workstation it is exported and converted into
    ``folder``, unless that is done already. On a device ``folder`` becomes a copy of the bundle's ``model/``;
    a printed line says so. fused: with ``detector.onnx``, too. plan: with a GPU, also build the
    single-precision plan of ``heads.onnx``.

    Raises what these stages raise, and InputError if the bundle lacks one of the files.
    """
    folder = Path(folder)
    if is_workstation():
        from odtrt_lib.convert import convert
        from odtrt_lib.export import export
        from odtrt_lib.fuse import fuse

        export(model, folder)
        convert(folder)
        if fused:
            fuse(folder)
    else:
        print(f"export and convert ran on the workstation: {folder} is a copy of the bundle's {_BROUGHT}/")
        _copy_brought(folder, (*_SPLIT_FILES, "detector.onnx") if fused else _SPLIT_FILES)
    if plan and this_machine().gpu is not None:
        from odtrt_lib.engine import build

        build(folder)
    return folder


def run_stage(name: str, model: Union[str, Path], folder: Union[str, Path]) -> Dict[str, Any]:
    """The record of the stage ``export`` or ``convert``, as :class:`odtrt_lib.folder.StageResult` has it.

    On a workstation the stage runs, unless it is up to date. On a device a printed line says where it ran,
    the record is the one that the bundle brought, and ``folder`` becomes what :func:`prepare` makes. Raises
    what the stage or :func:`prepare` raises.
    """
    if not is_workstation():
        print(f"{name} ran on the workstation; this is its record:")
        _copy_brought(Path(folder), _SPLIT_FILES)
        return json.loads((Path(IMPORT_PATH) / RECORDS).read_text(encoding="utf-8"))[name]
    from odtrt_lib.convert import convert
    from odtrt_lib.export import export

    return (export(model, folder) if name == "export" else convert(folder)).record


def stage_records(folder: Path) -> Dict[str, Any]:
    """Stage -> its record in a model folder, for :func:`run_stage` on a device.

    Raises InputError if one of the two stages did not make this folder.
    """
    if not is_workstation():
        return json.loads((Path(IMPORT_PATH) / RECORDS).read_text(encoding="utf-8"))
    found = {name: last_record(folder, name) for name in ("export", "convert")}
    for name, record in found.items():
        if record is None:
            raise InputError(f"{folder}: has no record of {name}; run `odtrt {name}` again")
    return found


def _copy_brought(folder: Path, names: Sequence[str]) -> None:
    files = [require(Path(IMPORT_PATH) / _BROUGHT, name, "pack --notebooks") for name in names]
    if all((folder / path.name).is_file() and sha256(folder / path.name) == sha256(path) for path in files):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(str(path), str(folder / path.name))
    seal(folder)


def unseen_scene(number: int) -> UnseenScene:
    """Test scene ``number``, from 0 up: rendered on a workstation, read from the bundle's pictures elsewhere.

    Both have the same pixels. Raises InputError if the bundle did not bring this one.
    """
    if is_workstation():
        from odtrt_lib.scenes import PARTS_CLASSES, TEST_SEEDS, render_scene

        scene = render_scene(TEST_SEEDS[number])
        names = tuple(PARTS_CLASSES[class_id - 1] for class_id in scene.class_ids)
        return UnseenScene(scene.image, scene.boxes, scene.class_ids, names)
    from odtrt_lib.preprocess import load_image

    brought = Path(IMPORT_PATH)
    path = brought / picture_of(number)
    if not path.is_file():
        raise InputError(f"{path}: not found; the bundle brings the first {SCENES} test scenes")
    truth = json.loads((brought / TRUTH).read_text(encoding="utf-8"))[number]
    return UnseenScene(
        load_image(path),
        np.array(truth["boxes"], np.float32).reshape(-1, 4),
        np.array(truth["class_ids"], np.int64),
        tuple(truth["names"]),
    )


def picture_of(number: int) -> str:
    """Where the bundle has test scene ``number``."""
    return f"{PICTURES}/scene_{number:02d}.png"


def place_of(passport: Passport, instead: Machine) -> Environment:
    """The place where a plan may run: the machine that built it or, if that has no GPU, ``instead``."""
    from odtrt_lib.engine.bindings import TF32_OVERRIDE
    from odtrt_lib.portability import Environment

    machine = instead if passport.machine.gpu is None else passport.machine
    override = os.environ.get(TF32_OVERRIDE)
    return Environment(machine, passport.runtime_library, passport.version, tf32_override=override)


def compare_fused(folder: Union[str, Path], image: np.ndarray) -> None:
    """Prints what the plan with the post-processing inside finds, beside the one with it behind.

    image: RGB, uint8 [height, width, 3]. Both single-precision plans are built if they are not there. Without
    a GPU or the compiled plugin one line says that nothing was run.
    """
    from odtrt_lib.detector import Detector
    from odtrt_lib.engine import build

    plugin = Path(IMPORT_PATH) / _PLUGIN
    if this_machine().gpu is None or not plugin.is_file():
        print("no GPU with a compiled plugin here: this plan was neither built nor run")
        return
    build(folder)
    build(folder, plugin=plugin)
    found = []
    for library in (None, plugin):
        with Detector.open(folder, plugin=library, precision="fp32") as detector:
            found.append(detector.detect(image))
            print(f"{len(found[-1].scores)} detections: {detector.status.description}")
    behind, inside = found
    is_same = np.array_equal(behind.class_ids, inside.class_ids)
    print("same classes in the same order:", is_same)
    if is_same:
        scores, boxes = np.abs(behind.scores - inside.scores), np.abs(behind.boxes - inside.boxes)
        print(f"largest difference of a score {scores.max():.0e}, of a box {boxes.max():.0e} pixels")


def print_recorded(path: Union[str, Path], notebook: str, *cells: str) -> None:
    """Prints what ``cells`` of ``notebook`` printed on another machine, and which machine that was.

    path: what ``benchmarks/device_notebooks_gpu.py`` wrote there. Raises KeyError for a cell that did not run
    there.
    """
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = {row["cell"]: row for row in record["rows"] if row["notebook"] in (notebook, "build_here.py")}
    library = RUNTIME_LIBRARIES[rows[""]["runtime_library"]]
    python = record["versions"]["python"]
    print(f"{record['device']['gpu']}, {library} {rows['']['runtime_version']}, Python {python}", end="")
    print(f", {record['date'][:10]}")
    for cell in cells:
        print(f"\n[{cell}]", rows[cell]["text"], sep="\n", end="")
