"""Chapter 5: a model folder as one file to carry to the device, and what is done with it there.

``pack`` writes a zip archive; ``python3 parts.odtrt.zip`` on the device unpacks it, ``python3 build_here.py``
in the unpacked folder builds all that belongs to that machine. Neither needs TensorFlow, a network, or odtrt
installed: the archive carries the device side's source (:data:`DEVICE_ROOMS`) and runs itself.

::

    manifest.json  LICENSE  README.txt  __main__.py  build_here.py
    model/         spec.json, anchors.npy, heads.onnx; detector.onnx and int8/ where the folder has them
    odtrt_lib/     the device side        plugins/    kernels and TensorRT plugin, to compile there
    triton/        on request: a Triton model repository
    deepstream/    on request: nvinfer's configuration, labels and output parser

Plans are not carried: a plan belongs to one TensorRT version and, unless it was built to be compatible, to
one GPU, and only the device knows its memory. It builds its own from the same ONNX.

Members are stored, not compressed: weights hardly compress, the same folder gives the same bytes on every
machine, and an archive cannot grow when it is read. ``manifest.json`` gives every member's size and SHA-256,
and nothing appears before all of them agree. That guards against damage, not against malice: to run an
archive is to run its author's code. A file that was cut off cannot even say so when it is run, because Python
finds no archive in it and ends in a SyntaxError; ``pack`` tells the SHA-256 of the whole file for that.

This module needs the standard library only; ``pack`` and ``build_here`` use other rooms, which need numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import (
    IO,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from odtrt_lib import __version__
from odtrt_lib.errors import (
    BuildError,
    CheckError,
    InputError,
    MissingDependencyError,
    OdtrtError,
    UnsupportedError,
    one_line,
    printable,
    shell_word,
)
from odtrt_lib.folder import (
    SEALED,
    append_record,
    atomic_write,
    cannot_write,
    check_seal,
    commit,
    recorded,
    require,
    sealed,
    sha256,
    sync,
    undisturbed,
    workplace,
)
from odtrt_lib.outputs import require_no_input
from odtrt_lib.spec import DetectorSpec, load_spec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SUFFIX = ".odtrt.zip"
MODEL = "model"
# The modules of odtrt that run on a device: Python 3.8, numpy and the device's own TensorRT.
DEVICE_ROOMS = (
    "__init__",
    "__main__",
    "boards",
    "builder",
    "bundle",
    "cli",
    "coco",
    "complaints",
    "demonstration",
    "detector",
    "doctor",
    "engine",
    "errors",
    "evaluate",
    "folder",
    "fonts",
    "fuse",
    "native",
    "nms",
    "outputs",
    "passport",
    "plots",
    "portability",
    "preprocess",
    "report",
    "results",
    "runtime",
    "spec",
    "tensors",
    "terminal",
    "zoo",
)

_FORCE_UNPACK = "over a bundle that was unpacked there before; your own files there stay"
_MOST_MANIFEST_BYTES = 1 << 22
_BLOCK = 1 << 20
_UNPRINTABLE = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LOCAL_HEADER_BYTES = 30
_INSTALL_NUMPY = "`sudo apt install python3-numpy`, or `python3 -m pip install numpy`"
_PLUGIN_SOURCES = ("CMakeLists.txt", "kernels/*", "tensorrt/*.cpp", "tensorrt/*.map", "deepstream/*.cpp")


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of a bundle. path: relative, with ``/``; size: bytes; sha256: 64 hexadecimal digits."""

    path: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle holds, ``manifest.json`` itself left out.

    odtrt: the version that packed it. name, spec_sha256: the detector's.
    """

    odtrt: str
    name: str
    spec_sha256: str
    members: Tuple[Member, ...]

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps({"schema": SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"


@dataclasses.dataclass(frozen=True)
class Packed:
    """What ``pack`` wrote.

    is_up_to_date: the file was there already, byte for byte. has_postprocessing: ``detector.onnx`` is in it,
    so that a device with a GPU can build a plan with the post-processing inside.
    """

    archive: Path
    sha256: str
    bytes: int
    manifest: Manifest
    is_up_to_date: bool
    has_postprocessing: bool


def pack(
    folder: Union[str, Path],
    archive: Union[str, Path],
    *,
    triton: bool = False,
    deepstream: bool = False,
    force: bool = False,
) -> Packed:
    """Writes a model folder and what a device needs to use it into one file; the same input, the same bytes.

    triton: add a Triton model repository: ``heads.onnx`` for ONNX Runtime, and a model with the same inputs
    and outputs for the plan that ``build_here.py`` puts there. deepstream: add a configuration for
    DeepStream's nvinfer. force: write over a file that is not a bundle.

    Raises InputError where a file is missing, damaged, not the one that its stage recorded or not made from
    the others, or ``archive`` is in the way or cannot be written; UnsupportedError where nvinfer cannot
    express what ``spec.json`` asks for.
    """
    folder, archive = Path(folder), Path(archive)
    if archive.is_dir():
        raise InputError(f"{archive}: a folder; expected a file name such as {archive.name}{SUFFIX}")
    if archive.exists() and not force and not _is_bundle(archive):
        raise InputError(f"{archive}: exists and is no bundle; choose another name, or use --force")
    content = sealed(folder, "spec.json")["spec.json"]
    spec = load_spec(folder / "spec.json", content)
    hashes, files = _model_files(folder, spec)
    sources: Dict[str, Union[Path, bytes]] = dict(files)
    sources.update(_device_side())
    if triton:
        sources.update(_triton_repository(folder, spec))
    if deepstream:
        sources.update(_deepstream_files(folder, spec))
    sources["README.txt"] = _readme(spec, sources).encode()
    for path in sources:
        if not _is_plain(path):
            raise InputError(f"{folder}: {path!r} cannot travel; expected a name without control characters")
    members = tuple(_described(path, sources[path]) for path in sorted(sources))
    packed = {member.path: member.sha256 for member in members}
    for name, digest in {**hashes, "spec.json": hashlib.sha256(content).hexdigest()}.items():
        if packed[f"{MODEL}/{name}"] != digest:
            raise InputError(f"{folder / name}: changed while it was packed; pack again")
    manifest = Manifest(__version__, spec.name, hashes["spec.json"], members)
    sources[MANIFEST] = manifest.to_json().encode()
    require_no_input(archive, [source for source in sources.values() if isinstance(source, Path)])
    with atomic_write(archive) as temporary:
        _write_zip(temporary, sources, manifest)
        digest = sha256(temporary)
        is_up_to_date = archive.is_file() and sha256(archive) == digest
    has_postprocessing = f"{MODEL}/detector.onnx" in sources
    return Packed(archive, digest, archive.stat().st_size, manifest, is_up_to_date, has_postprocessing)


def unpack(
    archive: Union[str, Path],
    folder: Union[str, Path],
    *,
    force: bool = False,
    expected_sha256: Optional[str] = None,
) -> Manifest:
    """Unpacks a bundle into ``folder``, which appears whole or not at all.

    Every member is checked against the manifest before the first one appears. force: unpack over an earlier
    bundle; what was built in it (plans, compiled libraries) stays, files that the new bundle lacks go unless
    somebody changed them, and whoever opens the model meanwhile gets the old one or the new one. Only a
    folder that a bundle was unpacked into is written over, and nothing outside of it: no link in it is
    followed. The model is sealed: ``model/log.jsonl`` names the bundle's hashes. expected_sha256: of the
    archive, as ``pack`` told it; 64 hexadecimal digits.

    Raises InputError, naming the member, where the archive is damaged or is not what its manifest says, and
    where ``folder`` is in the way or cannot be written; CheckError where the archive is not the expected one.
    """
    if expected_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", expected_sha256):
        raise InputError(
            f"SHA-256 {expected_sha256!r}: expected 64 hexadecimal digits, as `odtrt pack` prints"
        )
    archive, folder = Path(archive), Path(folder).resolve()
    is_occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    earlier: Tuple[Member, ...] = ()
    if is_occupied:
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder}: exists and was not unpacked from a bundle; choose another folder")
        with undisturbed(folder):
            earlier = _read_manifest(folder / MANIFEST).members
        if not force:
            raise InputError(f"{folder}: a bundle was unpacked here; choose another folder, or use --force")
    with _opened(archive, expected_sha256) as (zipped, manifest, entries):
        if is_occupied:
            earlier = _unchanged(folder, earlier, manifest)
            _refuse_obstacles(folder, [member.path for member in (*manifest.members, *earlier)])
        with _staged(folder) as content:
            for member in manifest.members:
                _extract(archive, zipped, entries[member.path], member, content / member.path)
            (content / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            _seal_model(folder / MODEL, manifest, content / MODEL)
            for path in content.rglob("*"):
                sync(path)
            if is_occupied:
                _replace_files(content, folder, manifest, earlier)
            else:
                os.replace(content, folder)
                sync(folder.parent)
    return manifest


def verify(folder: Union[str, Path]) -> Manifest:
    """Compares an unpacked bundle with its manifest; what was built in it since does not matter.

    Raises InputError naming the first file that is missing or not the one that was packed.
    """
    folder = Path(folder)
    with undisturbed(folder), undisturbed(folder / MODEL):
        manifest = _read_manifest(folder / MANIFEST)
        for member in manifest.members:
            path = folder / member.path
            if not path.is_file():
                raise InputError(f"{path}: not found; expected it from the bundle: unpack it again")
            if path.stat().st_size != member.size or sha256(path) != member.sha256:
                raise InputError(f"{path}: not the file that was packed; unpack the bundle again")
    return manifest


def build_here(
    folder: Union[str, Path],
    *,
    precision: str = "fp32",
    memory: Optional[str] = None,
    image: Union[str, Path, None] = None,
    batch: Optional[Sequence[int]] = None,
    may_give_up: Sequence[str] = (),
    version_compatible: bool = False,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Dict[str, Any]:
    """Builds what belongs to this machine from an unpacked bundle, and detects once as a check.

    Compiles the kernels and, where there is a GPU, the CUDA kernels and the TensorRT plugin against this
    machine's own headers; builds the plan of ``detector.onnx`` where there is a plugin, and of ``heads.onnx``
    where there is none or Triton wants it; and runs the detector on ``image``, or, without one, on a pattern.
    precision, memory, batch, may_give_up, version_compatible, force: of the plan and of its build, see
    :func:`odtrt_lib.engine.build`. say: is told, a line at a time, what was done and what could not be, and
    at last how the detector is opened here.

    Returns what ``built.json`` says: ``precision`` (of the plan, which may have given up fp32), ``plans``
    (model -> path in the folder), ``library`` and ``plugin`` (such paths, or None), ``serving`` (copies of
    plans for Triton and DeepStream), ``backend``, ``open`` (the Python expression that opens the detector
    in this folder), ``image`` and ``detections``: ``class_id``, ``name``, ``score`` and ``box``,
    ``[ymin, xmin, ymax, xmax]`` in pixels.

    Raises InputError where the bundle is not as packed, an argument has another form or the folder cannot be
    written, MissingDependencyError naming every Python module that is missing and what installs it,
    BuildError where the compiler fails, what :func:`odtrt_lib.engine.build` and
    :class:`odtrt_lib.detector.Detector` raise, and CheckError where a detection cannot be one.
    """
    folder = Path(folder)
    manifest = verify(folder)
    say(f"{manifest.name}: {len(manifest.members)} files as packed by odtrt {manifest.odtrt}")
    strangers = _strangers(folder, manifest)
    if strangers:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        say(f"not from this bundle: {', '.join(map(repr, strangers[:5]))}{more}")
    _refuse_impostors(folder, strangers)
    model = folder / MODEL
    if not recorded(model):  # another program unpacked it
        _seal_model(model, manifest)
    spec = load_spec(model / "spec.json")
    if _can_find("numpy"):
        _check_arguments(spec, precision, memory, batch, may_give_up)
    missing = missing_modules(precision)
    for name, advice in missing.items():
        say(f"missing: {name} ({advice})")
    if missing:
        raise MissingDependencyError(f"{folder}: nothing was built; install first: {', '.join(missing)}")

    from odtrt_lib import engine
    from odtrt_lib.detector import Detector
    from odtrt_lib.passport import passports, this_machine
    from odtrt_lib.preprocess import load_image

    pixels = _pattern(spec) if image is None else load_image(image)
    try:
        library, plugin = _compile(folder, say)
    except OSError as error:
        raise cannot_write(folder / "plugins" / "build", error) from error
    is_fused = plugin is not None and (model / "detector.onnx").is_file()
    served = "detector.onnx" if is_fused else "heads.onnx"
    plans = {}
    for name in ("heads.onnx", "detector.onnx"):
        if name == served or (name == "heads.onnx" and (folder / "triton").is_dir()):
            plans[name] = engine.build(
                model,
                precision=precision,
                plugin=plugin if name == "detector.onnx" else None,
                batch=batch,
                memory=memory,
                version_compatible=version_compatible,
                may_give_up=may_give_up,
                force=force,
                progress=_in_tenths(name, say),
            )
    paths = {}
    for name, result in plans.items():
        paths[name] = next(model / output for output in result.record["outputs"] if output.endswith(".plan"))
        say(f"{paths[name]}: {'up to date' if result.is_up_to_date else 'built'} from {name}")
    passport_of = {one.plan: one for one in passports(model)}
    passport = passport_of[paths[served].name]
    if passport.precision != precision:
        say(f"{served}: the plan is {passport.precision}; the memory did not suffice for {precision}")
    serving = _place_plans(folder, paths, passport.flavour, say)
    for configuration in sorted({path.parent.parent / "config.pbtxt" for path in serving}):
        if configuration.is_file():
            sizes = passport_of[paths["heads.onnx"].name].settings["batch_min_opt_max"]
            _compare_batch(configuration, sizes[-1], say)

    # Not "auto", which would serve with ONNX Runtime where the new plan does not run.
    has_gpu = this_machine().gpu is not None
    backend = passport.flavour if has_gpu else "onnxruntime"
    used = plugin if is_fused else None
    with Detector.open(model, backend, plugin=used, precision=passport.precision) as detector:
        found = detector.detect(pixels)
        _check_detections(found, pixels.shape[:2], detector.spec)
    shown = "a pattern" if image is None else str(image)
    if has_gpu:
        say(f"check: {len(found.scores)} detections in {shown}, made by the plan of {served} with {backend}")
    else:
        say(f"no NVIDIA GPU here: the plan of {served} was built but not run")
        say(f"check: {len(found.scores)} detections in {shown}, made by ONNX Runtime on the CPU")
    if image is None:
        say(
            "the pattern is computed from the pixels' positions, no photograph: what is found in it shows "
            "that everything runs, and nothing else; --image FILE detects in a picture"
        )
    opening = f'Detector.open("{MODEL}")'
    if has_gpu:
        library_there = "" if used is None else f'plugin="{_inside(used, folder)}", '
        opening = f'Detector.open("{MODEL}", {library_there}precision="{passport.precision}")'
    built = {
        "precision": passport.precision,
        "plans": {name: _inside(path, folder) for name, path in paths.items()},
        "library": None if library is None else _inside(library, folder),
        "plugin": None if plugin is None else _inside(plugin, folder),
        "serving": [_inside(path, folder) for path in serving],
        "backend": backend,
        "open": opening,
        "image": None if image is None else str(image),
        "detections": [
            {"class_id": int(class_id), "name": name, "score": float(score), "box": [float(x) for x in box]}
            for class_id, name, score, box in zip(found.class_ids, found.names, found.scores, found.boxes)
        ],
    }
    with atomic_write(folder / "built.json") as temporary:
        temporary.write_text(json.dumps(built, indent=1) + "\n", encoding="utf-8")
    say(f"next, in Python, in {folder}:")
    say("from odtrt_lib.detector import Detector")
    say(f"detector = {opening}")
    return built


def missing_modules(precision: str) -> Dict[str, str]:
    """The Python modules that ``build_here`` lacks here, each with what installs it.

    Polygraphy gives a plan its device memory, ONNX Runtime takes the GPU's place where there is none, and
    onnx writes half precision into the model for a TensorRT with typed networks (9 and newer). Which part
    needs what is :mod:`odtrt_lib.doctor`'s table; of detection only --image needs Pillow.
    """
    from odtrt_lib import doctor
    from odtrt_lib.passport import this_machine

    missing = {}
    if not _can_find("numpy"):
        missing["numpy"] = _INSTALL_NUMPY
    flavour = next((name for name in ("tensorrt", "tensorrt_rtx") if _can_find(name)), None)
    if flavour is None:
        missing["TensorRT's Python module"] = (
            "on a Jetson `sudo apt install nvidia-jetpack`, and make virtual environments with "
            "--system-site-packages; on a PC `python3 -m pip install tensorrt`"
        )
    needs = dict.fromkeys(doctor.modules(doctor.BUILD), "to build a plan")
    if this_machine().gpu is not None:
        needs.update(dict.fromkeys(doctor.modules(doctor.RUN_A_PLAN), "to run a plan"))
    else:
        needs.update(dict.fromkeys(doctor.modules(doctor.DETECT), "to detect without a GPU"))
        del needs["PIL"]
    half = doctor.modules(doctor.HALF_PRECISION)
    if precision == "fp16" and not all(map(_can_find, half)) and not _has_half_precision_flag(flavour):
        needs.update(dict.fromkeys(half, "for fp16"))
    del needs["numpy"]  # is first, with an installation of its own
    for module, purpose in needs.items():
        if not _can_find(module):
            package = module.replace("_", "-")
            missing[package] = f"{purpose}: `python3 -m pip install {package}`"
    return missing


def run_archive(arguments: Sequence[str]) -> int:
    """``python3 parts.odtrt.zip [FOLDER]``: unpacks the archive that is being run; the exit status."""
    archive = Path(arguments[0])
    name = archive.name[: -len(SUFFIX)] if archive.name.endswith(SUFFIX) else archive.stem
    parser = argparse.ArgumentParser(prog=f"python3 {archive}", description="Unpacks this bundle.")
    parser.add_argument("folder", nargs="?", default=name, help="where to (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help=_FORCE_UNPACK)
    options = parser.parse_args(arguments[1:])

    def work() -> None:
        manifest = unpack(archive, options.folder, force=options.force)
        print(printable(f"{options.folder}: {manifest.name}, {len(manifest.members)} files, all as packed"))
        print(f"next: cd {shell_word(options.folder)} && python3 build_here.py")

    return _exit_status(work, Path(options.folder))


def run_build_here(arguments: Sequence[str]) -> int:
    """``python3 build_here.py``: :func:`build_here` for the folder that the script is in. The exit status."""
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
        "--may-give-up",
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
    options = parser.parse_args(arguments[1:])
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
            batch=_parse_batches(options.batches),
            may_give_up=options.may_give_up,
            version_compatible=options.version_compatible,
            force=options.force,
            say=say,
        )
        return None

    return _exit_status(work, folder)


def triton_config(spec: DetectorSpec, name: str, platform: str) -> str:
    """The ``config.pbtxt`` of one Triton model over ``heads.onnx``: a text-format ``inference.ModelConfig``.

    name: of the model's folder. platform: ``onnxruntime_onnx`` or ``tensorrt_plan``. With a fixed batch size
    the batch is one more dimension and Triton does no batching.

    Both platforms answer with raw heads, so that a client sees no difference and Triton needs no plugin;
    :func:`odtrt_lib.nms.postprocess` makes detections of them.
    """
    from odtrt_lib.engine import DYNAMIC_BATCH

    network, heads = spec.input, spec.heads
    tensors = (
        ("input", network.name, (3, network.height, network.width)),
        ("output", heads.box_encodings, (heads.num_anchors, 4)),
        ("output", heads.class_logits, (heads.num_anchors, heads.num_columns)),
    )
    lines = [
        f"# {_comment(spec.name)}: written by odtrt {__version__} from spec.json.",
        f"# `{_comment(network.name)}` is what odtrt_lib.preprocess.preprocess makes of an image;",
        "# the outputs are raw heads, and odtrt_lib.nms.postprocess makes detections of them.",
    ]
    if platform == "tensorrt_plan":
        lines.append("# build_here.py puts the plan at 1/model.plan; until then Triton refuses this model.")
    lines += [
        f'name: "{name}"',
        f'platform: "{platform}"',
        f"max_batch_size: {DYNAMIC_BATCH[-1] if network.batch is None else 0}",
    ]
    for kind, tensor, shape in tensors:
        dims = shape if network.batch is None else (network.batch, *shape)
        text = ", ".join(map(str, dims))
        lines.append(f"{kind} {{\n  name: {_quoted(tensor)}\n  data_type: TYPE_FP32\n  dims: [ {text} ]\n}}")
    return "\n".join(lines) + "\n"


def nvinfer_config(spec: DetectorSpec) -> str:
    """The configuration file of DeepStream's nvinfer for ``detector.onnx``.

    Raises UnsupportedError, naming the field of ``spec.json``, for what nvinfer cannot express: its
    normalisation is ``net-scale-factor * (pixel - offset)`` with one factor for all channels, and it pads the
    image before it normalises, without telling the network where the padding begins.
    """
    scale, offset = spec.input.scale, spec.input.offset
    if spec.input.resizer.kind != "fixed_shape":
        raise UnsupportedError(
            f"spec.json: input.resizer.kind is {spec.input.resizer.kind}, but nvinfer pads before it "
            "normalises and gives the network no clip_windows; expected fixed_shape: use odtrt's own Detector"
        )
    if len(set(scale)) != 1:
        raise UnsupportedError(
            f"spec.json: input.scale is {list(scale)}, but nvinfer has one net-scale-factor for all "
            "channels; use odtrt's own Detector"
        )
    means = ";".join(_number(-one / scale[0]) for one in offset)
    return f"""\
# {_comment(spec.name)}: DeepStream nvinfer, written by odtrt {__version__} from spec.json.
#
# Not as in training: nvinfer resizes with NvBufSurfTransform, which samples at pixel centres; the OD API's
# output pixel i samples the input at i * in / out. Where images are shrunk, boxes shift by up to half a
# network pixel, and scores change: measure it with your own images, or preprocess with odtrt's kernels.
# Detections come out of the plugin in the network: nvinfer must not cluster them again (cluster-mode 4).
#
# The parser is compiled on the device, once, in this folder; it also loads odtrt's plugin into TensorRT:
#   g++ -std=c++17 -O2 -shared -fPIC nvdsinfer_odtrt.cpp -o libnvdsinfer_odtrt.so \\
#     -I/opt/nvidia/deepstream/deepstream/sources/includes -I/usr/local/cuda/include -ldl
# build_here.py puts the plan at detector.plan.

[property]
gpu-id=0
gie-unique-id=1
process-mode=1
onnx-file=../model/detector.onnx
model-engine-file=detector.plan
labelfile-path=labels.txt
batch-size={spec.input.batch or 1}
infer-dims=3;{spec.input.height};{spec.input.width}
network-type=0
network-mode=0
model-color-format=0
net-scale-factor={_number(scale[0])}
offsets={means}
maintain-aspect-ratio=0
symmetric-padding=0
num-detected-classes={spec.heads.num_classes}
cluster-mode=4
output-blob-names=num_detections;boxes;scores;classes
parse-bbox-func-name=NvDsInferParseOdtrt
custom-lib-path=libnvdsinfer_odtrt.so

[class-attrs-all]
pre-cluster-threshold={_number(spec.nms.score_threshold)}
"""


_README = """\
{name}: an object detector packed by odtrt {version}.

    python3 build_here.py --needs     build nothing; say what is missing here
    python3 build_here.py             compile, build the plan for this machine, detect once as a check
    python3 build_here.py --precision fp16 --image picture.jpg
    python3 build_here.py --plans     build nothing; say which plans are usable here, and why others are not

From then on, in this folder, or with it in PYTHONPATH:

    from odtrt_lib.detector import Detector
    detector = {opening}
    found = detector.detect(image)    # uint8 [height, width, 3], RGB

{form}

What this machine needs:

    always                   Python 3.8 or newer, numpy, TensorRT's Python module (on a Jetson: JetPack's)
    with an NVIDIA GPU       polygraphy
    without one              onnxruntime; it detects then, and the plan is built but not run
    for --precision fp16     onnx and onnxconverter-common; not with TensorRT 8, which has a switch for it
    for the kernels          {compilers}
    for --image              Pillow

Without the compilers numpy does what the kernels do, slower.

built.json, which build_here.py writes at its end, says what it made: the plans and the compiled libraries,
what made the check's detections, these detections, and the line that opens the detector.

What is here: model/ is the detector, odtrt_lib/ and plugins/ are odtrt's source, under LICENSE.{serving}
manifest.json lists every file with its SHA-256; build_here.py compares them before it builds anything, and
names files among the source that are not from the bundle. That finds damage, not malice: whoever may write in
this folder can change build_here.py too.

When you carry the bundle on, compare its SHA-256 (`sha256sum FILE`) with the one that `odtrt pack` printed. A
file that was cut off on the way cannot explain itself: python3 on it ends in a SyntaxError.
"""
_PLUGIN = "plugins/build/libodtrt_tensorrt.so"
_FUSED_FORM = """\
The plan is that of model/detector.onnx, with the post-processing inside, and it is looked at only with
plugin=. build_here.py compiles that plugin and builds that plan where it finds an NVIDIA GPU, nvcc and
TensorRT's headers; elsewhere it makes the plan of model/heads.onnx, and plugin= must be left out. It ends
with the very line that works on this machine."""
_SPLIT_FORM = """\
The plan is that of model/heads.onnx; the post-processing follows it, in the kernels. build_here.py ends with
the very line that works on this machine."""

# Python 2 and 3.6 (JetPack 4) must be able to read these two.
_MAIN = '''\
"""Unpacks the archive that this file is in."""
import sys

if sys.version_info < (3, 8):
    sys.exit("error: Python %d.%d is too old, expected 3.8 or newer" % sys.version_info[:2])

from odtrt_lib.bundle import run_archive

sys.exit(run_archive(sys.argv))
'''
_BUILD_HERE = '''\
"""Compiles, builds the plan for this machine and detects once. --help says more."""
import sys

if sys.version_info < (3, 8):
    sys.exit("error: Python %d.%d is too old, expected 3.8 or newer" % sys.version_info[:2])

# Only odtrt_lib comes from this folder: no other file in it stands in for a module of Python's.
if not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

import importlib.util
import os

folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "odtrt_lib")
spec = importlib.util.spec_from_file_location(
    "odtrt_lib", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
)
sys.modules["odtrt_lib"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["odtrt_lib"])

from odtrt_lib.bundle import run_build_here

sys.exit(run_build_here(sys.argv))
'''


def _model_files(folder: Path, spec: DetectorSpec) -> Tuple[Dict[str, str], Dict[str, Union[Path, bytes]]]:
    """The seal's hashes of the model's files, and what goes into the bundle, by its name there."""
    from odtrt_lib.builder import weights_by_type
    from odtrt_lib.tensors import load_anchors

    names = ["spec.json", "anchors.npy", "heads.onnx"]
    if (folder / "detector.onnx").is_file():
        names.append("detector.onnx")
    hashes = check_seal(folder, *names)
    load_anchors(folder / "anchors.npy", spec)
    weights_by_type(folder / "heads.onnx")  # refuses what is no ONNX model
    if recorded(folder)["heads.onnx"].stage != "convert":
        _check_heads(folder / "heads.onnx", spec)
    files: Dict[str, Union[Path, bytes]] = {f"{MODEL}/{name}": folder / name for name in names}
    for path in sorted((folder / "int8").rglob("*")):
        if path.is_file() and not path.is_symlink():
            files[f"{MODEL}/{path.relative_to(folder).as_posix()}"] = path
    return hashes, files


def _seal_model(model: Path, manifest: Manifest, staged: Optional[Path] = None) -> None:
    """Records in the model folder that its files are those of the bundle; staged: where they still are."""
    hashes = {member.path: member.sha256 for member in manifest.members}
    record = {
        "stage": "unpack",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": {},
        "settings": {},
        "outputs": {name: hashes[f"{MODEL}/{name}"] for name in SEALED if f"{MODEL}/{name}" in hashes},
        "versions": {"odtrt": manifest.odtrt},
        "seconds": 0.0,
        "peak_rss_mb": 0.0,
        "checks": {},
    }
    append_record(model, record, staged)


def _check_heads(path: Path, spec: DetectorSpec) -> None:
    """Compares inputs and outputs with ``spec``, where onnx is installed."""
    try:
        import onnx
    except ImportError:
        return
    again = "run `odtrt convert` again"
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's has no base but Exception
        raise InputError(f"{path}: not an ONNX model ({one_line(error)}); {again}") from error
    batch, heads = spec.input.batch, spec.heads
    weights = {tensor.name for tensor in graph.initializer}
    expected: Dict[str, Dict[str, List[Optional[int]]]] = {
        "inputs": {spec.input.name: [batch, 3, spec.input.height, spec.input.width]},
        "outputs": {
            heads.box_encodings: [batch, heads.num_anchors, 4],
            heads.class_logits: [batch, heads.num_anchors, heads.num_columns],
        },
    }
    for kind, values in (("inputs", graph.input), ("outputs", graph.output)):
        found = {}
        for value in values:
            if value.name not in weights:
                tensor = value.type.tensor_type
                dims = tensor.shape.dim
                found[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
                if tensor.elem_type != onnx.TensorProto.FLOAT:
                    raise InputError(f"{path}: {value.name} is not float32, as spec.json expects; {again}")
        if found != expected[kind]:
            raise InputError(
                f"{path}: {kind} {_shapes(found)}, expected {_shapes(expected[kind])} as spec.json says; "
                f"{again}"
            )


def _shapes(tensors: Mapping[str, Sequence[Optional[int]]]) -> str:
    return ", ".join(
        f"{name} [{', '.join('any' if size is None else str(size) for size in shape)}]"
        for name, shape in tensors.items()
    )


def _readme(spec: DetectorSpec, members: Iterable[str]) -> str:
    """``README.txt`` for a bundle with these members."""
    names = set(members)
    is_fused = f"{MODEL}/detector.onnx" in names
    compilers = "cmake 3.16 or newer, a C++ compiler; for the GPU's nvcc"
    serving = [
        f"{name}/ is for {program}"
        for name, program in (("triton", "Triton"), ("deepstream", "DeepStream"))
        if any(path.startswith(f"{name}/") for path in names)
    ]
    return _README.format(
        name=_comment(spec.name),
        version=__version__,
        opening=f'Detector.open("{MODEL}"' + (f', plugin="{_PLUGIN}")' if is_fused else ")"),
        form=_FUSED_FORM if is_fused else _SPLIT_FORM,
        compilers=compilers + (" and TensorRT's headers" if is_fused else ""),
        serving="".join(f"\n{text}." for text in serving),
    )


def _device_side() -> Iterator[Tuple[str, Union[Path, bytes]]]:
    package = Path(__file__).resolve().parent
    checkout = package.parent
    for room in DEVICE_ROOMS:
        yield f"odtrt_lib/{room}.py", _require_source(package / f"{room}.py")
    for pattern in _PLUGIN_SOURCES:
        found = sorted(path for path in (checkout / "plugins").glob(pattern) if path.is_file())
        for path in found or [_require_source(checkout / "plugins" / pattern)]:
            yield path.relative_to(checkout).as_posix(), path
    yield "LICENSE", _require_source(checkout / "LICENSE")
    yield "__main__.py", _MAIN.encode()
    yield "build_here.py", _BUILD_HERE.encode()


def _require_source(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: not found; a bundle carries odtrt's source: pack from a checkout of odtrt")
    return path


def _triton_repository(folder: Path, spec: DetectorSpec) -> Iterator[Tuple[str, Union[Path, bytes]]]:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", spec.name).strip(".") or "detector"
    yield f"triton/{name}/config.pbtxt", triton_config(spec, name, "tensorrt_plan").encode()
    onnx_name = f"{name}_onnx"
    yield f"triton/{onnx_name}/config.pbtxt", triton_config(spec, onnx_name, "onnxruntime_onnx").encode()
    yield f"triton/{onnx_name}/1/model.onnx", folder / "heads.onnx"


def _deepstream_files(folder: Path, spec: DetectorSpec) -> Iterator[Tuple[str, Union[Path, bytes]]]:
    configuration = nvinfer_config(spec)
    require(folder, "detector.onnx", "fuse")
    labels = [re.sub(r"[\s;]+", " ", label.name).strip() for label in spec.labels]
    yield "deepstream/nvinfer.txt", configuration.encode()
    yield "deepstream/labels.txt", ("\n".join(labels) + "\n").encode()
    parser = Path(__file__).resolve().parent.parent / "plugins" / "deepstream" / "nvdsinfer_odtrt.cpp"
    yield "deepstream/nvdsinfer_odtrt.cpp", _require_source(parser)


def _comment(text: str) -> str:
    return one_line(text) if text.strip() else "a detector"


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\0": "\\000"}
    return '"' + "".join(escapes.get(letter, letter) for letter in text) + '"'


def _number(value: float) -> str:
    return repr(float(value) + 0.0)


def _described(path: str, source: Union[Path, bytes]) -> Member:
    if isinstance(source, bytes):
        return Member(path, len(source), hashlib.sha256(source).hexdigest())
    return Member(path, source.stat().st_size, sha256(source))


def _write_zip(target: Path, sources: Mapping[str, Union[Path, bytes]], manifest: Manifest) -> None:
    expected = {member.path: member for member in manifest.members}
    with target.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as zipped:
            for path in sorted(sources):
                source = sources[path]
                entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
                entry.create_system = 3
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                if isinstance(source, bytes):
                    zipped.writestr(entry, source)
                    continue
                entry.file_size = expected[path].size
                digest = hashlib.sha256()
                with source.open("rb") as original, zipped.open(entry, "w") as copy:
                    for block in iter(lambda: original.read(_BLOCK), b""):
                        digest.update(block)
                        copy.write(block)
                if digest.hexdigest() != expected[path].sha256:
                    raise InputError(f"{source}: changed while it was packed; pack again")


def _is_bundle(path: Path) -> bool:
    try:
        with _opened(path):
            return True
    except InputError:
        return False


@contextlib.contextmanager
def _opened(
    archive: Path, expected_sha256: Optional[str] = None
) -> Iterator[Tuple[zipfile.ZipFile, Manifest, Dict[str, zipfile.ZipInfo]]]:
    """An archive whose directory agrees with its manifest: no member too many or too few, none unsafe."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(archive.open("rb"))
            size = os.fstat(file.fileno()).st_size
            if expected_sha256 is not None:
                _compare_archive(archive, file, expected_sha256.lower())
            zipped = stack.enter_context(zipfile.ZipFile(file))
        except OSError as error:
            raise InputError(f"{archive}: cannot be read ({error.strerror}); expected a bundle") from error
        except OdtrtError:
            raise
        except Exception as error:  # zipfile raises whatever the damage leads to
            raise InputError(
                f"{archive}: damaged, or no bundle ({one_line(error)}); copy it again"
            ) from error
        entries = zipped.infolist()
        by_name = {entry.filename: entry for entry in entries}
        if MANIFEST not in by_name:
            raise InputError(f"{archive}: has no {MANIFEST}; expected a file that `odtrt pack` wrote")
        _check_entries(archive, entries, size)
        if by_name[MANIFEST].file_size > _MOST_MANIFEST_BYTES:
            raise InputError(f"{archive}: {MANIFEST} is too large to be one; expected a bundle")
        text = b"".join(_blocks(archive, zipped, by_name[MANIFEST], by_name[MANIFEST].file_size))
        manifest = _parse_manifest(f"{archive}: {MANIFEST}", text)
        named = {member.path: member for member in manifest.members}
        for path in sorted(set(named) ^ (set(by_name) - {MANIFEST})):
            problem = "missing from the archive" if path in named else f"not in {MANIFEST}"
            raise InputError(f"{archive}: {path!r} is {problem}; copy or pack it again")
        for path, member in named.items():
            if by_name[path].file_size != member.size:
                raise InputError(
                    f"{archive}: {path!r} has {by_name[path].file_size} bytes, {MANIFEST} says "
                    f"{member.size}; copy or pack it again"
                )
        yield zipped, manifest, by_name


def _compare_archive(archive: Path, file: IO[bytes], expected: str) -> None:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(_BLOCK), b""):
        digest.update(block)
    file.seek(0)
    if digest.hexdigest() != expected:
        raise CheckError(
            f"{archive}: SHA-256 {digest.hexdigest()}, expected {expected}; nothing was unpacked: this is "
            "another bundle, or it was changed on its way"
        )


def _unchanged(folder: Path, earlier: Sequence[Member], manifest: Manifest) -> Tuple[Member, ...]:
    """The members of an earlier bundle that the new one lacks, as they were packed: they may go."""
    kept = {member.path for member in manifest.members}
    return tuple(
        member
        for member in earlier
        if member.path not in kept
        and (folder / member.path).is_file()
        and (folder / member.path).stat().st_size == member.size
        and sha256(folder / member.path) == member.sha256
    )


def _refuse_obstacles(folder: Path, paths: Iterable[str]) -> None:
    """What is in the way of these files, links to other folders included: found before anything changes."""
    for path in paths:
        target = folder / path
        for parent in (folder / one for one in PurePosixPath(path).parents if str(one) != "."):
            if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
                found = "a link" if parent.is_symlink() else "a file"
                raise InputError(f"{parent}: {found}, expected a folder; nothing was changed: move it away")
        if target.is_dir() and not target.is_symlink():
            raise InputError(f"{target}: a folder, expected a file; nothing was changed: move it away")


def _strangers(folder: Path, manifest: Manifest) -> List[str]:
    """Files where the bundle's source is that are not from it: something could take them for source."""
    known = {member.path for member in manifest.members} | {MANIFEST, "built.json"}
    code = [path for place in ("odtrt_lib", "plugins") for path in (folder / place).rglob("*")]
    found = []
    for path in sorted([*folder.iterdir(), *code]):
        name = path.relative_to(folder).as_posix()
        is_made = "__pycache__" in path.parts or name.startswith("plugins/build/")
        is_folder = path.is_dir() and not (path / "__init__.py").exists()
        if name not in known and not is_made and not is_folder:
            found.append(name)
    return [name for name in found if name != "odtrt_lib"]


def _refuse_impostors(folder: Path, names: Iterable[str]) -> None:
    """The processes that build import from this folder first."""
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != folder.resolve()]
    for name in names:
        module, _, suffix = name.partition(".")
        is_module = "/" not in name and (not suffix or suffix.rpartition(".")[2] in ("py", "pyc", "so"))
        if is_module and (
            module in sys.builtin_module_names
            or importlib.machinery.PathFinder.find_spec(module, elsewhere) is not None
        ):
            raise InputError(
                f"{folder / name}: not from this bundle, and Python would take it for its own module "
                f"{module}; nothing was built: move it away or rename it"
            )


def _check_entries(archive: Path, entries: Sequence[zipfile.ZipInfo], archive_size: int) -> None:
    """Refuses what ``pack`` never writes: unsafe or doubled names, links, compression, overlaps."""
    ends, seen = 0, set()
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        what = f"{archive}: member {entry.filename!r}"
        _check_path(what, entry.filename)
        if entry.filename in seen:
            raise InputError(f"{what} is there twice; expected every file once: pack it again")
        seen.add(entry.filename)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG) or entry.is_dir():
            raise InputError(f"{what} is a link, folder or device; expected files only: pack it again")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise InputError(f"{what} is compressed; expected stored members: pack it again")
        if entry.header_offset < ends:
            raise InputError(f"{what} overlaps another one; the archive is damaged: copy or pack it again")
        ends = entry.header_offset + _LOCAL_HEADER_BYTES + entry.file_size
        if ends > archive_size:
            raise InputError(f"{what} is cut off; the archive is damaged: copy or pack it again")
    for name in seen:
        for parent in PurePosixPath(name).parents:
            if str(parent) in seen:
                raise InputError(f"{archive}: {str(parent)!r} is both a file and a folder; pack it again")


def _check_path(what: str, path: str) -> None:
    if not _is_plain(path):
        raise InputError(f"{what} is not a plain relative path; nothing was unpacked: do not trust this file")


def _is_plain(path: str) -> bool:
    """Whether a relative path stays in its folder and shows what it is: no control or direction marks."""
    parts = path.split("/")
    return not any(part in ("", ".", "..") or ":" in part or _UNPRINTABLE.search(part) for part in parts)


def _parse_manifest(where: str, text: bytes) -> Manifest:
    again = "copy or pack the bundle again"
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({one_line(error)}); {again}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA_VERSION:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{where}: schema {found!r}, expected {SCHEMA_VERSION}; {again}")
    texts: List[Any] = [data.get(key) for key in ("odtrt", "name", "spec_sha256")]
    listed = data.get("members")
    if not all(isinstance(value, str) for value in texts) or not isinstance(listed, list):
        raise InputError(f"{where}: odtrt, name, spec_sha256 or members is missing; {again}")
    if any("\ud800" <= letter <= "\udfff" for letter in texts[0] + texts[1]):
        raise InputError(f"{where}: odtrt or name is no text, it has half a character; {again}")
    members = []
    for item in listed:
        is_member = (
            isinstance(item, dict)
            and isinstance(item.get("path"), str)
            and type(item.get("size")) is int
            and item["size"] >= 0
            and isinstance(item.get("sha256"), str)
            and re.fullmatch("[0-9a-f]{64}", item["sha256"])
        )
        if not is_member:
            raise InputError(f"{where}: {str(item)[:80]!r} is no member with path, size and sha256; {again}")
        _check_path(f"{where}: member {item['path']!r}", item["path"])
        members.append(Member(item["path"], item["size"], item["sha256"]))
    paths = [member.path for member in members]
    if len(set(paths)) != len(paths):
        raise InputError(f"{where}: names a member twice; {again}")
    if texts[2] != next((member.sha256 for member in members if member.path == f"{MODEL}/spec.json"), None):
        raise InputError(f"{where}: spec_sha256 is not that of {MODEL}/spec.json; {again}")
    return Manifest(texts[0], texts[1], texts[2], tuple(members))


def _read_manifest(path: Path) -> Manifest:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_MANIFEST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an unpacked bundle") from error
    if len(text) > _MOST_MANIFEST_BYTES:
        raise InputError(f"{path}: too large to be a bundle's; unpack the bundle again")
    return _parse_manifest(str(path), text)


def _blocks(archive: Path, zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, size: int) -> Iterator[bytes]:
    """The content of a member, which has ``size`` bytes, no more and no fewer."""
    left = size
    try:
        with zipped.open(entry) as stream:
            for block in iter(lambda: stream.read(_BLOCK), b""):
                left -= len(block)
                if left < 0:
                    break
                yield block
    except Exception as error:  # zipfile raises whatever the damage leads to
        raise InputError(
            f"{archive}: {entry.filename!r} is damaged ({one_line(error)}); copy or pack it again"
        ) from error
    if left:
        raise InputError(f"{archive}: {entry.filename!r} has not the {size} bytes it should; copy it again")


def _extract(
    archive: Path, zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, member: Member, target: Path
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("xb") as file:
        for block in _blocks(archive, zipped, entry, member.size):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != member.sha256:
        raise InputError(
            f"{archive}: {member.path!r} has SHA-256 {digest.hexdigest()[:12]}..., {MANIFEST} says "
            f"{member.sha256[:12]}...; copy or pack it again"
        )


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder``, on the same disk; gone after the block unless it was moved."""
    made = [path for path in folder.parents if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with workplace(folder.parent, f".{folder.name}.unpack-") as place:
            content = place / "content"
            content.mkdir()
            yield content
        made = []
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _replace_files(content: Path, folder: Path, manifest: Manifest, earlier: Sequence[Member]) -> None:
    """Moves files over those of an earlier bundle, in one step for whoever opens the model."""
    kept = {member.path for member in manifest.members}
    commit(content, folder, [old.path for old in earlier if old.path not in kept])


def _check_arguments(
    spec: DetectorSpec,
    precision: str,
    memory: Optional[str],
    batch: Optional[Sequence[int]],
    may_give_up: Sequence[str],
) -> None:
    """What :func:`odtrt_lib.engine.build` would refuse, before minutes are spent on the compiler."""
    from odtrt_lib import engine

    _check_precision(precision)
    for concession in may_give_up:
        if concession not in engine.CONCESSIONS:
            raise InputError(f"may give up {concession!r}: expected {' or '.join(engine.CONCESSIONS)}")
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
    from odtrt_lib import engine

    if precision not in engine.PRECISIONS:
        raise InputError(f"precision {precision!r}: expected {' or '.join(engine.PRECISIONS)}")


def _batches(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))


def _parse_batches(text: Optional[str]) -> Optional[Tuple[int, ...]]:
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise InputError(f"batches {text!r}: {_EXPECTED_BATCHES}")
    return tuple(int(number) for number in text.split(","))


def _tell_needs(precision: str, say: Callable[[str], None]) -> int:
    """What is missing here, a line each; 1 where ``build_here`` needs it, 0 where it does without."""
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
    """Each plan in the bundle, whether it may be used here and now, and why; a line for each reason."""
    if not _can_find("numpy"):
        raise MissingDependencyError(f"numpy is missing: {_INSTALL_NUMPY}")
    from odtrt_lib import passport, portability

    model, plugin = folder / MODEL, folder / _PLUGIN
    here = portability.here(plugin if plugin.is_file() else None)
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


def _has_half_precision_flag(flavour: Optional[str]) -> bool:
    """Asked in a process of its own, because a builder should be the first to load TensorRT."""
    question = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r}); "
        f"import {flavour} as trt; from odtrt_lib.builder import is_weakly_typed; "
        "sys.exit(not is_weakly_typed(trt))"
    )
    if flavour is None:
        return False
    return subprocess.run([sys.executable, "-c", question], stderr=subprocess.DEVNULL).returncode == 0


def _can_find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _missing_programs() -> Dict[str, str]:
    """The programs that compile and are not here, each with what installs it and what is lost without it."""
    from odtrt_lib.passport import this_machine

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


def _compile(folder: Path, say: Callable[[str], None]) -> Tuple[Optional[Path], Optional[Path]]:
    """Compiles ``plugins/``: libodtrt.so and libodtrt_tensorrt.so, or None for what cannot be made here."""
    from odtrt_lib.passport import this_machine

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
        (build / "CMakeCache.txt").unlink()  # it would refuse a folder that was moved or copied
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
    """The exit status; where this process is interrupted, the command and all that it started end first."""
    process = subprocess.Popen(
        list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _reason(log: Path) -> str:
    """The first error in what cmake and the compiler said; theirs are on a line, or on two."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if "error" in line.lower() and "***" not in line:
            return one_line(" ".join(lines[number : number + 1 + line.startswith("CMake Error")]))[:200]
    return one_line(lines[-1]) if lines else "it said nothing"


def _place_plans(
    folder: Path, plans: Mapping[str, Path], flavour: str, say: Callable[[str], None]
) -> List[Path]:
    """Copies the plans to where Triton and nvinfer look for them."""
    wanted = [
        (path.parent / "1" / "model.plan", "heads.onnx")
        for path in sorted((folder / "triton").glob("*/config.pbtxt"))
        if 'platform: "tensorrt_plan"' in path.read_text(encoding="utf-8")
    ]
    if (folder / "deepstream").is_dir():
        wanted.append((folder / "deepstream" / "detector.plan", "detector.onnx"))
    placed = []
    for target, model in wanted:
        if flavour != "tensorrt":
            say(f"{target}: not written; it must be a plan of TensorRT, and this one is {flavour}'s")
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
    """An image that needs no file: uint8 [height, width, 3], the same on every machine."""
    import numpy as np

    height, width = spec.input.height, spec.input.width
    y, x, c = np.ogrid[:height, :width, :3]
    return ((x * x * 3 + y * y * 5 + x * y * (c + 1)) // 32 % 256).astype(np.uint8)


def _check_detections(found: Any, size: Tuple[int, int], spec: DetectorSpec) -> None:
    import numpy as np

    boxes, scores = found.boxes, found.scores
    # Boxes are clipped to the image, to within a rounding error of float32.
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
    """A listener for the build's progress that speaks up at every phase and tenth of it."""
    told = set()

    def tell(phase: str, fraction: float) -> None:
        tenth = int(fraction * 10)
        if (phase, tenth) not in told:
            told.add((phase, tenth))
            say(f"{model}: {phase}, {tenth * 10} %")

    return tell


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _exit_status(work: Callable[[], Optional[int]], place: Path) -> int:
    """place: what an error of the operating system that names no file is about."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the terminal's encoding lacks become escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        return work() or 0
    except OdtrtError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
    except OSError as error:
        shown = printable(cannot_write(Path(error.filename or place), error))
        print(f"error: {shown}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    return 1
