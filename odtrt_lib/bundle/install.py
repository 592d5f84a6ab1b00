"""Builds, on the device, the library, the plugin and the plans of an unpacked bundle.

It first says which packages are missing, and only then imports odtrt's other modules, which need numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from odtrt_lib import IMPORT_PATH, requirements
from odtrt_lib.bundle.archive import (
    MODEL,
    PLUGIN,
    exit_status,
    refuse_impostors,
    seal_model,
    strangers,
    verify,
)
from odtrt_lib.bundle.detecting import BUILT, DRAWN, detection_table
from odtrt_lib.bundle.prebuilt import LIBRARIES, PREBUILT, use_prebuilt
from odtrt_lib.errors import (
    BuildError,
    CheckError,
    InputError,
    MissingDependencyError,
    one_line,
    printable,
    shell_word,
)
from odtrt_lib.folder import (
    atomic_write,
    cannot_write,
    ctrl_c_later,
    recorded,
)
from odtrt_lib.machine import this_machine
from odtrt_lib.spec import DetectorSpec, load_spec
from odtrt_lib.variants import PRECISIONS

if TYPE_CHECKING:
    from odtrt_lib.detector import Detections
    from odtrt_lib.engine.passport import Passport

_INSTALL_NUMPY = "`sudo apt install python3-numpy`, or `python3 -m pip install numpy`"


def build_here(
    folder: Union[str, Path],
    *,
    precision: str = "fp32",
    memory: Optional[str] = None,
    image: Union[str, Path, None] = None,
    output: Union[str, Path, None] = None,
    batch: Optional[Sequence[int]] = None,
    allow: Sequence[str] = (),
    version_compatible: bool = False,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Dict[str, Any]:
    """Builds what belongs to this machine from an unpacked bundle, and detects once as a check.

    It compiles the kernels. If there is a GPU, it also compiles the CUDA kernels, and the TensorRT plugin
    with this machine's own headers. It compiles nothing if the bundle has libraries that were compiled for
    this board. It builds a plan of ``detector.onnx`` if there is a plugin, and of
    ``heads.onnx`` if there is none or Triton is to serve it. It runs the detector on ``image``; without one,
    on a pattern. It says what was found in the image, and draws it into a copy in the folder ``output``, by
    default ``detections`` in the bundle. It replaces no file that it did not draw before. precision, memory,
    batch, allow, version_compatible, force: see :func:`odtrt_lib.engine.build`. say: is called with each line
    about what was done, what could not be done, and last, how the detector is opened here.

    Returns the content of ``built.json``: ``precision`` (of the plan; fp16 if ``allow`` let it replace fp32),
    ``plans`` (model -> path in the folder), ``library`` and ``plugin`` (such paths, or None), ``serving``
    (copies of plans for Triton and DeepStream), ``backend``, ``open`` (the Python expression that opens the
    detector in this folder), ``image``, ``drawn`` (the picture with boxes, or None) and ``detections``:
    ``class_id``, ``name``, ``score`` and ``box``, ``[ymin, xmin, ymax, xmax]`` in pixels.

    Raises InputError if the bundle is not as packed, an argument is malformed or the folder cannot be
    written; MissingDependencyError, naming every missing Python module and what installs it; BuildError if
    the compiler fails; CheckError if a detection is impossible; and what :func:`odtrt_lib.engine.build` and
    :class:`odtrt_lib.detector.Detector` raise.

    Long because its options, result and errors are described here.
    """
    folder = Path(folder)
    spec = _open_bundle(folder, say)
    if _can_find("numpy"):
        _check_arguments(spec, precision, memory, batch, allow)
    _require_modules(folder, precision, say)

    from odtrt_lib.fonts import require_letters
    from odtrt_lib.preprocess import load_image

    pixels = _pattern(spec) if image is None else load_image(image)
    if image is not None:
        require_letters()
    try:
        library, plugin = _libraries(folder, say)
    except OSError as error:
        raise cannot_write(folder / "plugins" / "build", error) from error
    options = {
        "precision": precision,
        "batch": batch,
        "memory": memory,
        "version_compatible": version_compatible,
        "allow": allow,
        "force": force,
    }
    plans = _build_plans(folder, plugin, options, say)
    serving = _serve_plans(folder, plans, say)
    shown = "a pattern" if image is None else str(image)
    found, backend, opening = _detect_once(folder, plans, pixels, shown, say)
    drawn = None
    if image is not None:
        drawn = _show(Path(image), pixels, found, folder / DRAWN if output is None else Path(output), say)
    else:
        say(
            "the pattern is computed from the pixels' positions, no photograph: what is found in it shows "
            "that everything runs, and nothing else; --image FILE detects in a picture"
        )
    built = {
        "precision": plans.passport.precision,
        "plans": {name: _inside(path, folder) for name, path in plans.paths.items()},
        "library": None if library is None else _inside(library, folder),
        "plugin": None if plugin is None else _inside(plugin, folder),
        "serving": [_inside(path, folder) for path in serving],
        "backend": backend,
        "open": opening,
        "image": None if image is None else str(image),
        "drawn": None if drawn is None else str(drawn),
        "detections": [
            {"class_id": int(class_id), "name": name, "score": float(score), "box": [float(x) for x in box]}
            for class_id, name, score, box in zip(found.class_ids, found.names, found.scores, found.boxes)
        ],
    }
    with atomic_write(folder / BUILT) as temporary:
        temporary.write_text(json.dumps(built, indent=1) + "\n", encoding="utf-8")
    say(f"to see more: python3 {shell_word(folder / 'detect.py')} PICTURE, or --camera 0")
    say(f"next, in Python, in {folder}:")
    say("from odtrt_lib.detector import Detector")
    say(f"detector = {opening}")
    return built


def _open_bundle(folder: Path, say: Callable[[str], None]) -> DetectorSpec:
    """Compares the folder with its manifest, and seals its model if no record does; returns the spec."""
    manifest = verify(folder)
    say(f"{manifest.name}: {len(manifest.members)} files as packed by odtrt {manifest.odtrt}")
    others = strangers(folder, manifest)
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        say(f"not from this bundle: {', '.join(map(repr, others[:5]))}{more}")
    refuse_impostors(folder, others)
    model = folder / MODEL
    if not recorded(model):  # another program than odtrt unpacked it
        seal_model(model, manifest)
    return load_spec(model / "spec.json")


def _require_modules(folder: Path, precision: str, say: Callable[[str], None]) -> None:
    missing = missing_modules(precision)
    for name, advice in missing.items():
        say(f"missing: {name} ({advice})")
    if missing:
        raise MissingDependencyError(f"{folder}: nothing was built; install first: {', '.join(missing)}")


@dataclasses.dataclass(frozen=True)
class _Plans:
    """The plans of this machine. paths: model -> its plan. passports: model -> the plan's passport.

    served: the model whose plan the detector runs. plugin: the library that this plan needs, or None.
    """

    paths: Dict[str, Path]
    passports: Dict[str, Passport]
    served: str
    plugin: Optional[Path]

    @property
    def passport(self) -> Passport:
        """The passport of the plan that the detector runs."""
        return self.passports[self.served]


def _build_plans(
    folder: Path, plugin: Optional[Path], options: Mapping[str, Any], say: Callable[[str], None]
) -> _Plans:
    """Builds the plan that the detector runs, and that of ``heads.onnx`` if Triton is to serve it.

    options: arguments of :func:`odtrt_lib.engine.build`.
    """
    from odtrt_lib import engine

    model = folder / MODEL
    used = plugin if (model / "detector.onnx").is_file() else None
    served = "heads.onnx" if used is None else "detector.onnx"
    results = {}
    for name in ("heads.onnx", "detector.onnx"):
        if name == served or (name == "heads.onnx" and (folder / "triton").is_dir()):
            inside = plugin if name == "detector.onnx" else None
            results[name] = engine.build(model, plugin=inside, progress=_in_tenths(name, say), **options)
    paths: Dict[str, Path] = {}
    for name, result in results.items():
        paths[name] = next(model / output for output in result.record["outputs"] if output.endswith(".plan"))
        say(f"{paths[name]}: {'up to date' if result.is_up_to_date else 'built'} from {name}")
    passport_of = {one.plan: one for one in engine.passport.passports(model)}
    plans = _Plans(paths, {name: passport_of[path.name] for name, path in paths.items()}, served, used)
    if plans.passport.precision != options["precision"]:
        say(
            f"{served}: the plan is {plans.passport.precision}; the memory did not suffice for "
            f"{options['precision']}"
        )
    return plans


def _serve_plans(folder: Path, plans: _Plans, say: Callable[[str], None]) -> List[Path]:
    """Copies the plans to where Triton and nvinfer expect them; says if Triton's batch is too large."""
    serving = _place_plans(folder, plans.paths, plans.passport.runtime_library, say)
    for configuration in sorted({path.parent.parent / "config.pbtxt" for path in serving}):
        if configuration.is_file():
            sizes = plans.passports["heads.onnx"].settings["batch_min_opt_max"]
            _compare_batch(configuration, sizes[-1], say)
    return serving


def _detect_once(
    folder: Path, plans: _Plans, pixels: Any, shown: str, say: Callable[[str], None]
) -> Tuple[Detections, str, str]:
    """Opens the detector, with the plan if there is one, and checks what it finds in ``pixels``, uint8 [H, W,
    3].

    shown: what messages call the image. Returns the detections, the backend, and the Python expression that
    opens the detector in ``folder``.
    """
    from odtrt_lib.detector import Detector

    # Not "auto", which would use ONNX Runtime if the new plan does not run.
    has_gpu = this_machine().gpu is not None
    backend = plans.passport.runtime_library if has_gpu else "onnxruntime"
    used, precision = plans.plugin, plans.passport.precision
    with Detector.open(folder / MODEL, backend, plugin=used, precision=precision) as detector:
        found = detector.detect(pixels)
        _check_detections(found, pixels.shape[:2], detector.spec)
    opening = f'Detector.open("{MODEL}")'
    if has_gpu:
        plugin_there = "" if used is None else f'plugin="{_inside(used, folder)}", '
        opening = f'Detector.open("{MODEL}", {plugin_there}precision="{precision}")'
        say(
            f"check: {len(found.scores)} detections in {shown}, made by the plan of {plans.served} with "
            f"{backend}"
        )
    else:
        say(f"no NVIDIA GPU here: the plan of {plans.served} was built but not run")
        say(f"check: {len(found.scores)} detections in {shown}, made by ONNX Runtime on the CPU")
    return found, backend, opening


def _has_cuda_runtime() -> bool:
    try:
        from odtrt_lib import cuda

        cuda.library()
    except ImportError:
        return True  # without numpy this cannot be known
    except MissingDependencyError:
        return False
    return True


def missing_modules(precision: str) -> Dict[str, str]:
    """The Python modules and libraries that ``build_here`` lacks here, each with what installs it.

    A plan needs the CUDA runtime for its device memory. Without a GPU, ONNX Runtime detects instead. A
    TensorRT with strongly typed networks (9 and newer) needs onnx, which writes half precision into the
    model. The table in :mod:`odtrt_lib.requirements` says which part needs what; only --image needs Pillow.
    """
    missing = {}
    if not _can_find("numpy"):
        missing["numpy"] = _INSTALL_NUMPY
    runtime_library = next((name for name in ("tensorrt", "tensorrt_rtx") if _can_find(name)), None)
    if runtime_library is None:
        missing["TensorRT's Python module"] = (
            "on a Jetson `sudo apt install nvidia-jetpack`, and make virtual environments with "
            "--system-site-packages; on a PC `python3 -m pip install tensorrt`"
        )
    needs = dict.fromkeys(requirements.modules(requirements.BUILD), "to build a plan")
    if this_machine().gpu is not None:
        if not _has_cuda_runtime():
            missing["the CUDA runtime library libcudart.so"] = (
                "to run a plan: on a Jetson `sudo apt install nvidia-jetpack`, on a PC the CUDA toolkit; put "
                "its lib64 into LD_LIBRARY_PATH"
            )
    else:
        needs.update(dict.fromkeys(requirements.modules(requirements.DETECT), "to detect without a GPU"))
        del needs["PIL"]
    half = requirements.modules(requirements.HALF_PRECISION)
    if (
        precision == "fp16"
        and not all(map(_can_find, half))
        and not _has_half_precision_flag(runtime_library)
    ):
        needs.update(dict.fromkeys(half, "for fp16"))
    del needs["numpy"]  # is listed first, with its own advice
    for module, purpose in needs.items():
        if not _can_find(module):
            package = module.replace("_", "-")
            missing[package] = f"{purpose}: `python3 -m pip install {package}`"
    return missing


def run_build_here(arguments: Sequence[str]) -> int:
    """Runs ``python3 build_here.py``: :func:`build_here` for the script's own folder; returns the exit
    status."""
    options = _parser().parse_args(arguments[1:])
    folder = Path(arguments[0]).resolve().parent

    def say(line: str) -> None:
        print(printable(line), flush=True)

    def work() -> Optional[int]:
        if options.needs:
            return _tell_needs(options.precision, say)
        if options.plans:
            _tell_plans(folder, say)
            return None
        build_here(
            folder,
            precision=options.precision,
            memory=options.memory,
            image=options.image,
            output=options.output,
            batch=_parse_batches(options.batches),
            allow=options.allow,
            version_compatible=options.version_compatible,
            force=options.force,
            say=say,
        )
        return None

    return exit_status(work, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 build_here.py",
        description="Compiles the kernels, builds the plan for this machine, and detects once as a check.",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--needs", action="store_true", help="build nothing; say what is missing here")
    only.add_argument("--plans", action="store_true", help="build nothing; say which plans are usable here")
    parser.add_argument("--precision", default="fp32", help="of the plan: fp32 (default) or fp16")
    parser.add_argument(
        "--memory", help="the most that the build may take: 1500MiB, 2GiB, or 60%% of what is free"
    )
    parser.add_argument(
        "--batches",
        metavar="MIN,OPT,MAX",
        help="smallest, best-tuned and largest batch of a model with a dynamic one, e.g. 1,4,8",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="WHAT",
        help="where the memory does not suffice: fp32 or dynamic_batch; can be given several times",
    )
    parser.add_argument(
        "--version-compatible", action="store_true", help="newer TensorRT versions can load the plan too"
    )
    parser.add_argument("--force", action="store_true", help="build the plan again, even if nothing changed")
    parser.add_argument("--image", help="a JPEG, PNG or BMP file to detect in; needs Pillow")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="where that picture goes, with boxes (default: detections, here)",
    )
    return parser


def _check_arguments(
    spec: DetectorSpec,
    precision: str,
    memory: Optional[str],
    batch: Optional[Sequence[int]],
    allow: Sequence[str],
) -> None:
    """Raises what :func:`odtrt_lib.engine.build` would raise, before the compiler runs for minutes."""
    from odtrt_lib import engine

    _check_precision(precision)
    for one in allow:
        if one not in engine.ALLOWABLE:
            raise InputError(f"allow {one!r}: expected {' or '.join(engine.ALLOWABLE)}")
    if memory is not None:
        engine.parse_memory(memory)
    if batch is None:
        return
    sizes, fixed = list(batch), spec.input.batch
    if len(sizes) != 3 or not all(size > 0 for size in sizes) or sorted(sizes) != sizes:
        raise InputError(f"batches {_batches(sizes)}: {_EXPECTED_BATCHES}")
    if fixed is not None and sizes != [fixed] * 3:
        raise InputError(
            f"batches {_batches(sizes)}: this model's batch is fixed to {fixed}; leave them out, or "
            "`odtrt export --batch dynamic` and pack again"
        )


_EXPECTED_BATCHES = "expected smallest, best-tuned and largest, e.g. 1,4,8"


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: expected {' or '.join(PRECISIONS)}")


def _batches(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))


def _parse_batches(text: Optional[str]) -> Optional[Tuple[int, ...]]:
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise InputError(f"batches {text!r}: {_EXPECTED_BATCHES}")
    return tuple(int(number) for number in text.split(","))


def _tell_needs(precision: str, say: Callable[[str], None]) -> int:
    """Says what is missing here, one line each. Returns the exit status: 1 if ``build_here`` cannot run."""
    if _can_find("numpy"):
        _check_precision(precision)
    missing = missing_modules(precision)
    for name, advice in missing.items():
        say(f"missing: {name} ({advice})")
    for name, advice in _missing_programs().items():
        say(f"missing, but not needed: {name} {advice}")
    if not missing:
        say(f"nothing that {precision} needs is missing")
    return 1 if missing else 0


def _tell_plans(folder: Path, say: Callable[[str], None]) -> None:
    """Says of each plan in the bundle whether it may be used here now, with a line for each reason."""
    if not _can_find("numpy"):
        raise MissingDependencyError(f"numpy is missing: {_INSTALL_NUMPY}")
    from odtrt_lib import portability
    from odtrt_lib.engine import passport

    model, plugin = folder / MODEL, folder / PLUGIN
    here = portability.this_environment(plugin if plugin.is_file() else None)
    found, damaged = passport.survey(model)
    for one in found:
        verdict = portability.check(model, one, here)
        say(f"{one.plan} ({one.model}, {one.precision}): {verdict.word}")
        for reason in verdict.reasons:
            say(f"    {reason}")
    for name, reason in damaged.items():
        say(f"{name}: refuse")
        say(f"    {reason}")
    known = {one.plan for one in found}
    for path in sorted((model / passport.PLANS).glob("*.plan")):
        if path.name not in known:
            say(f"{path.name}: refuse")
            say("    no readable passport names this file: it is not used, and can be deleted")
    if not found and not damaged:
        raise InputError(f"{model / passport.PLANS}: no plan that can be used; run build_here.py first")


def _has_half_precision_flag(runtime_library: Optional[str]) -> bool:
    """Whether TensorRT has the builder flag for half precision. Asks in another process, because the building
    process should be the first to load TensorRT."""
    question = (
        f"import sys; sys.path.insert(0, {IMPORT_PATH!r}); "
        f"import {runtime_library} as trt; from odtrt_lib.engine.builder import is_weakly_typed; "
        "sys.exit(not is_weakly_typed(trt))"
    )
    if runtime_library is None:
        return False
    return subprocess.run([sys.executable, "-c", question], stderr=subprocess.DEVNULL).returncode == 0


def _can_find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _missing_programs() -> Dict[str, str]:
    """The missing programs that compilation needs, each with what installs it and what is lost without it."""
    from odtrt_lib.machine import this_machine

    lost = "without it numpy does what the kernels do, slower, and the plan has no post-processing inside"
    missing = {}
    if not shutil.which("cmake"):
        missing["cmake"] = f"(`sudo apt install cmake`); {lost}"
    if not (os.environ.get("CXX") or shutil.which("c++")):
        missing["a C++ compiler"] = f"(`sudo apt install g++`); {lost}"
    has_nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").is_file()
    if this_machine().compute_capability is not None and not has_nvcc:
        missing["nvcc"] = (
            "(`sudo apt install nvidia-jetpack`; on a PC: the CUDA Toolkit); without it the post-processing "
            "runs on the CPU and the plan has none inside"
        )
    return missing


def _libraries(folder: Path, say: Callable[[str], None]) -> Tuple[Optional[Path], Optional[Path]]:
    """libodtrt.so and libodtrt_tensorrt.so: those of the bundle if they fit this device, else compiled here;
    None for one that cannot be made here."""
    if not (folder / PREBUILT).is_dir():
        return _compile(folder, say)
    taken, misfit = use_prebuilt(folder, this_machine(), _tensorrt_version())
    if taken is None:
        if misfit is not None:
            say(f"{PREBUILT}/ is not used: {misfit}")
        return _compile(folder, say)
    say(f"{PREBUILT}/: {' and '.join(taken)} fit this device; nothing is compiled")
    return taken.get(LIBRARIES[0]), taken.get(LIBRARIES[1])


def _tensorrt_version() -> Optional[Tuple[str, str]]:
    """Module and version of the TensorRT that a build here takes. Asks in another process, because the
    building process should be the first to load TensorRT."""
    question = (
        f"import sys; sys.path.insert(0, {IMPORT_PATH!r}); "
        "from odtrt_lib.engine.bindings import available_runtimes; print(*available_runtimes()[0])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", question], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    words = answer.stdout.decode(errors="replace").splitlines()[-1:]
    module, _, version = words[0].partition(" ") if words else ("", "", "")
    return (module, version) if answer.returncode == 0 and version else None


def _compile(folder: Path, say: Callable[[str], None]) -> Tuple[Optional[Path], Optional[Path]]:
    """Compiles ``plugins/``: libodtrt.so and libodtrt_tensorrt.so; None for one that cannot be made here."""
    from odtrt_lib.machine import this_machine

    missing = _missing_programs()
    for name, advice in missing.items():
        say(f"missing: {name} {advice}")
    if set(missing) - {"nvcc"}:
        return None, None
    capability = this_machine().compute_capability
    options = []
    if capability is None:
        say("no NVIDIA GPU found: the kernels are compiled for the CPU only")
        options.append("-DODTRT_CUDA=OFF")
    else:
        options += ["-DODTRT_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={capability.replace('.', '')}"]
    say("compiling; the first time this may take minutes")
    build = folder / "plugins" / "build"
    build.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (build / "CMakeCache.txt").unlink()  # cmake would refuse a folder that was moved or copied
    jobs = str(os.cpu_count() or 1)
    try:
        with (build / "log").open("w") as log:
            for command in (
                ["cmake", "-S", str(folder / "plugins"), "-B", str(build), *options],
                ["cmake", "--build", str(build), "--parallel", jobs],
            ):
                if _run_to_its_end(command, log) != 0:
                    raise BuildError(
                        f"{build / 'log'}: `{' '.join(command[:2])}` failed ({_reason(build / 'log')}); "
                        "this log has the compiler's messages"
                    )
    except KeyboardInterrupt:
        shutil.rmtree(build, ignore_errors=True)
        raise
    for line in (build / "log").read_text(errors="replace").splitlines():
        if line.startswith("odtrt: "):
            say(line[len("odtrt: ") :])
    made = [build / "libodtrt.so", build / "libodtrt_tensorrt.so"]
    library, plugin = (path if path.is_file() else None for path in made)
    return library, plugin


def _run_to_its_end(command: Sequence[str], log: Any) -> int:
    """Runs a command; returns its exit status. If this process is interrupted, first ends the command and its
    children."""
    process = None
    try:
        with ctrl_c_later():
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process.wait()
    except BaseException:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def _reason(log: Path) -> str:
    """The first error in the output of cmake and the compiler; it takes one line or two."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if "error" in line.lower() and "***" not in line:
            return one_line(" ".join(lines[number : number + 1 + line.startswith("CMake Error")]))[:200]
    return one_line(lines[-1]) if lines else "it said nothing"


def _place_plans(
    folder: Path, plans: Mapping[str, Path], runtime_library: str, say: Callable[[str], None]
) -> List[Path]:
    """Copies the plans to where Triton and nvinfer expect them."""
    wanted = [
        (path.parent / "1" / "model.plan", "heads.onnx")
        for path in sorted((folder / "triton").glob("*/config.pbtxt"))
        if 'platform: "tensorrt_plan"' in path.read_text(encoding="utf-8")
    ]
    if (folder / "deepstream").is_dir():
        wanted.append((folder / "deepstream" / "detector.plan", "detector.onnx"))
    placed = []
    for target, model in wanted:
        if runtime_library != "tensorrt":
            say(f"{target}: not written; it must be a plan of TensorRT, and this one is {runtime_library}'s")
        elif model not in plans:
            say(f"{target}: not written; it must be a plan of {model}, which needs the plugin")
        else:
            with atomic_write(target) as temporary:
                shutil.copyfile(str(plans[model]), str(temporary))
            placed.append(target)
    return placed


def _compare_batch(configuration: Path, largest: int, say: Callable[[str], None]) -> None:
    found = re.search("^max_batch_size: ([0-9]+)$", configuration.read_text(encoding="utf-8"), re.MULTILINE)
    if found is not None and int(found.group(1)) > largest:
        say(
            f"{configuration}: max_batch_size is {found.group(1)}, but the plan takes {largest} at most, and "
            f"Triton refuses it: serve a copy of this model's folder with max_batch_size: {largest}"
        )


def _pattern(spec: DetectorSpec) -> Any:
    """A computed image, uint8 [height, width, 3], the same on every machine."""
    import numpy as np

    height, width = spec.input.height, spec.input.width
    y, x, c = np.ogrid[:height, :width, :3]
    return ((x * x * 3 + y * y * 5 + x * y * (c + 1)) // 32 % 256).astype(np.uint8)


def _show(image: Path, pixels: Any, found: Any, output: Path, say: Callable[[str], None]) -> Path:
    """Says what was found, and draws it into a copy of the picture; returns the copy's path."""
    from odtrt_lib.plots import MIN_SCORE, confident, draw_detections
    from odtrt_lib.written_files import drawing_targets, write_drawing

    shown = confident(found, MIN_SCORE)
    say(f"with a score of at least {MIN_SCORE:g}: {len(shown.names)} of them")
    for line in detection_table(shown):
        say(f"    {line}")
    target = drawing_targets([image], output)[0]
    write_drawing(target, draw_detections(pixels, shown))
    say(f"drawn in {target}")
    return target


def _check_detections(found: Any, size: Tuple[int, int], spec: DetectorSpec) -> None:
    import numpy as np

    boxes, scores = found.boxes, found.scores
    # Boxes are clipped to the image; float32 can round them out of it a little.
    limit = 1.0001 * np.array([size[0], size[1], size[0], size[1]])
    is_sound = (
        len(scores) <= spec.nms.max_total_detections
        and bool(np.isfinite(boxes).all() and np.isfinite(scores).all())
        and bool((boxes >= -1e-3 * limit).all() and (boxes <= limit).all())
        and bool((boxes[:, 2:] > boxes[:, :2]).all())
        and bool((scores > spec.nms.score_threshold).all() and (np.diff(scores) <= 0).all())
    )
    if not is_sound:
        raise CheckError(
            f"{spec.name}: {len(scores)} detections that cannot be right (not finite, outside of the image, "
            "unordered or below the threshold); build again with fp32, and report it if that is wrong too"
        )


def _in_tenths(model: str, say: Callable[[str], None]) -> Callable[[str, float], None]:
    """A function for the build's progress that calls ``say`` at every phase and every tenth of it."""
    told = set()

    def tell(phase: str, fraction: float) -> None:
        tenth = int(fraction * 10)
        if (phase, tenth) not in told:
            told.add((phase, tenth))
            say(f"{model}: {phase}, {tenth * 10} %")

    return tell


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
