"""Records the outputs of the book's notebooks, and checks that recorded outputs are still true.

    python scripts/record_notebooks.py check              exit 1, naming each stale notebook and why
    python scripts/record_notebooks.py record             run and record the stale ones
    python scripts/record_notebooks.py record 01_export   run and record these, stale or not

The book publishes recorded outputs: building it runs nothing, so a reader without TensorFlow sees the
same pages. What keeps them honest is a stamp in each notebook's metadata (``odtrt``). It holds hashes of
everything that the outputs depend on:

* ``code``: the notebook's code cells, in order. Prose may be edited freely.
* ``library``: the modules of odtrt_lib that the notebook imports, and those that they import. An edit in
  another module leaves the notebook fresh, and so does an edit of comments, docstrings or blank lines.
* ``data``: the files below ``models/parts`` that an export reads, where the notebook names that folder, and
  the measurements ``results/*.json`` that it names.

A notebook is run in a fresh folder that shows it the library, the models, the measurements and nothing
else, so no output depends on what an earlier run left behind. Recording fails where an output holds an
absolute path, the host's name or anything on stderr, and then leaves the notebook as it was.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import socket
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 900
STAMP_CELL = "stamp"

_PACKAGES = {
    "numpy": "NumPy",
    "tensorflow-cpu": "TensorFlow",
    "tf2onnx": "tf2onnx",
    "onnx": "ONNX",
    "onnxruntime": "ONNX Runtime",
    "tensorrt-rtx-cu13": "TensorRT-RTX",
}
_RESULTS = re.compile(r"results/[\w.-]+\.json")
_MODEL_FILES = ("pipeline.config", "label_map.pbtxt", "checkpoint/*")
# What TensorFlow's C++ side writes to file descriptor 2 whatever its log level; the rest of stderr counts.
_TENSORFLOW_LOG = re.compile(
    r"(WARNING: All log messages before absl::InitializeLog|[IWE]\d{4} \d\d:|[IWE]0000 00:)"
)
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])/(?:home|root|work|tmp|usr|opt|mnt|srv|var|Users)/[\w.]")


def notebooks(root: Path) -> list[Path]:
    """The book's notebooks, in reading order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def code_sha256(notebook: Any) -> str:
    """The hash of the code cells' sources, in order; outputs, prose and metadata do not count."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return _sha256(json.dumps(sources).encode())


def library_modules(notebook: Any, root: Path) -> list[str]:
    """The files of odtrt_lib that the notebook depends on, directly or through another, sorted."""
    waiting = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            waiting |= _imported(_without_magics(cell.source), root)
    found: set[str] = set()
    while waiting:
        module = waiting.pop()
        found.add(module)
        text = (root / module).read_text(encoding="utf-8")
        waiting |= _imported(text, root) - found
    return sorted(found)


def library_sha256(modules: Iterable[str], root: Path) -> str:
    """The hash of what these modules do: their source without comments, docstrings and blank lines."""
    texts = [essential(root / module) for module in modules]
    return _sha256(json.dumps(texts).encode())


def essential(path: Path) -> str:
    """A module's source without comments, docstrings, blank lines and trailing spaces."""
    return _essential(path.read_text(encoding="utf-8"))


@functools.cache
def _essential(text: str) -> str:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for first, last in _docstrings(ast.parse(text)):
        lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def data_sha256(notebook: Any, root: Path) -> str:
    """The hash of the model's files and the measurements that code cells name; empty where they name none."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    files = [root / name for name in sorted(set(_RESULTS.findall(code)))]
    if "models/parts" in code:
        parts = root / "models" / "parts"
        files = sorted(path for pattern in _MODEL_FILES for path in parts.glob(pattern)) + files
    files = [path for path in files if path.is_file()]
    if not files:
        return ""
    return _sha256("".join(f"{path.name}:{_sha256(path.read_bytes())}" for path in files).encode())


def hashes(notebook: Any, root: Path) -> dict[str, str]:
    """Everything that recorded outputs depend on, by name."""
    return {
        "code": code_sha256(notebook),
        "library": library_sha256(library_modules(notebook, root), root),
        "data": data_sha256(notebook, root),
    }


def problems(path: Path, root: Path) -> list[str]:
    """Why the recorded outputs of a notebook cannot be trusted; an empty list where they can."""
    notebook = nbformat.read(path, as_version=4)
    stamp = notebook.metadata.get("odtrt")
    if stamp is None:
        return [f"{path.name}: never recorded"]
    changed = {
        "code": "a code cell was edited",
        "library": "a module of odtrt_lib that it uses was edited",
        "data": "the shipped model or a measurement that it shows is another one",
    }
    found = hashes(notebook, root)
    return [
        f"{path.name}: {reason} after its outputs were recorded on {stamp['date']}"
        for name, reason in changed.items()
        if stamp[name] != found[name]
    ]


def run(notebook: Any, root: Path) -> Any:
    """Executes a copy of a notebook in a fresh folder and returns it with its outputs.

    Raises nbclient's CellExecutionError where a cell fails that is not tagged ``raises-exception``.
    """
    from nbclient import NotebookClient

    executed = nbformat.from_dict(json.loads(json.dumps(notebook)))
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        (stage / "notebooks").mkdir()
        for name in ("odtrt_lib", "models", "results"):
            (stage / name).symlink_to(root / name, target_is_directory=True)
        environment = {**os.environ, "PYTHONPATH": str(stage), "PYTHONDONTWRITEBYTECODE": "1"}
        client = NotebookClient(
            executed,
            timeout=TIMEOUT_SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(stage / "notebooks")}},
        )
        client.execute(env=environment)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = _without_tensorflow_log(cell.outputs)
    return executed


def leaks(notebook: Any) -> list[str]:
    """What must not be published: stderr, absolute paths, the host's name, the clock in an output."""
    found = []
    host = socket.gethostname()
    for number, output in _outputs(notebook):
        text = _text(output)
        if output.get("name") == "stderr":
            found.append(f"cell {number} writes to stderr: {text.strip().splitlines()[0][:120]}")
        path = _ABSOLUTE_PATH.search(text)
        if path:
            found.append(f"cell {number} shows an absolute path: {text[path.start() : path.start() + 80]!r}")
        if len(host) > 3 and host != "localhost" and host in text:
            found.append(f"cell {number} shows the host's name")
    return found


def record(path: Path, root: Path) -> None:
    """Runs a notebook and writes it back with outputs and stamp. Raises SystemExit where it cannot."""
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    executed = run(notebook, root)
    seconds = time.perf_counter() - started
    found = leaks(executed)
    if found:
        raise SystemExit("\n".join(f"{path.name}: {problem}; not recorded" for problem in found))
    stamp = {
        **hashes(executed, root),
        "modules": library_modules(executed, root),
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores",
        "versions": _versions(),
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
    }
    executed.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "odtrt": stamp,
        }
    )
    for cell in executed.cells:
        cell.metadata.pop("execution", None)
        if cell.id == STAMP_CELL:
            cell.source = stamp_text(stamp)
    nbformat.validate(executed)
    temporary = path.with_suffix(".tmp")
    nbformat.write(executed, temporary)
    os.replace(temporary, path)


def stamp_text(stamp: dict[str, Any]) -> str:
    """The line under a notebook's title that says where its outputs come from."""
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    return (
        f"> Outputs recorded on {stamp['date']} in {stamp['seconds']} s on {stamp['device']}; "
        f"no GPU, not a Jetson. {versions}."
    )


def _versions() -> dict[str, str]:
    versions = {"odtrt": importlib.metadata.version("odtrt"), "Python": platform.python_version()}
    for distribution, name in _PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _outputs(notebook: Any) -> Iterator[tuple[int, Any]]:
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            yield number, output


def _without_tensorflow_log(outputs: Iterable[Any]) -> list[Any]:
    kept = []
    for output in outputs:
        if output.get("name") == "stderr":
            lines = output.text.splitlines(keepends=True)
            output.text = "".join(line for line in lines if not _TENSORFLOW_LOG.match(line))
        if output.get("text", "data"):
            kept.append(output)
    return kept


def _text(output: Any) -> str:
    data = output.get("data", {})
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [value for kind, value in data.items() if kind.startswith("text/") or kind == "image/svg+xml"]
    return "\n".join(part if isinstance(part, str) else "".join(part) for part in parts)


def _imported(text: str, root: Path) -> set[str]:
    """The files of odtrt_lib that are imported by name, each with the packages that it is in."""
    files = set()
    for name in _imported_names(text):
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            path = "/".join(parts[:count])
            files |= {one for one in (f"{path}.py", f"{path}/__init__.py") if (root / one).is_file()}
    return files


@functools.cache
def _imported_names(text: str) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name for name in names if name.split(".")[0] == "odtrt_lib")


def _without_magics(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.startswith("%"))


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, int]]:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            yield text.lineno, text.end_lineno or text.lineno


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("check", "record"))
    parser.add_argument("names", nargs="*", help="notebooks, such as 01_export; by default all stale ones")
    options = parser.parse_args(arguments)
    every = notebooks(ROOT)
    unknown = set(options.names) - {path.stem for path in every}
    if unknown:
        parser.error(f"no such notebook: {', '.join(sorted(unknown))}")
    chosen = [path for path in every if not options.names or path.stem in options.names]
    if options.command == "check":
        found = [problem for path in chosen for problem in problems(path, ROOT)]
        print("\n".join(found) or f"{len(chosen)} notebooks: outputs are current")
        if found:
            print("run: python scripts/record_notebooks.py record")
        return 1 if found else 0
    for path in chosen:
        if options.names or problems(path, ROOT):
            print(f"{path.stem} ...", flush=True)
            record(path, ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
