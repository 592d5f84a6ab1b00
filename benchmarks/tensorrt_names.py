"""Which names each TensorRT's Python bindings have, and do they have those that odtrt uses?

Writes results/tensorrt_names.json.

python benchmarks/tensorrt_names.py [--wheels DIR] [--output FILE]    downloads and imports the bindings
python benchmarks/tensorrt_names.py check                             judges odtrt_lib by the committed file

The bindings of each version in WHEELS are downloaded with pip (about 40 MB, and 549 MB for 8.5, whose wheel
holds the libraries too) by whichever Python 3.8 or newer is found that has a wheel of it. Each is imported in
a process of its own over stub libraries, which gcc makes from the symbols that the binding asks for. No GPU,
no CUDA and no TensorRT are needed, and nothing of NVIDIA's runs but the binding's registration of its names.

A name that exists need not work: TensorRT-RTX has `create_timing_cache`, whatever its cache is worth.

The sources are followed with the set of versions that can reach each line: `if hasattr(x, "name")`,
`getattr(x, "name", None)`, a test of the library, early exits, `except AttributeError` and the calls of a
private function narrow it. A name must exist in every version that can reach its line. Which class an object
is of is told by what made it, else by what its variable is called (RECEIVERS); of an object that neither
tells, a name is looked for in all classes named here, and only judged if it comes or goes between versions.
Names that are put together at run time, as those of compute capabilities, are not judged.

Why the sources are followed, not run. Strict stand-ins, which have one version's names of this inventory and
nothing else, were tried (2026-11). They judge only lines that a test runs, on the versions that it runs them
on. Of the 18 defects that test_tensorrt_names.py seeds they named 17; the other is in a branch that no call
takes. Of the 180 uses in builder.py and runtime.py 20 stand on lines that the stand-ins' tests do not run,
those of a parser's error among them. To see what the scan sees in 12 seconds, every scenario would have to
run, a process each, on all seven groups of versions with the same of these names. Once all of these lines
run on all of these groups, the stand-ins can replace the scan.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from odtrt_lib.results import write_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "tensorrt_names.json"
COMMAND = "python benchmarks/tensorrt_names.py"
RUNTIME_LIBRARIES = ("tensorrt", "tensorrt_rtx")
# Oldest first. 8.5.2 is JetPack 5.1's.
WHEELS = (
    ("tensorrt", "tensorrt", "8.5.2.2"),
    ("tensorrt", "tensorrt-bindings", "8.6.1"),
    *(
        ("tensorrt", "tensorrt-cu12-bindings", version)
        for version in (
            *("10.0.1", "10.1.0", "10.2.0", "10.3.0", "10.4.0", "10.5.0", "10.6.0", "10.7.0", "10.8.0.43"),
            *("10.9.0.34", "10.10.0.31", "10.11.0.33", "10.12.0.36", "10.13.0.35", "10.13.2.6"),
            *("10.13.3.9", "10.14.1.48.post1", "10.15.1.29", "10.16.0.72", "10.16.1.11"),
        )
    ),
    *(
        ("tensorrt", "tensorrt-cu13-bindings", version)
        for version in ("11.0.0.114", "11.1.0.106", "11.2.1.2", "11.3.0.99", "11.4.0.106")
    ),
    *(
        ("tensorrt_rtx", "tensorrt-rtx-cu13-bindings", version)
        for version in ("1.4.0.76", "1.5.0.114", "1.6.1.120", "1.7.1.116")
    ),
)
MODULE = "(module)"
# What a variable of this name holds, unless an assignment or an import in its function says otherwise.
RECEIVERS = {
    "trt": MODULE,
    "tensorrt": MODULE,
    "tensorrt_rtx": MODULE,
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "registry": "IPluginRegistry",
    "timing_cache": "ITimingCache",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
}
MAKES = {
    (MODULE, "get_plugin_registry"): "IPluginRegistry",
    (MODULE, "get_builder_plugin_registry"): "IPluginRegistry",
    ("Builder", "create_network"): "INetworkDefinition",
    ("Builder", "create_builder_config"): "IBuilderConfig",
    ("Builder", "create_optimization_profile"): "IOptimizationProfile",
    ("Builder", "get_plugin_registry"): "IPluginRegistry",
    ("Builder", "build_serialized_network"): "IHostMemory",
    ("IBuilderConfig", "create_timing_cache"): "ITimingCache",
    ("IBuilderConfig", "get_timing_cache"): "ITimingCache",
    ("INetworkDefinition", "get_input"): "ITensor",
    ("INetworkDefinition", "get_output"): "ITensor",
    ("INetworkDefinition", "get_layer"): "ILayer",
    ("OnnxParser", "get_error"): "ParserError",
    ("Runtime", "deserialize_cuda_engine"): "ICudaEngine",
    ("Runtime", "get_plugin_registry"): "IPluginRegistry",
    ("ICudaEngine", "create_execution_context"): "IExecutionContext",
    ("ICudaEngine", "create_engine_inspector"): "EngineInspector",
    ("ICudaEngine", "create_runtime_config"): "IRuntimeConfig",
    ("IRuntimeConfig", "create_runtime_cache"): "IRuntimeCache",
}
# `precision` and `type` of a layer are too common words to tell a layer by.
KNOWN_CLASSES = tuple(sorted({*RECEIVERS.values(), *MAKES.values()} - {MODULE, "ILayer"}))
# What odtrt's own class must define where it is derived from one of TensorRT's: their small-letter names.
INTERFACES = ("IErrorRecorder", "ILogger", "IProgressMonitor")
LIST = "list of "
PYTHONS_OWN = frozenset(name for kind in (bytes, dict, list, set, str, Path) for name in dir(kind))
FOREIGN = "(imported from elsewhere)"
OURS = "(an object of odtrt's)"  # whose attributes may be TensorRT's

Version = tuple[str, str]  # runtime_library and version
Versions = frozenset[Version]

LIST_NAMES = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
package = importlib.import_module(sys.argv[2])
found = {}
def list_names(path, thing):
    values = {name: getattr(thing, name) for name in dir(thing) if not name.startswith("_")}
    found[path or "(module)"] = [name for name in values if type(values[name]) is not type(sys)]
    for name, value in values.items():
        if isinstance(value, type) and value.__module__.split(".")[0] == sys.argv[2]:
            list_names((path + "." + name).lstrip("."), value)
list_names("", package)
print(json.dumps({"version": package.__version__, "names": found}))
"""


@dataclass(frozen=True)
class Inventory:
    """``members[class][name]``: the versions that have it. A class in a class is ``"Logger.Severity"``."""

    versions: tuple[Version, ...]
    members: Mapping[str, Mapping[str, Versions]]

    def of(self, owner: Optional[str], name: str) -> Versions:
        """The versions whose class ``owner`` has ``name``; where it is None, whose KNOWN_CLASSES have it."""
        owners = KNOWN_CLASSES if owner is None else (owner,)
        return frozenset().union(*(self.members.get(one, {}).get(name, frozenset()) for one in owners))


@dataclass(frozen=True)
class Use:
    """One place where a name is used. ``reached_by``: the versions that can come here."""

    file: str
    line: int
    owner: Optional[str]
    name: str
    reached_by: Versions
    is_asked_first: bool  # hasattr, getattr with a default, or under `except AttributeError`


def read_inventory(path: Path = RESULTS) -> Inventory:
    return inventory_from(json.loads(path.read_text(encoding="utf-8"))["rows"])


def inventory_from(rows: Sequence[Mapping[str, Any]]) -> Inventory:
    """The inventory that rows of versions and of members (:func:`inventory_rows`) describe."""
    versions = tuple((row["runtime_library"], row["version"]) for row in rows if "version" in row)
    members: dict[str, dict[str, Versions]] = {}
    for row in (row for row in rows if "members" in row):
        first, last = (versions.index((row["runtime_library"], row[end])) for end in ("since", "until"))
        for name in row["members"].split():
            names = members.setdefault(row["class"], {})
            names[name] = names.get(name, frozenset()) | frozenset(versions[first : last + 1])
    return Inventory(versions, members)


def inventory_rows(names: Mapping[Version, Mapping[str, Sequence[str]]]) -> list[dict[str, str]]:
    """A row for the members of a class that came and went together; ``since`` and ``until`` are inclusive."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for runtime_library in RUNTIME_LIBRARIES:
        order = [version for version in names if version[0] == runtime_library]
        every = {
            (owner, name) for version in order for owner in names[version] for name in names[version][owner]
        }
        for owner, name in sorted(every):
            has = [name in names[version].get(owner, ()) for version in order] + [False]
            for index, (before, now) in enumerate(zip([False, *has], has, strict=False)):
                if now and not before:
                    first = index
                if before and not now:
                    ends = (order[first][1], order[index - 1][1])
                    rows.setdefault((runtime_library, owner, *ends), []).append(name)
    return [
        {
            "runtime_library": runtime_library,
            "class": owner,
            "since": since,
            "until": until,
            "members": " ".join(members),
        }
        for (runtime_library, owner, since, until), members in rows.items()
    ]


def interpreters() -> list[str]:
    """One Python from 3.8 on of each minor version that is found here, oldest first."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [sys.executable, *map(str, sorted(pyenv.glob("versions/3.*/bin/python3")))]
    candidates += filter(None, (shutil.which(f"python3.{minor}") for minor in range(8, 20)))
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        asked = subprocess.run(
            [candidate, "-c", "import pip, sys; print(*sys.version_info[:2])"], capture_output=True, text=True
        )
        if asked.returncode == 0:
            major, minor = map(int, asked.stdout.split())
            if (major, minor) >= (3, 8):
                found.setdefault((major, minor), candidate)
    return [found[version] for version in sorted(found)]


def download(
    distribution: str, version: str, pythons: Sequence[str], folder: Path
) -> Optional[tuple[Path, str, list[str]]]:
    """The wheel, the first of ``pythons`` that can use it, and the tags of all Linux x86-64 wheels of it."""
    stem = f"{distribution.replace('-', '_')}-{version}"
    for python in pythons:
        options = ["--no-deps", "--only-binary=:all:", "-vv", "-d", str(folder)]
        answer = subprocess.run(
            [python, "-m", "pip", "download", *options, f"{distribution}=={version}"],
            capture_output=True,
            text=True,
        )
        wheels = set(re.findall(rf"{re.escape(stem)}-(cp\d+)-\S*?x86_64\.whl", answer.stdout + answer.stderr))
        if answer.returncode == 0:
            tag = "cp" + "".join(_run([python, "-V"]).split()[1].split(".")[:2])
            found = list(folder.glob(f"{stem}-{tag}-*.whl"))
            if found:
                return found[0], python, sorted(wheels, key=lambda tag: int(tag[3:]))
    return None


def list_names(wheel: Path, python: str) -> dict[str, Any]:
    """``{"version", "names": {class: [name, ...]}}`` of the bindings in ``wheel``, imported by ``python``."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with zipfile.ZipFile(wheel) as archive:
            package = next(name for name in archive.namelist() if name.count("/") == 1).split("/")[0]
            is_binding = re.compile(rf"{package}/(.*\.py|tensorrt(_rtx)?\.so)").fullmatch
            archive.extractall(folder, [name for name in archive.namelist() if is_binding(name)])
        for binding in folder.glob("*/*.so"):
            make_stub_libraries(binding, folder)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
        options = ["-E", "-S", "-c", LIST_NAMES]
        return json.loads(_run([python, *options, str(folder), package], environment))


def make_stub_libraries(binding: Path, folder: Path) -> None:
    """TensorRT's libraries that ``binding`` needs, each with every function that the binding asks for."""
    symbols = [line.split() for line in _run(["nm", "-D", "--undefined-only", str(binding)]).splitlines()]
    asked = [name for kind, name in symbols if kind == "U" and re.search("(?i)infer|parser|plugin", name)]
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in asked))
    for needed in re.findall(r"NEEDED.*\[(lib(?:nv|tensorrt).*)\]", _run(["readelf", "-d", str(binding)])):
        library = [f"-Wl,-soname,{needed}", "-o", str(folder / needed)]
        _run(["gcc", "-shared", "-fPIC", "-w", str(source), *library])


def uses_in(source: str, file: str, inventory: Inventory) -> list[Use]:
    """Every use of a name of TensorRT's in ``source``, in the order of its lines."""
    scan = _Scan(ast.parse(source), file, inventory)
    return sorted(scan.uses(), key=lambda use: (use.line, use.name))


def violations(uses: Iterable[Use], inventory: Inventory) -> list[str]:
    """One line for each use that some version which can reach it does not have."""
    found = []
    for use in uses:
        have = inventory.of(use.owner, use.name)
        missing = [v for v in inventory.versions if v in use.reached_by and v not in have]
        what = f"{use.file}:{use.line}: {use.owner or '(any class)'}.{use.name}"
        if not have and use.owner not in (None, *inventory.members):
            found.append(f"{what}: not defined, and TensorRT calls it")
        elif not have:
            found.append(f"{what}: no version has it")
        elif missing and not use.is_asked_first:
            found.append(f"{what}: used without asking, not in {_in_words(missing)}")
    return found


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of every file of odtrt_lib."""
    for path in sorted((ROOT / "odtrt_lib").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def source_rows(inventory: Inventory) -> list[dict[str, Any]]:
    rows = []
    for name, text in sources():
        uses = uses_in(text, name, inventory)
        if uses:
            everywhere = frozenset(inventory.versions)
            rows.append(
                {
                    "file": name,
                    "names": len({(use.owner, use.name) for use in uses}),
                    "uses": len(uses),
                    "uses_guarded": sum(use.is_asked_first or use.reached_by != everywhere for use in uses),
                    "violations": len(violations(uses, inventory)),
                }
            )
    return rows


# Where a fact is known besides a function: of an attribute, argument or key; of what a function answers.
FIELD, ANSWER = "(field)", "(answer)"
PASSES = 50
_Truth = tuple[Versions, Versions]  # the versions where a test can be true, and where it can be false


class _Scan:
    """Follows one file. ``_facts``: what names say of the version, as the pass before this one found."""

    def __init__(self, tree: ast.Module, file: str, inventory: Inventory) -> None:
        self.tree, self.file, self.inventory = tree, file, inventory
        self.everywhere = frozenset(inventory.versions)
        self.functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        named = {getattr(node, "id", getattr(node, "arg", None)) for node in ast.walk(tree)}
        self.receivers = RECEIVERS if named & {"trt", *RUNTIME_LIBRARIES} else {}
        self._attributes: dict[str, str] = {}
        self.entries: dict[str, Versions] = {}
        self.exits: dict[str, Versions] = {}
        self._facts: dict[tuple[str, str], _Truth] = {}
        self._reset()

    def _reset(self) -> None:
        self.found: dict[tuple[int, int, Optional[str], str], Use] = {}
        self.calls: dict[str, Versions] = {}
        self.facts: dict[tuple[str, str], _Truth] = {}
        self.attributes: dict[str, str] = {}
        self.types: list[dict[str, Optional[str]]] = [{}]
        self.scopes = [""]
        self.returned: list[Versions] = [frozenset()]
        self.asked_first = False

    def uses(self) -> list[Use]:
        for _ in range(PASSES):
            before = (dict(self.entries), dict(self.exits), self._facts, self._attributes)
            self._reset()
            self._run(self.tree.body, self.everywhere)
            for name in self.functions:
                if name.startswith("_"):
                    self.entries[name] = self.calls.get(name, self.everywhere)
            self._facts, self._attributes = self.facts, self.attributes
            if (self.entries, self.exits, self._facts, self._attributes) == before:
                return list(self.found.values())
        raise RuntimeError(f"{self.file}: {PASSES} passes did not settle which version reaches which line")

    def _run(self, body: Sequence[ast.stmt], here: Versions) -> Versions:
        """Follows statements that the versions ``here`` reach; returns those that reach their end."""
        for statement in body:
            here = self._statement(statement, here)
        return here

    def _statement(self, node: ast.stmt, here: Versions) -> Versions:
        if isinstance(node, ast.If):
            self._expression(node.test, here)
            true, false = self._truth(node.test)
            return self._run(node.body, here & true) | self._run(node.orelse, here & false)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._function(node, here)
            return here
        if isinstance(node, ast.ClassDef):
            self._class(node, here)
            return here
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                is_tensorrt = isinstance(node, ast.Import) and alias.name in RUNTIME_LIBRARIES
                self.types[-1][alias.asname or alias.name.split(".")[0]] = MODULE if is_tensorrt else FOREIGN
            return here
        if isinstance(node, (ast.Return, ast.Raise)):
            for part in ast.iter_child_nodes(node):
                self._expression(part, here)
            if isinstance(node, ast.Return):
                self.returned[-1] |= here
            return frozenset()
        if isinstance(node, (ast.Continue, ast.Break)):
            return frozenset()
        if isinstance(node, ast.Try):
            return self._try(node, here)
        if isinstance(node, ast.With):
            return self._with(node, here)
        if isinstance(node, (ast.For, ast.While)):
            inside = here
            if isinstance(node, ast.For):
                self._expression(node.iter, here)
                self._assign_each(node.target, node.iter)
            else:
                self._expression(node.test, here)
                inside = here & self._truth(node.test)[0]
            self._run(node.body, inside)
            self._run(node.orelse, here)
            return here
        for part in ast.iter_child_nodes(node):
            self._expression(part, here)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._assign(target, node.value)
        called = node.value.func if isinstance(getattr(node, "value", None), ast.Call) else None
        return here & self.exits.get(called.id, here) if isinstance(called, ast.Name) else here

    def _class(self, node: ast.ClassDef, here: Versions) -> None:
        for part in (*node.decorator_list, *node.bases):
            self._expression(part, here)
        for base in node.bases:
            self._interface(node, self._type(base), here)
        self.scopes.append(node.name)
        self._run(node.body, here)
        self.scopes.pop()

    def _try(self, node: ast.Try, here: Versions) -> Versions:
        with_handlers = any(_catches_attribute_error(handler.type) for handler in node.handlers)
        end = self._asking_first(node.body, here, with_handlers)
        end = self._run(node.orelse, end)
        for handler in node.handlers:
            end |= self._run(handler.body, here)
        return self._run(node.finalbody, here) & end if node.finalbody else end

    def _with(self, node: ast.With, here: Versions) -> Versions:
        for item in node.items:
            self._expression(item.context_expr, here)
            if item.optional_vars is not None:
                self._assign(item.optional_vars, item.context_expr)
        suppressed = any(
            isinstance(item.context_expr, ast.Call)
            and _last_name(item.context_expr.func) == "suppress"
            and any(_catches_attribute_error(argument) for argument in item.context_expr.args)
            for item in node.items
        )
        end = self._asking_first(node.body, here, suppressed)
        return here if suppressed else end

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, here: Versions) -> None:
        for part in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self._expression(part, here)
        is_top = len(self.types) == 1 and self.scopes == [""]
        if is_top and node.name.startswith("_"):
            here = self.entries.get(node.name, frozenset())
        self.types.append(dict(self.types[-1]))
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        for argument in arguments:
            self.types[-1].pop(argument.arg, None)
            written = ast.unparse(argument.annotation) if argument.annotation is not None else "Any"
            if not re.search(r"\b(Any|ModuleType|object|trt)\b", written):
                self.types[-1][argument.arg] = OURS
        self.scopes.append(node.name)
        self.returned.append(frozenset())
        asked_first, self.asked_first = self.asked_first, False
        end = self._run(node.body, here) | self.returned.pop()
        self.asked_first = asked_first
        self.scopes.pop()
        self.types.pop()
        if is_top:
            self.exits[node.name] = end if here == self.everywhere else end | (self.everywhere - here)
            body = [part for part in node.body if not _is_docstring(part)]
            if len(body) == 1 and isinstance(body[0], ast.Return) and body[0].value is not None:
                self._learn((ANSWER, node.name), self._truth(body[0].value))

    def _asking_first(self, body: Sequence[ast.stmt], here: Versions, is_asking: bool) -> Versions:
        before, self.asked_first = self.asked_first, self.asked_first or is_asking
        end = self._run(body, here)
        self.asked_first = before
        return end

    def _expression(self, node: ast.AST, here: Versions) -> None:
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._expression(value, here)
                here &= self._truth(value)[0 if isinstance(node.op, ast.And) else 1]
            return
        if isinstance(node, ast.IfExp):
            true, false = self._truth(node.test)
            self._expression(node.test, here)
            self._expression(node.body, here & true)
            self._expression(node.orelse, here & false)
            return
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            self.types.append(dict(self.types[-1]))
            for generator in node.generators:
                self._expression(generator.iter, here)
                self._assign_each(generator.target, generator.iter)
                for test in generator.ifs:
                    self._expression(test, here)
                    here &= self._truth(test)[0]
            made = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
            for part in made:
                self._expression(part, here)
            self.types.pop()
            return
        probe = _probe(node)
        if probe is not None:
            receiver, name, has_default = probe
            self._use(node, receiver, name, here, has_default)
        if isinstance(node, ast.Attribute):
            self._use(node, node.value, node.attr, here, False)
        if isinstance(node, ast.Name) and node.id in self.functions:
            self.calls[node.id] = self.calls.get(node.id, frozenset()) | here
        if isinstance(node, ast.keyword) and node.arg is not None:
            self._learn((FIELD, node.arg), self._truth(node.value))
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    self._learn((FIELD, str(key.value)), self._truth(value))
        for part in ast.iter_child_nodes(node):
            self._expression(part, here)

    def _use(self, node: ast.AST, receiver: ast.expr, name: str, here: Versions, asked: bool) -> None:
        owner = self._type(receiver)
        if owner in (FOREIGN, OURS) or (owner or "").startswith(LIST) or name.startswith("_"):
            return
        if owner is None and (
            name in PYTHONS_OWN or self.inventory.of(None, name) in (frozenset(), self.everywhere)
        ):
            return
        if owner in KNOWN_CLASSES:  # where there is an object, there is its class
            here &= self.inventory.of(MODULE, owner.split(".")[0])
        key = (node.lineno, node.col_offset, owner, name)
        self.found[key] = Use(self.file, node.lineno, owner, name, here, asked or self.asked_first)

    def _type(self, node: ast.AST) -> Optional[str]:
        """The class of TensorRT's that ``node`` is or is an instance of, FOREIGN, OURS, or None: unknown."""
        if isinstance(node, ast.Name):
            if node.id in self.types[-1]:
                return self.types[-1][node.id]
            return self.receivers.get(node.id.lstrip("_"))
        if isinstance(node, ast.Attribute):
            return self._type_of_attribute(self._type(node.value), node.attr)
        if isinstance(node, ast.Call):
            probe = _probe(node)
            if probe is not None and _last_name(node.func) == "getattr":
                return self._type_of_attribute(self._type(probe[0]), probe[1])
            if _last_name(node.func) == "import_module" and node.args:
                argument = node.args[0]
                named = argument.value if isinstance(argument, ast.Constant) else _last_name(argument)
                return MODULE if named in (*RUNTIME_LIBRARIES, "runtime_library") else None
            if isinstance(node.func, ast.Attribute):
                made = MAKES.get((self._type(node.func.value) or "", node.func.attr))
                if made is not None:
                    return made
            called = self._type(node.func)
            if called in self.inventory.members and called != MODULE:
                return called
            if not _last_name(node.func).lstrip("_")[:1].isupper():
                return None
            return FOREIGN if called == FOREIGN else OURS
        if isinstance(node, ast.IfExp):
            return self._type(node.body) or self._type(node.orelse)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            self.types.append(dict(self.types[-1]))
            for generator in node.generators:
                self._assign_each(generator.target, generator.iter)
            one = self._type(node.elt)
            self.types.pop()
            return LIST + one if one in self.inventory.members else None
        if isinstance(node, ast.Subscript):
            return self._one_of(node.value)
        if isinstance(node, (ast.JoinedStr, ast.Dict, ast.List, ast.Tuple, ast.Set)):
            return FOREIGN
        return None

    def _one_of(self, collection: ast.expr) -> Optional[str]:
        kind = self._type(collection) or ""
        return kind[len(LIST) :] if kind.startswith(LIST) else None

    def _assign_each(self, target: ast.expr, collection: ast.expr) -> None:
        self._assign(target, None)
        one = self._one_of(collection)
        if isinstance(target, ast.Name) and one is not None:
            self.types[-1][target.id] = one

    def _interface(self, node: ast.ClassDef, base: Optional[str], here: Versions) -> None:
        """TensorRT calls what an interface declares, so a class of odtrt's must not misspell it."""
        if base in INTERFACES:
            defined = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            for name in self.inventory.members[base]:
                if name.islower() and name not in defined:
                    key = (node.lineno, node.col_offset, node.name, name)
                    self.found[key] = Use(self.file, node.lineno, node.name, name, here, False)

    def _type_of_attribute(self, owner: Optional[str], name: str) -> Optional[str]:
        if owner == FOREIGN:
            return FOREIGN
        if owner in (None, OURS):
            is_known = any(name in self.inventory.members.get(one, {}) for one in KNOWN_CLASSES)
            made = self._attributes.get(name, self.receivers.get(name.lstrip("_")))
            return made or (None if is_known else OURS)
        path = name if owner == MODULE else f"{owner}.{name}"
        return path if path in self.inventory.members else None

    def _assign(self, target: ast.expr, value: Optional[ast.expr]) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [None] * len(target.elts)
            for part, part_value in zip(target.elts, values, strict=False):
                self._assign(part, part_value)
            return
        if isinstance(target, ast.Name):
            kind = self._type(value) if value is not None else None
            if kind is None:
                self.types[-1].pop(target.id, None)
            else:
                self.types[-1][target.id] = kind
        if isinstance(target, ast.Attribute) and value is not None:
            kind = self._type(value)
            if kind is not None:
                self.attributes.setdefault(target.attr, kind)
        scope = ".".join(self.scopes) if isinstance(target, ast.Name) else FIELD
        truth = self._truth(value) if value is not None else (self.everywhere, self.everywhere)
        self._learn((scope, _last_name(target)), truth)

    def _learn(self, key: tuple[str, str], truth: _Truth) -> None:
        true, false = self.facts.get(key, (frozenset(), frozenset()))
        self.facts[key] = (true | truth[0], false | truth[1])

    def _truth(self, node: ast.expr) -> _Truth:
        either = (self.everywhere, self.everywhere)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            true, false = self._truth(node.operand)
            return false, true
        if isinstance(node, ast.BoolOp):
            truths = [self._truth(value) for value in node.values]
            if isinstance(node.op, ast.And):
                return frozenset.intersection(*(t for t, _ in truths)), frozenset().union(
                    *(f for _, f in truths)
                )
            return frozenset().union(*(t for t, _ in truths)), frozenset.intersection(*(f for _, f in truths))
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return self._truth_of_comparison(node.left, node.ops[0], node.comparators[0])
        probe = _probe(node)
        if probe is not None:
            receiver, name, _ = probe
            owner = self._type(receiver)
            if owner == FOREIGN:
                return either
            have = self.inventory.of(owner, name)
            if not have:
                return either
            return have, self.everywhere - have
        if isinstance(node, ast.Call):
            if _last_name(node.func) == "bool" and len(node.args) == 1:
                return self._truth(node.args[0])
            return (
                self._facts.get((ANSWER, node.func.id), either) if isinstance(node.func, ast.Name) else either
            )
        if isinstance(node, ast.Name):
            for depth in range(len(self.scopes), 0, -1):
                known = self._facts.get((".".join(self.scopes[:depth]), node.id))
                if known is not None:
                    return known
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            return self._facts.get((FIELD, _last_name(node)), either)
        return either

    def _truth_of_comparison(self, left: ast.expr, how: ast.cmpop, right: ast.expr) -> _Truth:
        either = (self.everywhere, self.everywhere)
        if isinstance(how, ast.In):
            member = _member(left, right)
            have = self.inventory.of(self._type(member[0]), member[1]) if member else frozenset()
            return (have, self.everywhere - have) if have else either
        if isinstance(right, ast.Constant) and right.value is None and isinstance(how, (ast.Is, ast.IsNot)):
            true, false = self._truth(left)
            return (false, true) if isinstance(how, ast.Is) else (true, false)
        if isinstance(right, ast.Constant) and right.value in RUNTIME_LIBRARIES:
            same = frozenset(version for version in self.everywhere if version[0] == right.value)
            if isinstance(how, ast.Eq):
                return same, self.everywhere - same
            if isinstance(how, ast.NotEq):
                return self.everywhere - same, same
        return either


def _probe(node: ast.AST) -> Optional[tuple[ast.expr, str, bool]]:
    """The object, the name, and whether its absence is provided for, where ``node`` asks for a name."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr")
        and len(node.args) >= 2
        and isinstance(node.args[1], ast.Constant)
    ):
        has_default = node.func.id == "hasattr" or len(node.args) == 3
        return node.args[0], str(node.args[1].value), has_default
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.In):
        member = _member(node.left, node.comparators[0])
        return (*member, True) if member else None
    return None


def _member(name: ast.expr, collection: ast.expr) -> Optional[tuple[ast.expr, str]]:
    """The enumeration and the name in ``"FP16" in trt.BuilderFlag.__members__``."""
    if isinstance(name, ast.Constant) and _last_name(collection) == "__members__":
        return collection.value, str(name.value)
    return None


def _catches_attribute_error(caught: Optional[ast.AST]) -> bool:
    return caught is not None and any(
        isinstance(part, ast.Name) and part.id == "AttributeError" for part in ast.walk(caught)
    )


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return ""


def _in_words(versions: Sequence[Version]) -> str:
    lists = {
        runtime_library: [v for f, v in versions if f == runtime_library]
        for runtime_library in RUNTIME_LIBRARIES
    }
    return " and ".join(
        f"{runtime_library} {listed[0]}"
        + (f" to {listed[-1]} ({len(listed)} versions)" if len(listed) > 1 else "")
        for runtime_library, listed in lists.items()
        if listed
    )


def _run(command: Sequence[str], environment: Optional[Mapping[str, str]] = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:4])} ...: {done.stderr.strip()[-500:]}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("all", "check"), default="all")
    parser.add_argument("--wheels", type=Path, help="a folder to keep the downloaded wheels in")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "all" and not _inspect_all(options.wheels, options.output):
        return 1
    inventory = read_inventory(options.output)
    problems = []
    for name, text in sources():
        problems += violations(uses_in(text, name, inventory), inventory)
    print("\n".join(problems) or "every name that odtrt uses exists where it is used")
    return bool(problems)


def _inspect_all(wheels: Optional[Path], output: Path) -> bool:
    pythons = interpreters()
    names: dict[Version, dict[str, list[str]]] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = wheels or Path(temporary)
        for runtime_library, distribution, version in WHEELS:
            found = download(distribution, version, pythons, folder)
            if found is None:
                print(
                    f"{distribution} {version}: no wheel for any of {', '.join(pythons)}; nothing is written"
                )
                return False
            wheel, python, tags = found
            listed = list_names(wheel, python)
            names[runtime_library, version] = listed["names"]
            rows.append(
                {
                    "runtime_library": runtime_library,
                    "version": version,
                    "distribution": distribution,
                    "imported_by_python": _run([python, "-V"]).split()[1],
                    "wheels_x86_64": " ".join(tags),
                    "wheel_mb": round(wheel.stat().st_size / 1e6, 2),
                    "classes": len(listed["names"]) - 1,
                    "names": sum(map(len, listed["names"].values())),
                }
            )
            print(*rows[-1].values())
    rows += inventory_rows(names)
    rows += source_rows(inventory_from(rows))
    write_results(output, "tensorrt_names", COMMAND, rows)
    return True


if __name__ == "__main__":
    sys.exit(main())
