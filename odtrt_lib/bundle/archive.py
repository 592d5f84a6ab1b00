"""Packs a model folder into one file for the device, and unpacks it there.

``pack`` writes a zip archive. On the device, ``python3 parts.odtrt.zip`` unpacks it. In the unpacked folder,
``python3 build_here.py`` builds what belongs to that machine, and ``python3 detect.py`` shows what the
detector finds in pictures, videos and cameras. None of them needs TensorFlow, a network or an installed
odtrt: the archive contains the device side's source (all but :data:`WORKSTATION`).

::

    manifest.json  LICENSE  README.txt  __main__.py  build_here.py  detect.py
    model/         spec.json, anchors.npy, heads.onnx; what else plans are built from, and int8/, if there
    odtrt_lib/     the device side        plugins/    kernels and TensorRT plugin, to compile there
    prebuilt/      on request: what `make plugin TARGET=...` compiled for a board, so that it need not compile
    triton/        on request: a Triton model repository
    deepstream/    on request: nvinfer's configuration, labels and output parser
    notebooks/     on request: the book's notebooks that run on a device, with results/ and pictures/

A bundle contains no plans. A plan belongs to one TensorRT version and, unless it was built to be compatible,
to one GPU, and only the device knows its memory. So the device builds its own plans from the same ONNX.

Members are stored, not compressed: weights hardly compress, the same folder gives the same bytes on every
machine, and an archive cannot grow when it is read. ``manifest.json`` holds every member's size and SHA-256,
and nothing is unpacked unless all of them agree. This guards against damage, not against malice: whoever runs
an archive runs its author's code. In a file that was cut off Python finds no archive, and running it ends in
a SyntaxError; so ``pack`` also returns the SHA-256 of the whole file.

This module needs the standard library only. ``pack`` uses other modules, which need numpy.
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
import stat
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

from odtrt_lib import IMPORT_PATH, __version__
from odtrt_lib.bundle.prebuilt import COMPILED_SOURCES, PREBUILT, prebuilt_files
from odtrt_lib.bundle.serving import comment, deepstream_files, require_source, triton_repository
from odtrt_lib.errors import (
    CheckError,
    InputError,
    OdtrtError,
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
    made,
    recorded,
    require,
    sealed,
    sha256,
    sync,
    undisturbed,
    workplace,
)
from odtrt_lib.spec import DetectorSpec, load_spec
from odtrt_lib.tensors import Shape, heads_tensors
from odtrt_lib.variants import PRECISIONS, Variant
from odtrt_lib.written_files import require_no_input

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SUFFIX = ".odtrt.zip"
MODEL = "model"
# The parts of odtrt that need TensorFlow or OpenCV. A bundle contains all others.
WORKSTATION = ("convert", "export", "scenes.py")

_FORCE_UNPACK = "over a bundle that was unpacked there before; your own files there stay"
_MAX_MANIFEST_BYTES = 1 << 22
_BLOCK = 1 << 20
_UNPRINTABLE = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LOCAL_HEADER_BYTES = 30
_PLUGIN_SOURCES = (*COMPILED_SOURCES, "deepstream/*.cpp")


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of a bundle. path: relative, with ``/``; size: bytes; sha256: 64 hexadecimal digits."""

    path: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle contains, without ``manifest.json`` itself.

    odtrt: the version that packed it. name, spec_sha256: those of the detector.
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

    is_up_to_date: the same file was there already. has_postprocessing: it contains ``detector.onnx``, so a
    device with a GPU can build a plan that does the post-processing.
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
    notebooks: bool = False,
    target: Optional[str] = None,
    force: bool = False,
) -> Packed:
    """Writes a model folder, and what a device needs to use it, into one file. Equal inputs give equal bytes.

    triton: add a Triton model repository: ``heads.onnx`` for ONNX Runtime, and a model with the same inputs
    and outputs for the plan that ``build_here.py`` copies there. deepstream: add a configuration for
    DeepStream's nvinfer. notebooks: add the book's notebooks that run on a device, with what they need; see
    :mod:`odtrt_lib.bundle.notebooks`. target: add the libraries that `make plugin TARGET=...` compiled for
    that board, such as ``jetson-orin``. force: write over a file that is not a bundle.

    Raises InputError if a file is missing, damaged, not the one that its stage recorded or not made from
    the others, if ``archive`` is another kind of file or cannot be written, and if the libraries for
    ``target`` are absent or made from other sources; UnsupportedError if nvinfer cannot express what
    ``spec.json`` asks for.
    """
    folder, archive = Path(folder), Path(archive)
    if archive.is_dir():
        raise InputError(f"{archive}: a folder; expected a file name such as {archive.name}{SUFFIX}")
    if archive.exists() and not force and not _is_bundle(archive):
        raise InputError(f"{archive}: exists and is no bundle; choose another name, or use --force")
    content = sealed(folder, "spec.json")["spec.json"]
    spec = load_spec(folder / "spec.json", content)
    hashes, files = _model_files(folder, spec)
    sources: Dict[str, Union[Path, bytes]] = {**files, **dict(_device_side())}
    if triton:
        sources.update(triton_repository(folder, spec))
    if deepstream:
        sources.update(deepstream_files(folder, spec))
    if notebooks:
        sources.update(_notebooks(folder, spec))
    if target is not None:
        is_fused = f"{MODEL}/detector.onnx" in files
        sources.update(prebuilt_files(Path(IMPORT_PATH) / "plugins", target, is_fused))
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

    All members are compared with the manifest before the first one appears. The model is sealed:
    ``model/log.jsonl`` gets the bundle's hashes. force: unpack over an earlier bundle. What was built in it
    (plans, compiled libraries) stays. Files that the new bundle lacks are removed unless somebody changed
    them. Whoever opens the model in the meantime gets the old one or the new one. A folder that is no
    unpacked bundle is not written over. No link in the folder is followed, so nothing outside of it changes.
    expected_sha256: that of the archive, as ``pack`` returned it; 64 hexadecimal digits.

    Raises InputError, naming the member, if the archive is damaged or is not what its manifest says, and if
    ``folder`` may not or cannot be written; CheckError if the archive is not the expected one.
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
            seal_model(folder / MODEL, manifest, content / MODEL)
            for path in content.rglob("*"):
                sync(path)
            if is_occupied:
                _replace_files(content, folder, manifest, earlier)
            else:
                os.replace(content, folder)
                sync(folder.parent)
    return manifest


def verify(folder: Union[str, Path]) -> Manifest:
    """Compares an unpacked bundle with its manifest. Files that were built in it since are ignored.

    Raises InputError, naming the first file that is missing or not the one that was packed.
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


def run_archive(arguments: Sequence[str]) -> int:
    """Runs ``python3 parts.odtrt.zip [FOLDER]``: unpacks the archive itself; returns the exit status."""
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

    return exit_status(work, Path(options.folder))


_README = """\
{name}: an object detector packed by odtrt {version}.

    python3 build_here.py --needs     build nothing; say what is missing here
    python3 build_here.py             compile, build the plan for this machine, detect once as a check
    python3 build_here.py --precision fp16 --image picture.jpg
    python3 build_here.py --plans     build nothing; say which plans are usable here, and why others are not

To see what it finds:

    python3 detect.py picture.jpg     or a folder of pictures: a table, and pictures with boxes in detections/
    python3 detect.py --camera 0      a window or, without a screen, a page in the browser; ends with Ctrl-C
    python3 detect.py video.mp4       the same; also rtsp://..., and --camera csi:0 on a Jetson

{lessons}From then on, in this folder, or with it in PYTHONPATH:

    from odtrt_lib.detector import Detector
    detector = {opening}
    found = detector.detect(image)    # uint8 [height, width, 3], RGB

{form}

What this machine needs:

    always                   Python 3.8 or newer, numpy, TensorRT's Python module (on a Jetson: JetPack's)
    with an NVIDIA GPU       the CUDA runtime library, libcudart.so (on a Jetson: JetPack's)
    without one              onnxruntime; it detects then, and the plan is built but not run
    for --precision fp16     onnx and onnxconverter-common; not with TensorRT 8, which has a switch for it
    for the kernels          {compilers}
    for pictures             Pillow 10.1 or newer
    for videos and cameras   OpenCV's Python module as well; JetPack has it

{prebuilt}Without the compilers numpy does what the kernels do, slower.

built.json, which build_here.py writes at its end, says what it made: the plans and the compiled libraries,
what made the check's detections, these detections, and the line that opens the detector.

What is here: model/ is the detector, odtrt_lib/ and plugins/ are odtrt's source, under LICENSE.{serving}
manifest.json lists every file with its SHA-256; build_here.py compares them before it builds anything, and
names files among the source that are not from the bundle. That finds damage, not malice: whoever may write in
this folder can change build_here.py too.

When you carry the bundle on, compare its SHA-256 (`sha256sum FILE`) with the one that `odtrt pack` printed. A
file that was cut off on the way cannot explain itself: python3 on it ends in a SyntaxError.
"""
_LESSONS = """\
To learn how it works, by notebooks that run on this machine:

    sh notebooks/lab.sh               installs JupyterLab into .venv here, then opens them

"""
_PREBUILT_TEXT = """\
prebuilt/ has libraries that a workstation compiled for one kind of board. build_here.py uses them if GPU,
CUDA and TensorRT here are those of target.json; else it says why not, and compiles.

"""
PLUGIN = "plugins/build/libodtrt_tensorrt.so"
_FUSED_FORM = """\
The plan is that of model/detector.onnx, with the post-processing inside, and it is looked at only with
plugin=. build_here.py compiles that plugin and builds that plan where it finds an NVIDIA GPU, nvcc and
TensorRT's headers; elsewhere it makes the plan of model/heads.onnx, and plugin= must be left out. It ends
with the very line that works on this machine."""
_SPLIT_FORM = """\
The plan is that of model/heads.onnx; the post-processing follows it, in the kernels. build_here.py ends with
the very line that works on this machine."""

# Python 2 and 3.6 (JetPack 4) must be able to read these.
_MAIN = '''\
"""Unpacks the archive that this file is in."""
import sys

if sys.version_info < (3, 8):
    sys.exit("error: Python %d.%d is too old, expected 3.8 or newer" % sys.version_info[:2])

from odtrt_lib.bundle import run_archive

sys.exit(run_archive(sys.argv))
'''
_SCRIPT = '''\
"""{purpose} --help says more."""
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

from odtrt_lib.bundle import {run}

sys.exit({run}(sys.argv))
'''
_SCRIPTS = {
    "build_here.py": _SCRIPT.format(
        purpose="Compiles, builds the plan for this machine and detects once.", run="run_build_here"
    ),
    "detect.py": _SCRIPT.format(
        purpose="Shows what the detector finds in pictures, videos and cameras.", run="run_detect"
    ),
}


def _model_files(folder: Path, spec: DetectorSpec) -> Tuple[Dict[str, str], Dict[str, Union[Path, bytes]]]:
    """The recorded hashes of the model's files, and name in the bundle -> the file on this machine."""
    from odtrt_lib.anchors import load_anchors
    from odtrt_lib.engine.builder import weights_by_type

    others = [Variant(precision, form).file for precision in PRECISIONS for form in ("heads", "plugin")]
    names = ["spec.json", "anchors.npy", "heads.onnx"]
    names += [one for one in dict.fromkeys(others) if one not in names and (folder / one).is_file()]
    hashes = check_seal(folder, *names)
    load_anchors(folder / "anchors.npy", spec)
    weights_by_type(folder / "heads.onnx")  # raises InputError if it is no ONNX model
    if recorded(folder)["heads.onnx"].stage != "convert":
        _check_heads(folder / "heads.onnx", spec)
    files: Dict[str, Union[Path, bytes]] = {f"{MODEL}/{name}": folder / name for name in names}
    for path in sorted((folder / "int8").rglob("*")):
        if path.is_file() and not path.is_symlink():
            files[f"{MODEL}/{path.relative_to(folder).as_posix()}"] = path
    return hashes, files


def seal_model(model: Path, manifest: Manifest, staged: Optional[Path] = None) -> None:
    """Records in the model folder that its files are the bundle's. staged: the folder in which they still
    are."""
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
    """Compares the model's inputs and outputs with ``spec``, if onnx is installed."""
    try:
        import onnx
    except ImportError:
        return
    again = "run `odtrt convert` again"
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's errors have no narrower base class
        raise InputError(f"{path}: not an ONNX model ({one_line(error)}); {again}") from error
    tensors = heads_tensors(spec)
    weights = {tensor.name for tensor in graph.initializer}
    expected = {"inputs": tensors.inputs, "outputs": tensors.outputs}
    for kind, values in (("inputs", graph.input), ("outputs", graph.output)):
        found: Dict[str, Shape] = {}
        for value in values:
            if value.name not in weights:
                tensor = value.type.tensor_type
                dims = tensor.shape.dim
                sizes = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
                found[value.name] = sizes
                if tensor.elem_type != onnx.TensorProto.FLOAT:
                    raise InputError(f"{path}: {value.name} is not float32, as spec.json expects; {again}")
        shapes = {tensor.name: tensor.shape for tensor in expected[kind]}
        if found != shapes:
            raise InputError(
                f"{path}: {kind} {_shapes(found)}, expected {_shapes(shapes)} as spec.json says; {again}"
            )


def _shapes(tensors: Mapping[str, Shape]) -> str:
    return ", ".join(
        f"{name} [{', '.join('any' if size is None else str(size) for size in shape)}]"
        for name, shape in tensors.items()
    )


def _readme(spec: DetectorSpec, members: Iterable[str]) -> str:
    """The text of ``README.txt`` for a bundle with these members."""
    names = set(members)
    is_fused = f"{MODEL}/detector.onnx" in names
    compilers = "cmake 3.16 or newer, a C++ compiler; for the GPU's nvcc"
    serving = [
        f"{name}/ is for {program}"
        for name, program in (("triton", "Triton"), ("deepstream", "DeepStream"))
        if any(path.startswith(f"{name}/") for path in names)
    ]
    return _README.format(
        name=comment(spec.name),
        version=__version__,
        opening=f'Detector.open("{MODEL}"' + (f', plugin="{PLUGIN}")' if is_fused else ")"),
        form=_FUSED_FORM if is_fused else _SPLIT_FORM,
        compilers=compilers + (" and TensorRT's headers" if is_fused else ""),
        serving="".join(f"\n{text}." for text in serving),
        lessons=_LESSONS if "notebooks/lab.sh" in names else "",
        prebuilt=_PREBUILT_TEXT if any(path.startswith(f"{PREBUILT}/") for path in names) else "",
    )


def _device_side() -> Iterator[Tuple[str, Union[Path, bytes]]]:
    checkout = Path(IMPORT_PATH)
    package = checkout / "odtrt_lib"
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in WORKSTATION:
            yield f"odtrt_lib/{name.as_posix()}", path
    for pattern in _PLUGIN_SOURCES:
        found = sorted(path for path in (checkout / "plugins").glob(pattern) if path.is_file())
        for path in found or [require_source(checkout / "plugins" / pattern)]:
            yield path.relative_to(checkout).as_posix(), path
    yield "LICENSE", require_source(checkout / "LICENSE")
    yield "__main__.py", _MAIN.encode()
    for script, text in _SCRIPTS.items():
        yield script, text.encode()


def _notebooks(folder: Path, spec: DetectorSpec) -> Dict[str, Union[Path, bytes]]:
    from odtrt_lib.bundle.notebooks import files_to_bring

    require(folder, "detector.onnx", "fuse")
    return files_to_bring(folder, spec)


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
    """An open archive with its manifest. Has checked that the members are the manifest's, and that no name is
    unsafe."""
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
        if by_name[MANIFEST].file_size > _MAX_MANIFEST_BYTES:
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
    """The members of an earlier bundle that may be removed: the new bundle lacks them, and nobody changed
    them."""
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
    """Raises InputError if a file, a link or a folder is in the way of one of these files."""
    for path in paths:
        target = folder / path
        for parent in (folder / one for one in PurePosixPath(path).parents if str(one) != "."):
            if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
                found = "a link" if parent.is_symlink() else "a file"
                raise InputError(f"{parent}: {found}, expected a folder; nothing was changed: move it away")
        if target.is_dir() and not target.is_symlink():
            raise InputError(f"{target}: a folder, expected a file; nothing was changed: move it away")


def strangers(folder: Path, manifest: Manifest) -> List[str]:
    """Files beside the bundle's source that are not the bundle's: Python or a compiler could use them."""
    members = {member.path for member in manifest.members} | {MANIFEST, "built.json"}
    known = members | {parent.as_posix() for path in members for parent in PurePosixPath(path).parents}
    code = [path for place in ("odtrt_lib", "plugins") for path in (folder / place).rglob("*")]
    found = []
    for path in sorted([*folder.iterdir(), *code]):
        name = path.relative_to(folder).as_posix()
        is_made = "__pycache__" in path.parts or name.startswith("plugins/build/")
        is_folder = path.is_dir() and not (path / "__init__.py").exists()
        if name not in known and not is_made and not is_folder:
            found.append(name)
    return found


def refuse_impostors(folder: Path, names: Iterable[str]) -> None:
    """Raises InputError if Python would import one of these files instead of its own module: the processes
    that build import from this folder first."""
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
    """Raises InputError for what ``pack`` never writes: unsafe or double names, links, compression,
    overlaps."""
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
    """Whether a relative path stays in its folder and has no control characters or direction marks."""
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
            text = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an unpacked bundle") from error
    if len(text) > _MAX_MANIFEST_BYTES:
        raise InputError(f"{path}: too large to be a bundle's; unpack the bundle again")
    return _parse_manifest(str(path), text)


def _blocks(archive: Path, zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, size: int) -> Iterator[bytes]:
    """The content of a member, in blocks. Raises InputError unless it has exactly ``size`` bytes."""
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
    """A new folder beside ``folder``, on the same disk. It is removed after the block unless it was moved."""
    try:
        with made(folder.parent), workplace(folder.parent, f".{folder.name}.unpack-") as place:
            content = place / "content"
            content.mkdir()
            yield content
    except OSError as error:
        raise cannot_write(folder, error) from error


def _replace_files(content: Path, folder: Path, manifest: Manifest, earlier: Sequence[Member]) -> None:
    """Replaces the files of an earlier bundle; for whoever opens the model, in one step."""
    kept = {member.path for member in manifest.members}
    commit(content, folder, [old.path for old in earlier if old.path not in kept])


def exit_status(work: Callable[[], Optional[int]], place: Path) -> int:
    """Runs ``work``, and prints an error as one line; returns the exit status. place: what an error message
    names if the operating system names no file."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escapes letters that the terminal's encoding lacks
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
