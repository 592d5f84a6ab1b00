"""The command line: ``odtrt run``, a command for each stage, and further commands.

Exit status: 0 success, 1 an error that odtrt explains (also if one of many pictures cannot be read, or if
``eval --gate`` does not pass), 2 a failed check or a wrong command line, 130 interrupted, 70 a defect in
odtrt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import traceback
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import typer
import typer.core
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from odtrt_lib import IMPORT_PATH, __version__
from odtrt_lib.app import terminal
from odtrt_lib.app.terminal import out as _out
from odtrt_lib.app.terminal import say_error as _say_error
from odtrt_lib.errors import (
    CheckError,
    InputError,
    MissingDependencyError,
    OdtrtError,
    is_utf8,
    printable,
    shell_word,
)
from odtrt_lib.folder import require_folder
from odtrt_lib.variants import (
    ALLOWABLE,
    CALIBRATORS,
    FORMS,
    HARDWARE_COMPATIBILITIES,
    PRECISIONS,
    RUNTIME_LIBRARIES,
    Variant,
)

if TYPE_CHECKING:
    import numpy as np

    from odtrt_lib.app.demonstration import Picture
    from odtrt_lib.coco import CocoFolder, Identity
    from odtrt_lib.detector import Detections, Detector
    from odtrt_lib.engine.pipeline import Switches
    from odtrt_lib.evaluate import MapDrop, Merged, Recipe, Verdict
    from odtrt_lib.evaluate import Picture as EvaluatedPicture
    from odtrt_lib.folder import StageResult
    from odtrt_lib.int8.sensitivity import Report
    from odtrt_lib.latency.profile import Profile
    from odtrt_lib.latency.worker import Job
    from odtrt_lib.sources import Source

_OUT = Path("out")
_MIN_SCORE = 0.3
_PROFILED_SCENES = 4
_MAX_UNREADABLE_NAMED = 10
_MAX_CONVOLUTIONS_SHOWN = 20
_PICTURES_A_TASK = 16
_SOAK_HOURS, _SOAK_SCENES = 72.0, 16
_INTERRUPTED = ("interrupted; nothing half-written is left", 130)
_PYTHON_OF_TENSORFLOW = (3, 10)
_TENSORFLOW_LOG = (
    r"^(WARNING: All log messages before absl::InitializeLog|[IW][0-9]{4} [0-9:. ]+[0-9]+ [a-z_]+\.cc:)"
)
# The figures of a stage that the terminal shows; report.html and log.jsonl have them all.
_SHOWN_CHECKS = {
    "export": ("variables restored", "anchors from config", "frozen vs eager", "spec vs odapi box"),
    "convert": (
        "resizes agree",
        "ONNX checker",
        "largest relative error",
        "encodings: times noise",
        "logits: times noise",
    ),
    "engine": ("inputs and outputs", "layers", "half precision"),
    "quantise": ("convolutions", "images", "drift"),
    "fuse": ("ONNX checker", "nodes"),
}


def _choice(name: str, values: Iterable[str]) -> Any:
    """The type of an option whose value is one of ``values``."""
    return Enum(name, {value: value for value in values}, type=str)


if TYPE_CHECKING:
    Precision = Enum
    Allowance = Enum
    HardwareCompatibility = Enum
    BackendName = Enum
    Form = Enum
    Calibrator = Enum
else:
    Precision = _choice("Precision", PRECISIONS)
    Allowance = _choice("Allowance", ALLOWABLE)
    HardwareCompatibility = _choice("HardwareCompatibility", HARDWARE_COMPATIBILITIES)
    BackendName = _choice("BackendName", ("auto", "onnxruntime", *RUNTIME_LIBRARIES))
    Form = _choice("Form", (name for name in FORMS if name != "heads"))
    Calibrator = _choice("Calibrator", CALIBRATORS)


class _Commands(typer.core.TyperGroup):
    """Handles Ctrl-C and usage errors. Typer's own message after Ctrl-C says nothing about files, and its
    errors show arguments without escapes."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _printable_usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _printable_usage_errors():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            _say_error(_INTERRUPTED[0])
            raise typer.Exit(_INTERRUPTED[1]) from None


app = typer.Typer(
    cls=_Commands,
    name="odtrt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each command explains itself: `odtrt run --help`. See also `odtrt doctor`.",
)
zoo_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(zoo_app, name="zoo", help="Download models of the TensorFlow 2 detection zoo.")

ModelArgument = typer.Argument(
    ...,
    metavar="MODEL",
    help="An exported model's folder, a training folder, or a checkpoint such as `train/ckpt-7`.",
    show_default=False,
)
FolderArgument = typer.Argument(
    ..., metavar="FOLDER", help="A model folder that `odtrt export` or `odtrt run` wrote.", show_default=False
)
QuantisedArgument = typer.Argument(
    ..., metavar="FOLDER", help="Its model folder, after `odtrt quantise`.", show_default=False
)
TrainedOption = typer.Option(
    ..., "-o", "--output", metavar="NEW", help="The folder of the new model.", show_default=False
)
OutputOption = typer.Option(
    None,
    "-o",
    "--output",
    metavar="FOLDER",
    help="The model folder to write. Default: `out/<name of MODEL>`.",
)
PipelineOption = typer.Option(
    None,
    "--pipeline",
    metavar="FILE",
    help="The pipeline.config, where it does not lie beside the checkpoint.",
)
LabelMapOption = typer.Option(
    None,
    "--label-map",
    metavar="FILE",
    help="The label map; a .txt file may hold the names alone, one a line.",
)
InputSizeOption = typer.Option(
    None,
    "--input-size",
    metavar="HxW",
    help="The network input, e.g. `512x640`; only for a resizer that keeps the aspect ratio without padding.",
)
PrecisionOption = typer.Option("fp32", "--precision", help="The engine's weights and arithmetic.")
FormOption = typer.Option(
    "plugin",
    "--form",
    help="The plugin's node, or ONNX's own NonMaxSuppression, which has limits.",
)
CalibrationOption = typer.Option(
    None, "--images", metavar="FOLDER", help="Pictures as the detector will see them.", show_default=False
)
TrainingOption = typer.Option(
    ..., "--images", metavar="FOLDER", help="Pictures as the detector will see them.", show_default=False
)
RangesOption = typer.Option(
    None,
    "--ranges",
    metavar="FILE",
    help="Ranges, in place of pictures: a calibration.json, or TensorRT's calibration table.",
)
CalibratorOption = typer.Option("mse", "--calibrator", help="How the ranges of activations are chosen.")
InFloatOption = typer.Option(
    [], "--in-float", metavar="NAME", help="A convolution that stays in floating point; can be repeated."
)
MinBoxSqnrOption = typer.Option(
    None,
    "--min-box-sqnr",
    metavar="DB",
    help="Keep in floating point what disturbs the boxes most, until their signal over noise is that many "
    "decibels; needs `odtrt sensitivity`.",
)
MeasuredOption = typer.Option(8, "--measured", min=1, help="Measure the noise on so many of these.")
RayOption = typer.Option(False, "--ray", help="Divide the work among this machine's cores, by Ray.")
RayAddressOption = typer.Option(
    None,
    "--ray-address",
    metavar="HOST:PORT|auto",
    help="Divide it among the machines of this Ray cluster; auto: the one that runs here.",
    show_default=False,
)
CountOption = typer.Option(64, "--count", min=1, help="So many of the pictures, evenly spaced.")
PluginOption = typer.Option(
    None,
    "--plugin",
    metavar="FILE",
    help="libodtrt_tensorrt.so, from `make plugin`: builds detector.onnx, post-processing included.",
)
BatchesOption = typer.Option(
    None,
    "--batches",
    metavar="MIN,OPT,MAX",
    help="The batch sizes of a model exported with `--batch dynamic`: smallest, best tuned, largest.",
)
MemoryOption = typer.Option(
    None,
    "--memory",
    metavar="LIMIT",
    help="The most memory that the build may take: `1500MiB`, `2GiB`, or `60%` of what is free.",
)
AllowOption = typer.Option(
    [],
    "--allow",
    help="What the build may change about the plan if memory does not suffice otherwise; can be given twice.",
)
VersionCompatibleOption = typer.Option(
    False, "--version-compatible", help="A plan that newer TensorRT versions load as well."
)
HardwareCompatibleOption = typer.Option(
    "none", "--hardware-compatible", help="A plan that other GPUs run as well."
)
GpuOption = typer.Option(
    [],
    "--gpu",
    metavar="CC",
    help="A compute capability that TensorRT-RTX builds for, such as `8.9`; can be given several times.",
)
BackendOption = typer.Option(
    "auto",
    "--backend",
    help="What runs the network. auto: the best plan that is valid here, else ONNX Runtime.",
)
PlanPluginOption = typer.Option(
    None, "--plugin", metavar="FILE", help="The plugin library, for plans that were built with it."
)
BundleOption = typer.Option(
    None,
    "-o",
    "--output",
    metavar="FILE",
    help="The bundle to write. Default: `<name of FOLDER>.odtrt.zip`, here.",
)
TritonOption = typer.Option(False, "--triton", help="Add a model repository for Triton.")
DeepStreamOption = typer.Option(False, "--deepstream", help="Add a configuration for DeepStream's nvinfer.")
NotebooksOption = typer.Option(
    False, "--notebooks", help="Add the book's notebooks that run on the device; for models/parts."
)
TargetOption = typer.Option(
    None,
    "--target",
    metavar="BOARD",
    help="Add what `make plugin TARGET=BOARD` compiled: jetson-xavier, jetson-orin or jetson-thor.",
)
BundleArgument = typer.Argument(
    ..., metavar="BUNDLE", help="A file that `odtrt pack` wrote.", show_default=False
)
UnpackOption = typer.Option(
    None, "-o", "--output", metavar="FOLDER", help="Where to. Default: the bundle's name in this folder."
)
Sha256Option = typer.Option(
    None,
    "--sha256",
    metavar="HASH",
    help="The bundle's SHA-256, as `odtrt pack` printed it; others are refused.",
)
ForceOption = typer.Option(False, "--force", help="Do it again even if nothing changed.")
OverwriteOption = typer.Option(
    False, "--force", help="Over a bundle that was unpacked there before; your own files there stay."
)
SoakFolderArgument = typer.Argument(
    _OUT / "parts", metavar="FOLDER", help="A model folder that `odtrt export` or `odtrt run` wrote."
)
CameraArgument = typer.Argument(
    None,
    metavar="SOURCE",
    help="A folder of pictures, shown 30 times a second; a camera: `0`, `/dev/video0` or `csi:0`; or "
    "`rtsp://...`. Default: for a model of the shipped parts, rendered scenes.",
    show_default=False,
)
HoursOption = typer.Option(None, "--hours", min=0.0, metavar="H", help="How long. Default: 72 hours.")
MinutesOption = typer.Option(None, "--minutes", min=0.0, metavar="M", help="How long, in minutes.")
FaultsOption = typer.Option(
    None,
    "--faults",
    metavar="SCHEDULE",
    help="Faults of the camera: `standard`, or such as `drop=100,stall=5000,seed=3`: one of 100 frames is "
    "dropped. Also late, corrupt, resize and disconnect.",
)
ResumeOption = typer.Option(False, "--resume", help="Go on with a soak that was interrupted.")
SoakOption = typer.Option(
    None, "-o", "--output", metavar="DIR", help="Where the report goes. Default: `FOLDER/soak`."
)
MinScoreOption = typer.Option(
    _MIN_SCORE, "--min-score", min=0.0, max=1.0, help="Show detections with at least this score."
)
ImageOption = typer.Option(
    [],
    "--image",
    metavar="FILE",
    help="A picture to detect on; can be given several times. Default: for a model of the shipped parts, "
    "scenes that it was not trained on.",
    show_default=False,
)
BatchOption = typer.Option(
    "1", "--batch", metavar="N|dynamic", help="The batch size: a number, or `dynamic` for any."
)
OpsetOption = typer.Option(17, "--opset", help="The ONNX opset to write.")
ImagesArgument = typer.Argument(
    ..., metavar="IMAGE...", help="JPEG, PNG, GIF, BMP or WebP files.", show_default=False
)
PicturesOption = typer.Option(
    None, "-o", "--output", metavar="DIR", help="Where the pictures go. Default: `FOLDER/detections`."
)
JsonOption = typer.Option(None, "--json", metavar="FILE", help="Write what was found to this file as well.")
AnnotationsOption = typer.Option(
    ..., "--annotations", metavar="JSON", help="A COCO instances file.", show_default=False
)
ImagesRootOption = typer.Option(
    None,
    "--images",
    metavar="DIR",
    help="The folder that its file names start from, or one above it. Default: the JSON file's.",
)
LimitOption = typer.Option(
    None, "--limit", min=1, metavar="N", help="Only the first N images, for a quick look."
)
PlanPrecisionOption = typer.Option(None, "--precision", help="Only plans of this precision. Default: of any.")
GateOption = typer.Option(
    None,
    "--gate",
    metavar="POINTS",
    help="The most points of mAP that may be lost against the reference. The exit status is 1 if more are "
    "lost, or if the 95 % interval of the loss (a paired bootstrap over the images) reaches further.",
)
AgainstOption = typer.Option(
    None,
    "--against",
    metavar="FOLDER",
    help="The reference's model folder. Default: the same folder.",
    show_default=False,
)
AgainstBackendOption = typer.Option(
    None, "--against-backend", help="What runs the reference. Default: onnxruntime.", show_default=False
)
AgainstPrecisionOption = typer.Option(
    None, "--against-precision", help="The reference's precision. Default: fp32.", show_default=False
)
OptionalFolderArgument = typer.Argument(
    _OUT / "parts", metavar="FOLDER", help="A model folder that `odtrt run` wrote."
)
SourceArgument = typer.Argument(
    None,
    metavar="SOURCE",
    help="A picture, a folder of pictures, a video file, a camera such as `0` or `csi:0`, or an address such "
    "as `rtsp://HOST/PATH`. Default: rendered scenes.",
    show_default=False,
)
FramesOption = typer.Option(200, "--frames", min=2, metavar="N", help="How many frames are recorded.")
DrawOption = typer.Option(True, "--draw/--no-draw", help="Whether boxes are drawn into each frame.")
SwitchesOption = typer.Option(
    None,
    "--switches",
    metavar="MEMORY/PREPROCESS/LAUNCH/POSTPROCESS",
    help="How a plan is run, such as `mapped/gpu/graph/gpu`. Default: the simplest way.",
)
TraceOption = typer.Option(
    None, "--trace", metavar="FILE", help="Write all frames for https://ui.perfetto.dev to this file."
)
ZooNameArgument = typer.Argument(
    ..., metavar="NAME", help="A name from `odtrt zoo list`.", show_default=False
)
ZooFolderOption = typer.Option(_OUT / "zoo", "-o", "--output", metavar="DIR", help="Where models are kept.")


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Runs ``odtrt``. Every error becomes one line on stderr and an exit status, see the module's docstring.

    If ``ODTRT_TRACEBACK=1`` is in the environment, it also prints the Python traceback.
    """
    terminal.prepare_streams()
    with terminal.heeding_ctrl_c() as interruption:
        try:
            app(args=None if arguments is None else list(arguments), prog_name="odtrt")
        except Exception as error:
            _print_traceback_if_asked()
            message, status = _INTERRUPTED if interruption.was_asked else _told(error)
            _say_error(message)
            sys.exit(status)
        finally:
            terminal.flush()


def _told(error: Exception) -> Tuple[str, int]:
    """The message for an error, and the exit status."""
    if isinstance(error, OdtrtError):
        return f"error: {error}", 2 if isinstance(error, CheckError) else 1
    if isinstance(error, MemoryError):
        return "error: the memory does not suffice: close other programs, or give it less to do", 1
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}the operating system says: {error.strerror}", 1
    return (
        f"error: unexpected {type(error).__name__}: {error or 'no message'}: this is a defect in odtrt; "
        "set ODTRT_TRACEBACK=1 and run again to see where"
    ), 70


def _version(is_asked: bool) -> None:
    if is_asked:
        _out().print(f"odtrt {__version__}", markup=False, highlight=False)
        raise typer.Exit


@app.callback()
def odtrt(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """From a TensorFlow 2 Object Detection API checkpoint to a TensorRT engine, one checked stage at a time.

    A **model folder** travels through the stages; each leaves in it what the next one needs, and in its
    log.jsonl the proof that it did its job. A stage whose inputs did not change does nothing.
    """


@app.command()
def run(
    model: Path = ModelArgument,
    output: Optional[Path] = OutputOption,
    image: List[Path] = ImageOption,
    precision: Precision = PrecisionOption,
    pipeline: Optional[Path] = PipelineOption,
    label_map: Optional[Path] = LabelMapOption,
    input_size: Optional[str] = InputSizeOption,
    force: bool = ForceOption,
) -> None:
    """The whole path: export, convert, build, detect, and a report of it all.

    **Reads** a model as the Object Detection API leaves it.

    **Writes** a model folder: spec.json, frozen.pb, heads.onnx, plans/, detections.json and report.html;
    for the shipped parts also scenes/, pictures to try the detector on. Without TensorRT the build is left
    out, and the rest goes on.

    **Example:** `odtrt run models/parts`, or `odtrt run my_model --image street.jpg --precision fp16`
    """
    _require_workstation()
    from odtrt_lib import convert as convert_stage
    from odtrt_lib import engine
    from odtrt_lib import export as export_stage
    from odtrt_lib.app import demonstration
    from odtrt_lib.report import write_report

    _require_utf8(model, output, pipeline, label_map)
    named = demonstration.read_pictures(image)  # reports unreadable pictures now, not after the stages
    folder = output or _OUT / _model_name(model)
    options: Any = {"pipeline": pipeline, "label_map": label_map, "input_size": _parse_size(input_size)}
    results = {
        "export": _work_on("export", lambda: export_stage.export(model, folder, force=force, **options))
    }
    skipped: Dict[str, str] = {}
    _say_if_unnamed(folder)
    results["convert"] = _work_on("convert", lambda: convert_stage.convert(folder, force=force))
    try:
        results["engine"] = _work_on(
            "engine", lambda: engine.build(folder, precision=precision.value, force=force)
        )
    except MissingDependencyError as error:
        skipped["engine"] = str(error)
        _say_skipped("engine", skipped["engine"])
    pictures = named or demonstration.unseen_scenes(folder)
    if pictures:
        results["detect"], detections, drawn = _detect_and_draw(folder, pictures)
    else:
        detections, drawn = [], []
        skipped["detect"] = "no picture to look at; name one: `--image FILE`"
        _say_skipped("detect", skipped["detect"])
    page = write_report(folder, drawn, detections=detections, skipped=skipped)
    _print_stages(folder, results)
    _say(f"report: {page}")
    if pictures and not named:
        _say_next(
            f"odtrt detect {shell_word(folder)} {shell_word(demonstration.keep(folder, pictures))}/*.png"
        )


def _detect_and_draw(
    folder: Path, pictures: Sequence[Picture]
) -> Tuple[StageResult, List[Detections], List[Tuple[str, np.ndarray]]]:
    """The detect stage of `run`: its record, what was found, and each picture's title and drawing."""
    from odtrt_lib.app import demonstration
    from odtrt_lib.plots import draw_detections

    with _progress("detect"):
        result, detections = demonstration.look_at(folder, pictures)
    _say_done("detect", result)
    drawn = [
        (picture.title, draw_detections(picture.image, found, demonstration.MIN_SCORE))
        for picture, found in zip(pictures, detections)
    ]
    _say_undrawable(name for found in detections for name in found.names)
    return result, detections, drawn


@app.command()
def export(
    model: Path = ModelArgument,
    output: Optional[Path] = OutputOption,
    pipeline: Optional[Path] = PipelineOption,
    label_map: Optional[Path] = LabelMapOption,
    batch: str = BatchOption,
    input_size: Optional[str] = InputSizeOption,
    force: bool = ForceOption,
) -> None:
    """Chapter 1: checkpoint to frozen graph of the raw heads.

    **Reads** pipeline.config and checkpoint. **Writes** frozen.pb, anchors.npy and spec.json.

    **Example:** `odtrt export my_model -o out/my_model --label-map labels.pbtxt`
    """
    _require_workstation()
    from odtrt_lib import export as export_stage

    _require_utf8(model, output, pipeline, label_map)
    folder = output or _OUT / _model_name(model)
    size, batch_size = _parse_size(input_size), _parse_batch(batch)
    result = _work_on(
        "export",
        lambda: export_stage.export(
            model,
            folder,
            pipeline=pipeline,
            label_map=label_map,
            batch=batch_size,
            input_size=size,
            force=force,
        ),
    )
    _say_if_unnamed(folder)
    _print_stages(folder, {"export": result})
    _say_next(f"odtrt convert {shell_word(folder)}")


@app.command()
def convert(
    folder: Path = FolderArgument,
    opset: int = OpsetOption,
    force: bool = ForceOption,
) -> None:
    """Chapter 2: frozen graph to ONNX, compared with TensorFlow.

    **Reads** frozen.pb and spec.json of the model folder. **Writes** heads.onnx.

    **Example:** `odtrt convert out/my_model`
    """
    _require_workstation()
    from odtrt_lib import convert as convert_stage

    _require_utf8(folder)
    result = _work_on("convert", lambda: convert_stage.convert(folder, opset=opset, force=force))
    _print_stages(folder, {"convert": result})
    _say_next(f"odtrt build {shell_word(folder)}")


@app.command()
def quantise(
    folder: Path = FolderArgument,
    images: Optional[Path] = CalibrationOption,
    calibrator: Calibrator = CalibratorOption,
    ranges: Optional[Path] = RangesOption,
    in_float: List[str] = InFloatOption,
    min_box_sqnr: Optional[float] = MinBoxSqnrOption,
    count: int = CountOption,
    force: bool = ForceOption,
) -> None:
    """Chapter 6: the network in INT8.

    **Reads** heads.onnx and spec.json of the model folder, and pictures. **Writes** heads_int8.onnx, with
    QuantizeLinear and DequantizeLinear around what becomes INT8, and int8/calibration.json, the ranges.

    **Example:** `odtrt quantise out/my_model --images pictures`
    """
    from odtrt_lib import int8

    if (images is None) == (ranges is None):
        raise InputError("expected either --images FOLDER or --ranges FILE")
    pictures = int8.pictures_in(images, count) if images is not None else []
    result = _work_on(
        "quantise",
        lambda: int8.quantise(
            folder,
            pictures,
            rule=calibrator.value,
            in_float=in_float,
            ranges=ranges,
            min_box_sqnr_db=min_box_sqnr,
            force=force,
        ),
    )
    _print_stages(folder, {"quantise": result})
    if min_box_sqnr is not None:
        checks = result.record["checks"]
        found = f", {checks['box_sqnr_db']:.1f} dB measured" if "box_sqnr_db" in checks else ""
        _say(
            f"{_plural(checks['float_convolutions'], 'convolution')} in floating point; signal over noise of "
            f"the boxes: {checks['predicted_box_sqnr_db']:.1f} dB predicted{found}"
        )
    _say_next(f"odtrt build {shell_word(folder)} --precision int8")


@app.command()
def sensitivity(
    folder: Path = FolderArgument,
    images: Path = CalibrationOption,
    calibrator: Calibrator = CalibratorOption,
    count: int = CountOption,
    measured: int = MeasuredOption,
    ray: bool = RayOption,
    ray_address: Optional[str] = RayAddressOption,
    force: bool = ForceOption,
) -> None:
    """Chapter 6: which convolutions lose most in INT8.

    **Reads** heads.onnx and spec.json of the model folder, and pictures. **Writes** int8/sensitivity.json:
    the noise that each convolution adds when it alone is in INT8, and that of all but it.

    **Example:** `odtrt sensitivity out/my_model --images pictures --ray`
    """
    from odtrt_lib import int8

    cluster = _ray_address(ray, ray_address)
    pictures = int8.pictures_in(images, count)
    with _build_progress("sensitivity") as progress:
        result = int8.measure_sensitivity(
            folder,
            pictures,
            rule=calibrator.value,
            measured=measured,
            ray_address=cluster,
            force=force,
            progress=lambda done, total: progress(f"{done} of {total}", done / total),
        )
    _say_done("sensitivity", result)
    report = int8.read_report(folder, result.record["inputs"]["heads.onnx"])
    _print_ranking(report)
    kept = [word for conv in report.halving() for word in ("--in-float", shell_word(conv))]
    _say_next(" ".join(["odtrt quantise", shell_word(folder), "--images", shell_word(images), *kept]))


def _ray_address(is_local: bool, address: Optional[str]) -> Optional[str]:
    """As :func:`odtrt_lib.distribute.mapped` takes it. Refuses a cluster that does not work."""
    from odtrt_lib.distribute import LOCAL, require_cluster

    if address is None and not is_local:
        return None
    require_cluster(address or LOCAL)
    return address or LOCAL


def _print_ranking(report: Report) -> None:
    from odtrt_lib.int8.sensitivity import sqnr_db

    table = Table("block", "boxes", "classes", "boxes, all but it", "convolution", highlight=False)
    for one in report.ranking[:_MAX_CONVOLUTIONS_SHOWN]:
        decibels = [sqnr_db(noise) for noise in (one.alone.box, one.alone.classes, one.all_but.box)]
        table.add_row(one.block, *(f"{figure:.1f} dB" for figure in decibels), escape(one.conv))
    _out().print(table)
    boxes, classes = sqnr_db(report.every.box), sqnr_db(report.every.classes)
    shown = min(_MAX_CONVOLUTIONS_SHOWN, len(report.ranking))
    _say(
        f"signal over noise in INT8 on {_plural(report.measured_on, 'picture')}, the worst {shown} of "
        f"{_plural(len(report.ranking), 'convolution')}; all of them in INT8: boxes {boxes:.1f} dB, "
        f"classes {classes:.1f} dB"
    )


@app.command()
def qat(
    model: Path = ModelArgument,
    folder: Path = QuantisedArgument,
    images: Path = TrainingOption,
    output: Path = TrainedOption,
    steps: int = typer.Option(600, "--steps", min=1, help="So many steps of training."),
    batch: int = typer.Option(8, "--batch", min=1, help="So many pictures in each step."),
    learning_rate: float = typer.Option(1e-4, "--learning-rate", min=0.0, help="Adam's, at its highest."),
) -> None:
    """Chapter 6: trains the checkpoint with the rounding of INT8 in the network, so that it loses less.

    **Reads** the checkpoint, the model folder that was made from it, with heads_int8.onnx, and pictures; no
    labels. **Writes** a new model with pipeline.config and checkpoint/. When interrupted, the same command
    goes on.

    **Example:** `odtrt qat my_model out/my_model --images pictures --output my_model_qat`
    """
    _require_workstation()
    from odtrt_lib.int8 import pictures_in
    from odtrt_lib.int8 import qat as training

    pictures = pictures_in(images)
    with _progress("qat", total=steps) as advance:

        def report(progress: training.Progress) -> None:
            advance(progress.made)
            if not _out().is_terminal:
                _say(f"step {progress.step} of {steps}{progress.losses}")

        trained = training.train(
            model,
            folder,
            pictures,
            output,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            report=report,
        )
    if trained.first_loss is not None:
        _say(f"loss: {trained.first_loss:.4f} in the first steps, {trained.last_loss:.4f} in the last")
    target = shell_word(Path("out") / output.name)
    _say_next(
        f"odtrt export {shell_word(output)}, odtrt convert {target}, "
        f"odtrt quantise {target} --ranges {shell_word(output / training.RANGES)}"
    )


@app.command()
def fuse(
    folder: Path = FolderArgument,
    form: Form = FormOption,
    precision: Precision = PrecisionOption,
    force: bool = ForceOption,
) -> None:
    """Chapter 4: the post-processing into the ONNX model.

    **Reads** heads.onnx, anchors.npy and spec.json of the model folder. **Writes** detector.onnx, whose last
    node is the TensorRT plugin OdtrtDetect, or detector_onnxnms.onnx, in ONNX's own operators, for those who
    cannot load a plugin. With `--precision int8` it takes heads_int8.onnx and writes detector_int8.onnx.

    **Example:** `odtrt fuse out/my_model`, then `odtrt build out/my_model --plugin libodtrt_tensorrt.so`
    """
    from odtrt_lib import fuse as fuse_stage

    result = _work_on(
        "fuse",
        lambda: fuse_stage.fuse(folder, form=form.value, precision=precision.value, force=force),
    )
    _print_stages(folder, {"fuse": result})


@app.command()
def build(
    folder: Path = FolderArgument,
    precision: Precision = PrecisionOption,
    plugin: Optional[Path] = PluginOption,
    batches: Optional[str] = BatchesOption,
    memory: Optional[str] = MemoryOption,
    allow: List[Allowance] = AllowOption,
    version_compatible: bool = VersionCompatibleOption,
    hardware_compatible: HardwareCompatibility = HardwareCompatibleOption,
    gpu: List[str] = GpuOption,
    force: bool = ForceOption,
) -> None:
    """Chapter 3: ONNX to a TensorRT plan, inside a memory limit.

    **Reads** heads.onnx and spec.json of the model folder, or detector.onnx with `--plugin`. **Writes** a
    plan and its passport into `plans/`; plans for other versions and precisions stay beside it. With
    TensorRT-RTX it needs no GPU. Where memory does not suffice it tries again with settings that take less.

    **Example:** `odtrt build out/my_model --precision fp16 --memory 60%`
    """
    from odtrt_lib import engine

    with _build_progress("engine") as progress:
        result = engine.build(
            folder,
            precision=precision.value,
            plugin=plugin,
            batch=_parse_batches(batches),
            memory=memory,
            version_compatible=version_compatible,
            hardware_compatibility=hardware_compatible.value,
            compute_capabilities=gpu or None,
            allow=[one.value for one in allow],
            force=force,
            progress=progress,
        )
    _say_done("engine", result)
    _print_stages(folder, {"engine": result})


@app.command()
def plans(folder: Path = FolderArgument, plugin: Optional[Path] = PlanPluginOption) -> None:
    """Chapter 5: may the plans of a model folder be used here and now?

    **Reads** `plans/` and this machine. **Writes** nothing. Each plan gets one of three verdicts, with the
    reasons: ok, rebuild, or refuse. `not here` is a rebuild that could not succeed on this machine, such as
    one without a GPU. A plan whose passport is damaged or missing is never loaded.

    **Example:** `odtrt plans out/my_model`
    """
    from odtrt_lib import portability
    from odtrt_lib.engine import passport as passports

    require_folder(folder)
    found, damaged = passports.survey(folder)
    table = Table("plan", "of", "built with", "verdict", "why", title_justify="left", highlight=False)
    here = portability.this_environment(plugin)
    for one in found:
        verdict = portability.check(folder, one, here)
        table.add_row(
            one.fingerprint,
            f"{one.model}, {one.precision}",
            f"{passports.RUNTIME_LIBRARIES[one.runtime_library]} {one.version}",
            f"[{_VERDICT_COLOURS[verdict.word]}]{verdict.word}[/]",
            terminal.lines(verdict.reasons),
        )
        table.add_section()
    for name, reason in damaged.items():
        table.add_row(escape(name), "", "", "[red]refuse[/]", escape(reason))
    described = {one.plan for one in found}
    for path in sorted((folder / passports.PLANS).glob("*.plan")):
        if path.name not in described:
            table.add_row(
                escape(path.name), "", "", "[red]refuse[/]", "no passport names it: it is never loaded"
            )
    if not table.row_count:
        raise InputError(
            f"{folder / passports.PLANS}: no plan there; run `odtrt build {shell_word(folder)}` first"
        )
    _out().print(table)


@app.command()
def pack(
    folder: Path = FolderArgument,
    output: Optional[Path] = BundleOption,
    triton: bool = TritonOption,
    deepstream: bool = DeepStreamOption,
    notebooks: bool = NotebooksOption,
    target: Optional[str] = TargetOption,
    force: bool = ForceOption,
) -> None:
    """Chapter 5: one file to carry to the device.

    **Reads** the model folder. **Writes** a zip archive with the model, the device side of odtrt, the sources
    of the kernels and the plugin, and `build_here.py`, which needs no TensorFlow. Plans stay behind: they
    belong to the machine that built them.

    **Example:** `odtrt pack out/my_model -o my_model.zip`
    """
    from odtrt_lib import bundle

    archive = output or Path(f"{folder.resolve().name}{bundle.SUFFIX}")
    with _progress("pack"):
        packed = bundle.pack(
            folder,
            archive,
            triton=triton,
            deepstream=deepstream,
            notebooks=notebooks,
            target=target,
            force=force,
        )
    how = "up to date, " if packed.is_up_to_date else ""
    _say(f"{archive}: {how}{len(packed.manifest.members)} files, {_size(archive)}, SHA-256 {packed.sha256}")
    if not packed.has_postprocessing:
        _out().print(
            f"[yellow]–[/] no detector.onnx in it: run `odtrt fuse {escape(shell_word(folder))}` first for "
            "the post-processing inside the plan",
            soft_wrap=True,
            highlight=False,
        )
    _say_next(f"on the device, without odtrt or TensorFlow: python3 {shell_word(archive.name)}")


@app.command()
def unpack(
    bundle: Path = BundleArgument,
    output: Optional[Path] = UnpackOption,
    sha256: Optional[str] = Sha256Option,
    force: bool = OverwriteOption,
) -> None:
    """Chapter 5: a bundle back into a folder, every file checked against its hash.

    **Reads** the bundle. **Writes** the folder, whole or not at all. Nothing of the bundle is run; to run its
    build_here.py afterwards is to trust whoever packed it. With `--sha256` only the bundle that `odtrt pack`
    told this hash of is taken.

    **Example:** `odtrt unpack my_model.zip -o my_model`
    """
    from odtrt_lib import bundle as bundle_stage

    _require_file(bundle, "a file that `odtrt pack` wrote")
    suffix = bundle_stage.SUFFIX
    target = output or Path(bundle.name[: -len(suffix)] if bundle.name.endswith(suffix) else bundle.stem)
    with _progress("unpack"):
        manifest = bundle_stage.unpack(bundle, target, force=force, expected_sha256=sha256)
    _say(f"{target}: {len(manifest.members)} files, all as the manifest says")
    _say_next(f"cd {shell_word(target)} && python3 build_here.py")


@app.command()
def detect(
    folder: Path = FolderArgument,
    images: List[Path] = ImagesArgument,
    output: Optional[Path] = PicturesOption,
    min_score: float = MinScoreOption,
    json_file: Optional[Path] = JsonOption,
    backend: BackendName = BackendOption,
    plugin: Optional[Path] = PlanPluginOption,
) -> None:
    """Detect on pictures: a table, and the pictures with boxes drawn in.

    **Reads** spec.json, anchors.npy and heads.onnx of the model folder, and the pictures.

    **Writes** one JPEG a picture, over no file but one that it drew before. Boxes are [ymin, xmin, ymax,
    xmax] in pixels of the picture. A picture that cannot be read is left out and named at the end; the exit
    status is then 1.

    **Example:** `odtrt detect out/parts scene.jpg --min-score 0.5 --json found.json`
    """
    from odtrt_lib import written_files
    from odtrt_lib.app.demonstration import as_rows, confident
    from odtrt_lib.detector import Detector
    from odtrt_lib.plots import draw_detections

    require_folder(folder)
    for path in images:
        _require_file(path, "a picture")
    output = output or folder / "detections"
    targets = written_files.drawing_targets(images, output)
    if json_file is not None:
        written_files.require_no_input(json_file, [*images, *targets, *written_files.model_files(folder)])
    table = Table("picture", "object", "score", "box", title_justify="left", highlight=False)
    found: List[Dict[str, Any]] = []
    unreadable: Dict[Path, str] = {}
    with _progress("detect", len(images)) as advance:
        detector = Detector.open(folder, backend.value, plugin=plugin)
        for path, target in zip(images, targets):
            seen = _detect_if_readable(detector, path, unreadable)
            if seen is not None:
                image, everything = seen
                detections = confident(everything, min_score)
                written_files.write_drawing(target, draw_detections(image, detections, min_score))
                found += as_rows(str(path), detections)
                _add_to_table(table, path.name, detections)
            advance()
    _require_some(unreadable, len(images))
    if json_file is not None:
        written_files.write_json(json_file, found)
    _out().print(table)
    _say_backend(detector)
    _say_renamed(images, targets, unreadable)
    _say_undrawable(str(row["name"]) for row in found)
    seen_count = len(images) - len(unreadable)
    how_many = f"{_plural(len(found), 'detection')} with a score of at least {min_score:g}"
    _say(f"{how_many} in {_plural(seen_count, 'picture')}, drawn in {output}")
    _say_unreadable(unreadable, len(images))


def _plural(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


@app.command(name="eval")
def evaluate(
    folder: Path = FolderArgument,
    annotations: Path = AnnotationsOption,
    images: Optional[Path] = ImagesRootOption,
    limit: Optional[int] = LimitOption,
    json_file: Optional[Path] = JsonOption,
    backend: BackendName = BackendOption,
    precision: Optional[Precision] = PlanPrecisionOption,
    plugin: Optional[Path] = PlanPluginOption,
    gate: Optional[float] = GateOption,
    against: Optional[Path] = AgainstOption,
    against_backend: Optional[BackendName] = AgainstBackendOption,
    against_precision: Optional[Precision] = AgainstPrecisionOption,
    ray: bool = RayOption,
    ray_address: Optional[str] = RayAddressOption,
) -> None:
    """Accuracy on a COCO data set: mAP and its relatives, by pycocotools; with `--gate`, what was lost.

    **Reads** the model folder, a COCO instances file and its images. **Writes** nothing unless asked.

    With `--gate` or an `--against` option a reference runs on the same images. One line then says what mAP
    was lost, with its 95 % interval, and whether that is within the gate.

    A picture that cannot be read is left out of the figures and named at the end; the exit status is then 1.

    ONNX Runtime runs in one thread, so that the number of cores changes no figure; `--ray` uses all cores.

    **Example:** `odtrt eval out/my_model --annotations instances_val2017.json --images val2017 --limit 500`,
    or `odtrt eval out/my_model --annotations instances.json --backend tensorrt --precision fp16 --gate 0.5`
    """
    from odtrt_lib import written_files
    from odtrt_lib.coco import load_coco
    from odtrt_lib.evaluate import Recipe, require_limit

    cluster = _ray_address(ray, ray_address)
    recipes = [Recipe(folder, backend.value, plugin, _value(precision), threads=1)]
    if (gate, against, against_backend, against_precision) != (None,) * 4:
        by, of = _value(against_backend) or "onnxruntime", _value(against_precision) or "fp32"
        recipes.append(Recipe(against or folder, by, plugin, of, threads=1))
    if gate is not None:
        require_limit(gate)
    for recipe in recipes:
        require_folder(recipe.folder)
    coco = load_coco(annotations, images)
    if json_file is not None:
        inputs = [file for recipe in recipes for file in written_files.model_files(recipe.folder)]
        written_files.require_no_input(json_file, [annotations, *coco.paths, *inputs])
    pictures = _pictures_of(coco, limit, is_compared=len(recipes) > 1)
    detectors = [recipe.open() for recipe in recipes]
    _require_comparable(recipes, detectors, coco)
    found = _detect_by_each(recipes, detectors, pictures, cluster)
    figures = _print_figures(found, detectors, coco)
    drop, verdict = _compare_maps(found, coco, gate) if len(found) > 1 else (None, None)
    if drop is not None:
        figures["against"] = _say_drop(drop, verdict)
    if json_file is not None:
        written_files.write_json(json_file, figures)
    _say_unreadable(_unreadable(found), len(pictures))
    if verdict is not None and verdict.name != "passed":
        raise typer.Exit(1)


def _pictures_of(coco: CocoFolder, limit: Optional[int], is_compared: bool) -> List[EvaluatedPicture]:
    from odtrt_lib.evaluate import require_objects, shards

    pictures = [picture for part in shards(coco, 1, limit) for picture in part]
    if not pictures:
        raise InputError(f"{coco.annotations}: lists no images; expected at least one to evaluate")
    if is_compared:
        require_objects(coco.instances, [image_id for image_id, _ in pictures])
    return pictures


def _value(choice: Optional[Enum]) -> Optional[str]:
    return None if choice is None else choice.value


def _require_comparable(recipes: Sequence[Recipe], detectors: Sequence[Detector], coco: CocoFolder) -> None:
    """Refuses annotations of other classes, ONNX Runtime where another precision than its own was asked for,
    and a reference that is the model itself: such a comparison would pass and mean nothing."""
    for recipe, detector in zip(recipes, detectors):
        if detector.status.plan is None and recipe.precision == "fp16":
            raise InputError(
                f"{recipe.folder}: ONNX Runtime would run it, in fp32, not in {recipe.precision}; name the "
                "backend of a plan with --backend or --against-backend"
            )
    runs = {
        (recipe.folder.resolve(), one.status.plan or Variant(recipe.precision or "fp32", "heads").file)
        for recipe, one in zip(recipes, detectors)
    }
    if len(runs) < len(recipes):
        raise InputError(
            f"{recipes[0].folder}: would be compared with itself ({detectors[0].status.description}); name "
            "another backend, precision or --against folder"
        )
    names = [{label.id: label.name for label in detector.spec.labels} for detector in detectors]
    for own in names if names[0] != names[-1] else names[:1]:
        _compare_classes(own, coco.class_names, coco.annotations)


def _detect_by_each(
    recipes: Sequence[Recipe],
    detectors: Sequence[Detector],
    pictures: Sequence[EvaluatedPicture],
    ray_address: Optional[str],
) -> List[Merged]:
    """What each detector finds in the pictures: here, or in Ray's workers, which open it again."""
    from odtrt_lib.evaluate import detect_pictures, merge

    if ray_address is not None:
        # `auto` could choose something else on another machine.
        same = [
            dataclasses.replace(recipe, backend=detector.status.backend)
            for recipe, detector in zip(recipes, detectors)
        ]
        found = _detect_by_ray(same, pictures, ray_address)
        _require_some(_unreadable(found), len(pictures))
        return found
    found = []
    for detector, title in zip(detectors, ("eval", "eval, reference")):
        with _progress(title, len(pictures)) as advance:
            found.append(merge([detect_pictures(detector, pictures, advance)]))
        _require_some(_unreadable(found), len(pictures))
    return found


def _detect_by_ray(
    recipes: Sequence[Recipe], pictures: Sequence[EvaluatedPicture], ray_address: str
) -> List[Merged]:
    from odtrt_lib.distribute import mapped
    from odtrt_lib.evaluate import detect_item, merge

    parts = [pictures[i : i + _PICTURES_A_TASK] for i in range(0, len(pictures), _PICTURES_A_TASK)]
    items = [(recipe, part) for recipe in recipes for part in parts]
    with _progress("eval", len(items)) as advance:
        results = mapped(detect_item, items, ray_address, advance)
    return [merge(results[i : i + len(parts)]) for i in range(0, len(items), len(parts))]


def _unreadable(found: Sequence[Merged]) -> Dict[Path, str]:
    return {path: reason for one in found for path, reason in one.unreadable.items()}


def _usable(found: Sequence[Merged]) -> List[Identity]:
    """The images that every detector could use."""
    by_all = set.intersection(*(set(one.image_ids) for one in found))
    return [image_id for image_id in found[0].image_ids if image_id in by_all]


def _print_figures(
    found: Sequence[Merged], detectors: Sequence[Detector], coco: CocoFolder
) -> Dict[str, Any]:
    """Prints the first detector's figures, and what ran each; the figures for a JSON file."""
    from odtrt_lib.evaluate import coco_metrics

    figures = dataclasses.asdict(coco_metrics(coco.instances, found[0].detections, _usable(found)))
    per_class = figures.pop("ap_per_class")
    table = Table("figure", "value", highlight=False)
    for name, value in figures.items():
        table.add_row(_METRICS.get(name, name), f"{value:.4f}" if isinstance(value, float) else f"{value:,}")
    _out().print(table)
    for detector in detectors:
        _say_backend(detector)
    names = _distinct_names({label.id: label.name for label in detectors[0].spec.labels})
    of_class = {names.get(i, str(i)): value for i, value in per_class.items()}
    return {**figures, "ap_per_class": of_class, "unreadable": [str(path) for path in _unreadable(found)]}


def _compare_maps(
    found: Sequence[Merged], coco: CocoFolder, gate: Optional[float]
) -> Tuple[MapDrop, Optional[Verdict]]:
    from odtrt_lib.evaluate import check_limit, map_drop

    with _progress("eval, interval"):
        drop = map_drop(coco.instances, found[1].detections, found[0].detections, _usable(found))
    return drop, None if gate is None else check_limit(drop, gate)


def _say_drop(drop: MapDrop, verdict: Optional[Verdict]) -> Dict[str, Any]:
    """Prints the comparison in one line; its figures for a JSON file."""
    points, low, high = (f"{round(one, 2) + 0.0:.2f}" for one in (drop.points, drop.low, drop.high))
    line = (
        f"mAP {drop.candidate_map:.4f}, reference {drop.reference_map:.4f}; "
        f"drop {points} points [{low}, {high}] in {_plural(drop.images, 'image')}"
    )
    figures = dataclasses.asdict(drop)
    if verdict is not None:
        line += f"; gate {verdict.limit:g}: {verdict.name}"
        if verdict.name == "not shown":
            needed = verdict.images_needed
            line += ": too few images, " + (
                f"about {needed:,} are needed" if needed else "and no number is enough for a drop at the gate"
            )
        figures["gate"] = dataclasses.asdict(verdict)
    _say(line)
    return figures


@app.command()
def profile(
    folder: Path = OptionalFolderArgument,
    source: Optional[str] = SourceArgument,
    frames: int = FramesOption,
    draw: bool = DrawOption,
    backend: BackendName = BackendOption,
    plugin: Optional[Path] = PlanPluginOption,
    switches: Optional[str] = SwitchesOption,
    trace: Optional[Path] = TraceOption,
) -> None:
    """Chapter 7: where the time of a frame goes, and what of it can be avoided.

    **Reads** the model folder and the source. **Writes** latency/profile.html into the model folder: a
    picture of the frame, its steps, and the engine's layers.

    Prints the steps and one sentence: the largest cost that can be avoided, and how. It is measured with and
    without; where that cannot be done here, the sentence says `at most`.

    **Example:** `odtrt profile out/parts street.mp4 --trace frames.json`
    """
    from odtrt_lib import written_files
    from odtrt_lib.detector import Detector
    from odtrt_lib.latency import profile as profiling
    from odtrt_lib.latency import timeline

    require_folder(folder)
    wanted = _parse_switches(switches)
    if trace is not None:
        inputs = [Path(source)] if source is not None else []
        written_files.require_no_input(trace, [*inputs, *written_files.model_files(folder)])
    open_source, said = _source_to_profile(source)

    def open_with(one: Switches) -> Detector:
        return Detector.open(folder, backend.value, plugin=plugin, switches=one)

    with _progress("profile"), open_with(wanted) as detector:
        is_plan = detector.status.plan is not None
        found = profiling.profile(
            detector,
            open_source,
            frames=frames,
            draws=draw,
            reopen=open_with if is_plan else None,
            switches=wanted,
        )
    page = timeline.write_page(folder, detector.spec.name, said, found)
    if trace is not None:
        written_files.write_json(trace, timeline.chrome_trace(found))
    _print_profile(found)
    _say(profiling.sentence(found))
    _say(found.description, style="dim")
    _say(f"{said}; see {page}" + (f" and, in https://ui.perfetto.dev, {trace}" if trace else ""))


def _parse_switches(text: Optional[str]) -> Switches:
    from odtrt_lib.engine.pipeline import Switches

    parts = [] if text is None else text.split("/")
    if len(parts) not in (0, 4):
        raise InputError(f"--switches {text}: expected four of them, such as mapped/gpu/graph/gpu")
    return Switches(*parts)


def _source_to_profile(place: Optional[str]) -> Tuple[Callable[[], Source], str]:
    """What opens the source, and its description. Where no scenes can be rendered, pictures of noise do."""
    import numpy as np

    from odtrt_lib import sources

    if place is not None:
        name = sources.open_source(place)
        name.close()
        waits = ", with the wait for its frames in `capture`" if name.is_live else ""
        return lambda: sources.open_source(str(place)), f"source {name.name}{waits}"
    try:
        from odtrt_lib.scenes import TEST_SEEDS, render_scene

        images = [render_scene(seed).image for seed in TEST_SEEDS[:_PROFILED_SCENES]]
        said = "rendered scenes of 640x480 pixels in memory"
    except ImportError:
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (480, 640, 3), dtype=np.uint8) for _ in range(_PROFILED_SCENES)]
        said = "noise of 640x480 pixels in memory (scenes need OpenCV and a workstation)"

    def open_them() -> Source:
        remaining = iter(images)
        return sources.Source(said, lambda: next(remaining, None))

    return open_them, said


def _print_profile(found: Profile) -> None:
    from odtrt_lib.latency.profile import MIN_SHARE, calls_of_a_frame, duration, table
    from odtrt_lib.latency.timeline import cost_figure

    steps = Table("step", *("p50", "p95", "p99", "p99.9"), "share", highlight=False)
    frame = found.frame
    for name, timing, share in (
        *((row.step, row.timing, row.share) for row in table(found.frames)),
        ("frame", frame, 1.0),
    ):
        times = (timing.p50_us, timing.p95_us, timing.p99_us, timing.p999_us)
        steps.add_row(name, *map(duration, times), f"{share:.1%}")
    _out().print(steps)
    _say(
        f"{frame.runs} frames; p99/p50 {frame.p99_us / max(frame.p50_us, 1e-3):.2f}; jitter "
        f"{duration(found.jitter_us)} from frame to frame; p50 {duration(found.plain.p50_us)} without the "
        "recorder"
    )
    counts = {
        kind: sum(row.count for row in calls_of_a_frame(found) if row.call.kind == kind)
        for kind in ("copy", "wait", "allocation")
    }
    if any(counts.values()):
        _say("a frame makes " + ", ".join(f"{count:g} x {kind}" for kind, count in counts.items()))
    shown = [cost for cost in found.costs if cost.us >= MIN_SHARE * frame.p50_us]
    if len(shown) > 1:
        costs = Table("can be avoided", "how", "a frame", highlight=False)
        for cost in shown:
            costs.add_row(escape(cost.what), escape(cost.remedy), cost_figure(cost.us, cost.is_measured))
        _out().print(costs)


@app.command()
def doctor() -> None:
    """What is installed here, what works, and the command that installs what is missing.

    **Reads** the installed packages (each is really imported, in a process of its own), GPU, disk, memory.
    **Writes** nothing.

    **Example:** `odtrt doctor`
    """
    from odtrt_lib.app import doctor as examination

    with _progress("looking at what is installed"):
        machine = examination.machine()
        findings = examination.packages()
        chapters = examination.chapters(findings)
    of_machine = Table(show_header=False, title="This machine", title_justify="left", highlight=False)
    for name, text in machine.items():
        of_machine.add_row(name, escape(text))
    of_packages = Table(
        "package", "version", "install", title="Packages", title_justify="left", highlight=False
    )
    for finding in findings:
        is_fine = finding.version is not None
        version = (
            f"[green]{escape(finding.version or '')}[/]" if is_fine else f"[red]{escape(finding.problem)}[/]"
        )
        of_packages.add_row(finding.package.name, version, "" if is_fine else escape(finding.package.install))
    of_chapters = Table("part", "works", "what to do", title="odtrt", title_justify="left", highlight=False)
    for chapter in chapters:
        verdict = (
            f"[red]no: needs {escape(', '.join(chapter.missing))}[/]" if chapter.missing else "[green]yes[/]"
        )
        of_chapters.add_row(chapter.title, verdict, escape("; ".join(chapter.install) or chapter.note))
    for table in (of_machine, of_packages, of_chapters):
        _out().print(table)


@app.command()
def soak(
    folder: Path = SoakFolderArgument,
    source: Optional[str] = CameraArgument,
    hours: Optional[float] = HoursOption,
    minutes: Optional[float] = MinutesOption,
    faults: Optional[str] = FaultsOption,
    resume: bool = ResumeOption,
    output: Optional[Path] = SoakOption,
    backend: BackendName = BackendOption,
    plugin: Optional[Path] = PlanPluginOption,
) -> None:
    """Chapter 7: the detector on a camera for days: does memory grow, do results drift, does anything stall?

    **Reads** the model folder and the source. **Writes** report.html and soak.json, and while it runs a
    checkpoint each minute, from which `--resume` goes on.

    The detector runs in a process of its own, which is started again if it hangs or dies. The exit status is
    1 unless the verdict is `steady`.

    **Example:** `odtrt soak out/parts --minutes 20 --faults standard`, or `odtrt soak out/parts csi:0`
    """
    from odtrt_lib.latency import soak as soaking
    from odtrt_lib.latency.soak_report import write_soak
    from odtrt_lib.latency.verdict import checks_of, overall

    require_folder(folder)
    seconds = _soak_seconds(hours, minutes)
    output = output or folder / "soak"
    job = _soak_job(folder, source, faults, output, backend.value, plugin)
    settings = {
        "model": folder.resolve().name,
        "source": source or "rendered scenes",
        "faults": faults or "",
        "backend": backend.value,
    }
    with _build_progress("soak") as progress:
        tools = soaking.Tools(progress=progress, say=_say)
        record = soaking.soak(job, output, seconds, settings, resume=resume, tools=tools)
    page = write_soak(record, output)
    checks = checks_of(record)
    table = Table("judged", "verdict", "figures", title_justify="left", highlight=False)
    for one in checks:
        table.add_row(
            one.name, f"[{_VERDICT_COLOURS.get(one.verdict, 'red')}]{one.verdict}[/]", escape(one.text)
        )
    _out().print(table)
    _say(record.description, style="dim")
    verdict = overall(checks)
    _say(f"{verdict}; report: {page}")
    if verdict != "steady":
        raise typer.Exit(1)


def _soak_seconds(hours: Optional[float], minutes: Optional[float]) -> float:
    if hours is not None and minutes is not None:
        raise InputError("--hours and --minutes: expected one of the two")
    seconds = 60 * minutes if minutes is not None else 3600 * (_SOAK_HOURS if hours is None else hours)
    if not seconds:
        raise InputError("0 minutes: expected more")
    return seconds


def _soak_job(
    folder: Path,
    source: Optional[str],
    faults: Optional[str],
    output: Path,
    backend: str,
    plugin: Optional[Path],
) -> Job:
    """What the soak's worker process does; pictures are rendered if no source is named."""
    from odtrt_lib.app import demonstration
    from odtrt_lib.detector import Detector
    from odtrt_lib.latency import belt
    from odtrt_lib.latency.soak import CANARY
    from odtrt_lib.latency.worker import Job

    schedule = None if faults is None else belt.parse_faults(faults)
    if source is None:
        scenes = demonstration.unseen_scenes(folder, _SOAK_SCENES) if _is_workstation() else []
        if not scenes:
            raise InputError(
                "no source; name a folder of pictures, a camera such as 0 or csi:0, or rtsp://..."
            )
        source = str(demonstration.keep(output, scenes))
    recipe = functools.partial(Detector.open, folder, backend, plugin=plugin)
    return Job(recipe, belt.source_of(source), output / CANARY, faults=schedule)


@zoo_app.command(name="list")
def zoo_list() -> None:
    """The models that can be had, with the accuracy that the zoo publishes for them.

    **Example:** `odtrt zoo list`
    """
    from odtrt_lib import zoo

    table = Table("name", "COCO mAP", highlight=False)
    for model in zoo.MODELS:
        table.add_row(model.name, f"{model.coco_map:.1f}")
    _out().print(table)


@zoo_app.command(name="get")
def zoo_get(
    name: str = ZooNameArgument,
    output: Path = ZooFolderOption,
) -> None:
    """Download one model and check it.

    **Reads** download.tensorflow.org. **Writes** DIR/NAME, and its archive's SHA-256 to DIR/zoo.json: the
    zoo publishes no checksums, so a first download is taken on trust and later ones must equal it.

    **Example:** `odtrt zoo get ssd_mobilenet_v2_fpnlite_320x320_coco17_tpu-8`
    """
    from odtrt_lib import zoo

    model = zoo.find(name)
    with _bytes_progress(name) as progress:
        download = zoo.get(model, output, progress=progress)
    if download.is_up_to_date:
        message = "is there already; delete it to download it again"
    elif download.is_first:
        message = f"SHA-256 {download.sha256}, taken on trust and recorded in {output / zoo.CHECKSUMS}"
    else:
        message = f"SHA-256 {download.sha256}, as expected"
    _say(f"{download.path}: {message}")
    _say_next(f"odtrt run {shell_word(download.path)}")


_VERDICT_COLOURS = {
    "steady": "green",
    "undecided": "yellow",
    "ok": "green",
    "rebuild": "yellow",
    "not here": "yellow",
    "refuse": "red",
}
_METRICS = {
    "map": "mAP (IoU 0.50:0.95)",
    "map50": "mAP at IoU 0.50",
    "map75": "mAP at IoU 0.75",
    "map_small": "mAP, small objects",
    "map_medium": "mAP, medium objects",
    "map_large": "mAP, large objects",
    "ar1": "recall, 1 detection an image",
    "ar10": "recall, 10 detections an image",
    "ar100": "recall, 100 detections an image",
    "ar_small": "recall, small objects",
    "ar_medium": "recall, medium objects",
    "ar_large": "recall, large objects",
}


def _add_to_table(table: Table, picture: str, detections: Detections) -> None:
    if not detections.names:
        table.add_row(escape(picture), "nothing found", "", "")
    for i, name in enumerate(detections.names):
        box = ", ".join(f"{side:.0f}" for side in detections.boxes[i])
        first = escape(picture) if i == 0 else ""
        table.add_row(first, escape(name), f"{detections.scores[i]:.3f}", f"{escape('[')}{box}]")


def _detect_if_readable(
    detector: Detector, path: Path, unreadable: Dict[Path, str]
) -> Optional[Tuple[np.ndarray, Detections]]:
    """The picture and what is in it; None, with the reason in ``unreadable``, where it cannot be used."""
    from odtrt_lib.evaluate import detect_file

    try:
        return detect_file(detector, path)
    except InputError as error:
        unreadable[path] = str(error)
        return None


def _require_some(unreadable: Dict[Path, str], count: int) -> None:
    if len(unreadable) == count:
        more = f"; the other {count - 1} could not be used either" if count > 1 else ""
        raise InputError(f"{next(iter(unreadable.values()))}{more}")


def _say_unreadable(unreadable: Dict[Path, str], count: int) -> None:
    """Names the pictures that were left out, and ends the command with status 1 if there are any."""
    if not unreadable:
        return
    _say_error(f"error: {len(unreadable)} of {count} pictures could not be used and were left out:")
    for reason in list(unreadable.values())[:_MAX_UNREADABLE_NAMED]:
        _say_error(reason)
    if len(unreadable) > _MAX_UNREADABLE_NAMED:
        _say_error(f"and {len(unreadable) - _MAX_UNREADABLE_NAMED} more")
    raise typer.Exit(1)


def _say_renamed(images: Sequence[Path], targets: Sequence[Path], unreadable: Dict[Path, str]) -> None:
    for path, target in zip(images, targets):
        if path not in unreadable and target.stem != path.stem:
            _say(f"– {path} is drawn in {target.name}: {path.stem}.jpg is another file")


def _say_undrawable(names: Iterable[str]) -> None:
    from odtrt_lib.fonts import undrawable

    lacking = undrawable(names)
    if lacking:
        _say(
            f"– drawn in other letters, because no font here has their own: {_some(lacking)}; install one, "
            "such as `apt install fonts-noto-core fonts-noto-cjk`",
        )


def _distinct_names(names: Dict[int, str]) -> Dict[int, str]:
    """Names as keys: where two classes have the same name, each with its id."""
    every = list(names.values())
    return {i: name if every.count(name) == 1 else f"{name} ({i})" for i, name in names.items()}


@contextlib.contextmanager
def _printable_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):
            shown = printable(error.format_message())
            error.format_message = lambda: shown
        raise


def _is_workstation() -> bool:
    return (Path(IMPORT_PATH) / "odtrt_lib" / "export").is_dir()


def _require_workstation() -> None:
    package = Path(IMPORT_PATH) / "odtrt_lib"
    if not _is_workstation():
        raise MissingDependencyError(
            f"{package}: the device side of odtrt, without export, convert and qat: run them on a "
            "workstation, from a checkout of odtrt; build, detect and eval work here"
        )
    if sys.version_info < _PYTHON_OF_TENSORFLOW:
        raise MissingDependencyError(
            f"this is Python {sys.version_info[0]}.{sys.version_info[1]}, export and convert need "
            f"{'.'.join(map(str, _PYTHON_OF_TENSORFLOW))} or newer: run them on another machine and copy the "
            "model folder here; build, detect and eval work here"
        )


def _parse_batches(text: Optional[str]) -> Optional[Tuple[int, ...]]:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*", text):
        raise InputError(f"--batches {text}: expected the smallest, the best and the largest, such as 1,4,8")
    return tuple(int(size) for size in text.split(","))


def _require_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: {'a folder' if path.is_dir() else 'not found'}; expected {expected}")


def _require_utf8(*paths: Optional[Path]) -> None:
    for path in paths:
        if path is not None and not is_utf8(path):
            raise InputError(
                f"{path}: its name has bytes that are not UTF-8, and TensorFlow opens no such path; "
                "rename the folder"
            )


def _model_name(model: Path) -> str:
    """A folder's own name; for a checkpoint, or a part of an exported model, that of the model's folder."""
    path = model.resolve()
    if path.is_file() or Path(f"{path}.index").is_file():
        path = path.parent
    while path.name in ("checkpoint", "saved_model", "variables"):
        path = path.parent
    return path.name or "model"


def _parse_size(text: Optional[str]) -> Optional[Tuple[int, int]]:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text)
    if not match:
        raise InputError(f"--input-size {text}: expected height x width, such as 512x640")
    return int(match.group(1)), int(match.group(2))


def _parse_batch(text: str) -> Optional[int]:
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--batch {text}: expected a number of at least 1, or `dynamic`")
    return int(text)


def _say_if_unnamed(folder: Path) -> None:
    from odtrt_lib.spec import load_spec

    if not (folder / "spec.json").is_file():
        return
    labels = load_spec(folder / "spec.json").labels
    unnamed = sum(label.name == f"class {label.id}" for label in labels)
    if unnamed:
        message = f"{unnamed} of {len(labels)} classes have no name; name their label map with --label-map"
        _out().print(f"[yellow]–[/] labels: {message}", soft_wrap=True, highlight=False)


def _say_backend(detector: Detector) -> None:
    """What ran the network and, where a plan was passed over, why."""
    status = detector.status
    lines = [status.description, *status.reasons, *([status.message] if status.message else [])]
    for line in lines:
        _say(line, style="dim")


def _say_next(command: str) -> None:
    if command.startswith("odtrt ") and shutil.which("odtrt") is None:
        command = f"{sys.argv[0]}{command[len('odtrt') :]}"
    _say(f"next: {command}", style="dim")


def _print_traceback_if_asked() -> None:
    if os.environ.get("ODTRT_TRACEBACK", "") not in ("", "0"):
        traceback.print_exc()


def _compare_classes(own: Dict[int, str], theirs: Dict[int, str], annotations: Path) -> None:
    """Refuses annotations without any class id of the detector, and names ids that mean something else."""
    shared = sorted(own.keys() & theirs.keys())
    if not shared:
        raise InputError(
            f"{annotations}: category ids {_some(sorted(theirs))}, none of which the detector has "
            f"({_some(sorted(own))}); evaluate on annotations of the classes that it was trained on"
        )
    for i in shared:
        if own[i].lower() != theirs[i].lower():
            _out().print(
                f"[yellow]–[/] eval: class {i} is {escape(own[i])} in the model and {escape(theirs[i])} in "
                f"{escape(annotations.name)}",
                soft_wrap=True,
                highlight=False,
            )


def _some(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:5])) + (", ..." if len(items) > 5 else "")


def _work_on(name: str, work: Callable[[], StageResult]) -> StageResult:
    with _progress(name), _without_tensorflow_log():
        result = work()
    _say_done(name, result)
    return result


def _say(line: object, style: Optional[str] = None) -> None:
    """Prints a line as it is, however long, without markup."""
    _out().print(line, style=style, soft_wrap=True, markup=False, highlight=False)


def _say_done(name: str, result: StageResult) -> None:
    how = "up to date" if result.is_up_to_date else f"{result.record['seconds']:.1f} s"
    _out().print(f"[green]✓[/] {name}: {how}", soft_wrap=True, highlight=False)
    if result.note:
        _say(result.note)


def _say_skipped(name: str, reason: str) -> None:
    _out().print(f"[yellow]–[/] {name}: skipped: {escape(reason)}", soft_wrap=True, highlight=False)


@contextlib.contextmanager
def _without_tensorflow_log() -> Iterator[None]:
    """Keeps TensorFlow's INFO and WARNING lines, which heed no log level, from the terminal.

    A process filters them, not a thread: what a crash says last must still get through.
    """
    sys.stderr.flush()
    command = ["grep", "--line-buffered", "-vE", _TENSORFLOW_LOG]
    try:
        stderr = os.dup(2)
        grep = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr, start_new_session=True)
    except OSError:
        yield
        return
    assert grep.stdin is not None
    os.dup2(grep.stdin.fileno(), 2)
    grep.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        with contextlib.suppress(subprocess.TimeoutExpired):
            grep.wait(timeout=10)


@contextlib.contextmanager
def _progress(title: str, total: Optional[int] = None) -> Iterator[Callable[..., None]]:
    """A spinner with the time that passed or, with a total, a bar; a plain line where nobody watches.

    Yields a function that moves the bar by one, or by the number that it is given.
    """
    console = _out()
    if not console.is_terminal:
        console.print(f"{title} ...", markup=False, highlight=False)
        yield lambda steps=1: None
        return
    columns = (BarColumn(), MofNCompleteColumn()) if total else ()
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        *columns,
        TimeElapsedColumn(),
        transient=True,
        console=console,
    )
    with progress:
        task = progress.add_task(title, total=total)
        yield lambda steps=1: progress.advance(task, steps)


@contextlib.contextmanager
def _build_progress(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar that names the builder's phase; its share of the whole is the builder's own estimate."""
    console = _out()
    if not console.is_terminal:
        console.print(f"{title} ...", markup=False, highlight=False)
        yield lambda phase, fraction: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True, console=console) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda phase, fraction: progress.update(
            task, description=printable(f"{title}: {phase}"), completed=fraction
        )


@contextlib.contextmanager
def _bytes_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import DownloadColumn, TransferSpeedColumn

    console = _out()
    if not console.is_terminal:
        console.print(f"{title} ...", markup=False, highlight=False)
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


def _print_stages(folder: Path, results: Dict[str, StageResult]) -> None:
    from odtrt_lib.report import figures, undecided

    table = Table("stage", "came out", "checked", "time", title=escape(str(folder)), title_justify="left")
    for name, result in results.items():
        record = result.record
        outputs = terminal.lines(f"{output} {_size(folder / output)}" for output in record["outputs"])
        shown = _SHOWN_CHECKS.get(name, ("",))
        checks = terminal.lines(
            f"{check}: {figure}"
            for check, figure in figures(record["checks"])
            if any(words in check for words in shown)
        )
        duration = "up to date" if result.is_up_to_date else f"{record['seconds']:.1f} s"
        table.add_row(name, outputs, checks, duration)
        table.add_section()
    _out().print(table)
    for name, result in results.items():
        unseen = undecided(result.record["checks"])
        if unseen:
            _out().print(f"{name}: {unseen[1]}", style="yellow", markup=False, highlight=False)


def _size(path: Path) -> str:
    from rich.filesize import decimal

    return decimal(path.stat().st_size)


if __name__ == "__main__":
    main()
