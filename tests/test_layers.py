"""Imports point one way, from the command line down to the errors; functions are short."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Set, Tuple

import odtrt_lib
from odtrt_lib.bundle.archive import WORKSTATION

PACKAGE = Path(odtrt_lib.__file__).parent

# From the ground up: each may import what comes before it. A package is one entry.
LAYERS = [
    "__init__",
    "errors",
    "spans",
    "variants",
    "machine",
    "boards",
    "requirements",
    "distribute",
    "spec",
    "folder",
    "anchors",
    "tensors",
    "onnx_model",
    "written_files",
    "results",
    "fonts",
    "cuda",
    "native",
    "nms",
    "preprocess",
    "sources",
    "coco",
    "scenes",
    "report",
    "zoo",
    "export",
    "convert",
    "int8",
    "engine",
    "fuse",
    "portability",
    "detector",
    "native_detector",
    "plots",
    "latency",
    "live",
    "evaluate",
    "notebooks",
    "bundle",
    "app",
    "__main__",
]


def modules(package: Path) -> Dict[str, Path]:
    """``engine.stage`` -> its file; ``engine`` is the package's own ``__init__``."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(package: Path) -> Iterator[Tuple[str, str]]:
    """(importer, imported), those inside of functions too; those for type checkers alone left out."""
    known = modules(package)
    for name, path in known.items():
        tree = ast.parse(path.read_text())
        for_types = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for statement in node.body
            for child in ast.walk(statement)
        }
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            wanted: List[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "odtrt_lib":
                base = (node.module or "").partition(".")[2]
                for alias in node.names:
                    inner = f"{base}.{alias.name}".strip(".")
                    wanted.append(inner if inner in known else base or "__init__")
            elif isinstance(node, ast.Import):
                names = (alias.name.partition(".") for alias in node.names)
                wanted = [rest or "__init__" for root, _, rest in names if root == "odtrt_lib"]
            yield from ((name, one) for one in wanted)


def upward(package: Path) -> List[str]:
    order = {name: number for number, name in enumerate(LAYERS)}
    found = []
    for importer, imported in imports(package):
        own, other = importer.split(".")[0], imported.split(".")[0]
        if own != other and order[other] > order[own]:
            found.append(f"{importer} imports {imported}")
    return sorted(set(found))


def circles(package: Path) -> List[str]:
    """Modules from which a way along the imports leads back to themselves."""
    graph: Dict[str, Set[str]] = {name: set() for name in modules(package)}
    for importer, imported in imports(package):
        graph[importer].add(imported)
    found = []
    for start in graph:
        reached, waiting = set(), list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting += graph[name]
        if start in reached:
            found.append(start)
    return found


def long_functions(folders: Iterable[Path]) -> List[str]:
    """Functions of more than 60 lines, signature and docstring included, that give no reason for it.

    The reason stands in the docstring, after the words "Long because".
    """
    found = []
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60 and "Long because" not in (ast.get_docstring(node) or ""):
                    found.append(f"{path.name}: {node.name}")
    return found


def test_every_module_has_its_place():
    assert {name.split(".")[0] for name in modules(PACKAGE)} == set(LAYERS)


def test_imports_go_down():
    assert upward(PACKAGE) == []


def test_no_circles():
    assert circles(PACKAGE) == []


def test_the_device_side_needs_nothing_of_the_workstation():
    """Only the command line and the notebooks do what a workstation can; on a device they say so. Quantising
    reads the frozen graph if there is one, which a bundle never brings; training is a workstation's."""
    allowed = {"app.cli", "app.demonstration", "notebooks", "int8.stage", "int8.qat"}
    away = {name.partition(".")[0] for name in WORKSTATION}
    found = {
        (importer, imported)
        for importer, imported in imports(PACKAGE)
        if imported.split(".")[0] in away and importer.split(".")[0] not in away
    }
    assert {importer for importer, _ in found} <= allowed


def test_functions_are_short_or_say_why_not():
    root = PACKAGE.parent
    folders = [PACKAGE, *(root / name for name in ("benchmarks", "models", "scripts"))]
    assert long_functions(folders) == []


def test_a_long_function_is_caught(tmp_path):
    body = "    x = 1\n" * 60
    (tmp_path / "a.py").write_text(f"def short():\n{body[10:]}\n\ndef long():\n{body}")
    (tmp_path / "b.py").write_text(f'def long():\n    """Long because it is a table."""\n{body}')
    assert long_functions([tmp_path]) == ["a.py: long"]


def test_an_upward_import_is_caught(tmp_path):
    package = Path(shutil.copytree(PACKAGE, tmp_path / "odtrt_lib"))
    file = package / "engine" / "half.py"
    file.write_text(file.read_text() + "\n\ndef late():\n    from odtrt_lib import bundle\n")
    assert upward(package) == ["engine.half imports bundle"]
    assert "engine.half" in circles(package)
