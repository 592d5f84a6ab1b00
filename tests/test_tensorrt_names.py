"""Every name of TensorRT's that odtrt uses exists in every version that can come to where it is used."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import tensorrt_names as names

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "tensorrt_names.py"


@pytest.fixture(scope="module")
def inventory():
    return names.read_inventory()


def _versions(inventory, owner, name, runtime_library="tensorrt"):
    order = [version for version in inventory.versions if version[0] == runtime_library]
    have = [version for kind, version in order if (kind, version) in inventory.of(owner, name)]
    return (have[0], have[-1]) if have else None


def _violations(inventory, snippet):
    text = "import importlib\n" + textwrap.dedent(snippet)
    return names.violations(names.uses_in(text, "snippet.py", inventory), inventory)


def test_every_name_that_odtrt_uses_exists_where_it_is_used(inventory):
    uses = []
    for file, text in names.sources():
        uses += names.uses_in(text, file, inventory)
    found = names.violations(uses, inventory)
    assert not found, "\n".join(found)
    # The scan is not blind: it sees what a file that builds or runs a plan cannot do without.
    seen = {(use.owner, use.name) for use in uses}
    assert seen >= {
        *(("(module)", "OnnxParser"), ("Builder", "build_serialized_network"), ("BuilderFlag", "TF32")),
        *(("ICudaEngine", "get_tensor_name"), ("IExecutionContext", "execute_async_v3")),
    }


def test_odtrt_without_its_questions_is_caught(inventory):
    """odtrt's own sources with every ``hasattr(...)`` answered by yes: what they ask for is missed."""

    class SayYes(ast.NodeTransformer):
        def visit_Call(self, node):
            is_question = isinstance(node.func, ast.Name) and node.func.id == "hasattr"
            return ast.Constant(True) if is_question else self.generic_visit(node)

    found = ""
    for file, text in names.sources():
        blind = ast.unparse(SayYes().visit(ast.parse(text)))
        found += "\n".join(names.violations(names.uses_in(blind, file, inventory), inventory))
    for name in ("progress_monitor", "get_creator", "load_library", "STRONGLY_TYPED", "node_operator"):
        assert re.search(rf"\.{name}: .*not in tensorrt 8\.5\.2\.2", found), name
    assert re.search(r"\.create_runtime_cache: .*not in tensorrt 10\.11\.0\.33", found)


def test_covers_the_versions_that_odtrt_claims(inventory):
    tensorrt = [version for runtime_library, version in inventory.versions if runtime_library == "tensorrt"]
    minors = {tuple(map(int, version.split(".")[:2])) for version in tensorrt}
    assert minors == {(8, 5), (8, 6), *((10, n) for n in range(17)), *((11, n) for n in range(5))}
    rtx = [version for runtime_library, version in inventory.versions if runtime_library == "tensorrt_rtx"]
    assert [version[:3] for version in rtx] == ["1.4", "1.5", "1.6", "1.7"]


@pytest.mark.parametrize(
    ("owner", "name", "since", "until"),
    [  # as NVIDIA's release notes and migration guides say
        ("(module)", "IProgressMonitor", "10.0.1", "11.4.0.106"),
        ("BuilderFlag", "FP16", "8.5.2.2", "10.16.1.11"),
        ("BuilderFlag", "VERSION_COMPATIBLE", "8.6.1", "11.4.0.106"),
        ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH", "8.5.2.2", "10.16.1.11"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED", "10.0.1", "11.4.0.106"),
        ("IBuilderConfig", "max_workspace_size", "8.5.2.2", "8.6.1"),
        ("IExecutionContext", "execute_async_v2", "8.5.2.2", "8.6.1"),
        ("IExecutionContext", "execute_async_v3", "8.5.2.2", "11.4.0.106"),
        ("IPluginRegistry", "load_library", "8.6.1", "11.4.0.106"),
    ],
)
def test_inventory_agrees_with_the_release_notes(inventory, owner, name, since, until):
    assert _versions(inventory, owner, name) == (since, until)


def test_inventory_agrees_with_the_real_library_that_is_installed(inventory):
    """The bindings over stub libraries show what the same bindings over NVIDIA's libraries show."""
    program = """if True:
        import json, tensorrt_rtx
        found = {name: [part for part in dir(value) if not part.startswith("_")]
                 for name, value in vars(tensorrt_rtx).items() if isinstance(value, type)}
        print(json.dumps([tensorrt_rtx.__version__, found]))
    """
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if answer.returncode != 0:
        pytest.skip("TensorRT-RTX is not installed")
    version, found = json.loads(answer.stdout.splitlines()[-1])
    if ("tensorrt_rtx", version) not in inventory.versions:
        pytest.skip(f"TensorRT-RTX {version} is not in the inventory")
    compared = 0
    for owner, members in found.items():
        if owner in inventory.members:
            listed = {n for n, have in inventory.members[owner].items() if ("tensorrt_rtx", version) in have}
            assert listed == set(members), owner
            compared += 1
    assert compared > 150


@pytest.mark.parametrize(
    ("snippet", "message"),
    [
        ("def f(config, monitor):\n    config.progress_monitor = monitor", "tensorrt 8.5.2.2 to 8.6.1"),
        ("def f(trt):\n    return trt.BuilderFlag.FP16", "not in tensorrt 11.0.0.114 to 11.4.0.106"),
        (
            "def f(context, stream):\n    context.execute_async_v2([], stream)",
            "tensorrt 10.0.1 to 11.4.0.106",
        ),
        ("def f(trt):\n    return trt.BuilderFlag.FP61", "no version"),
        ("def f(trt):\n    return hasattr(trt, 'IProgresMonitor')", "no version"),
        ("def f(trt, builder):\n    builder.create_bilder_config()", "no version"),
        ("def f(trt):\n    return getattr(trt.BuilderFlag, 'FP16')", "not in tensorrt 11.0"),
        ("def f(trt):\n    class Monitor(trt.IProgressMonitor):\n        pass", "tensorrt 8.5.2.2 to 8.6.1"),
        (  # the wrong question: progress_monitor is older than tiling
            """
            def f(trt, config):
                if hasattr(config, "progress_monitor"):
                    config.tiling_optimization_level = trt.TilingOptimizationLevel.FAST
            """,
            "not in tensorrt 10.0.1 to 10.7.0",
        ),
        (  # the branches are exchanged
            """
            def f(trt, config):
                if not hasattr(trt.BuilderFlag, "FP16"):
                    config.set_flag(trt.BuilderFlag.FP16)
            """,
            "not in tensorrt 11.0",
        ),
        (  # the library answers with another exception than AttributeError
            """
            def f(trt, config):
                try:
                    config.set_flag(trt.BuilderFlag.FP16)
                except RuntimeError:
                    pass
            """,
            "not in tensorrt 11.0",
        ),
        (  # a private function that is safe from one of its two callers
            """
            def f(trt, config):
                if hasattr(config, "progress_monitor"):
                    _watch(trt, config)
                _watch(trt, config)

            def _watch(trt, config):
                config.progress_monitor = None
            """,
            "tensorrt 8.5.2.2 to 8.6.1",
        ),
        (  # only TensorRT-RTX has it, and the test is the wrong way round
            """
            def f(runtime_library, trt):
                if runtime_library != "tensorrt_rtx":
                    return trt.ComputeCapability
            """,
            "ComputeCapability",
        ),
        (  # what makes an object says which class it is of
            """
            def f():
                trt = importlib.import_module("tensorrt")
                settings = trt.Builder(None).create_builder_config()
                settings.max_workspace_size = 1
            """,
            "IBuilderConfig.max_workspace_size",
        ),
        (  # a flag that has nothing to do with the version
            """
            def f(trt, config):
                wants_half = True
                if wants_half:
                    config.set_flag(trt.BuilderFlag.FP16)
                g(trt, config, half=False)

            def g(trt, config, half):
                if half:
                    config.set_flag(trt.BuilderFlag.INT8)
            """,
            "BuilderFlag.INT8",
        ),
        (  # what a loop goes through
            """
            def f(trt, network):
                layers = [network.get_layer(i) for i in range(network.num_layers)]
                return [layer.precision for layer in layers], layers[0].name
            """,
            "ILayer.precision: ",
        ),
        (  # TensorRT would never call it
            """
            def f(trt):
                class Recorder(trt.IErrorRecorder):
                    def clear(self): pass
                    def get_error_code(self, index): pass
                    def get_error_desc(self, index): pass
                    def has_overflown(self): pass
                    def num_errors(self): pass
                    def report_error(self, code, message): pass
            """,
            "Recorder.has_overflowed: not defined, and TensorRT calls it",
        ),
        (  # an object that only its attribute tells
            """
            def f(trt, thing):
                return thing.num_bindings
            """,
            "(any class).num_bindings",
        ),
    ],
)
def test_a_name_that_some_version_lacks_is_caught(inventory, snippet, message):
    found = _violations(inventory, snippet)
    assert found and all(line.startswith("snippet.py:") for line in found)
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    "snippet",
    [
        """
        def f(trt, config):
            if hasattr(trt.BuilderFlag, "FP16"):
                config.set_flag(trt.BuilderFlag.FP16)
        """,
        """
        def f(trt, config):
            if not hasattr(trt.BuilderFlag, "FP16"):
                raise ValueError
            config.set_flag(trt.BuilderFlag.FP16)
        """,
        """
        def f(trt, config):
            flag = getattr(trt.BuilderFlag, "FP16", None)
            if flag is not None:
                config.set_flag(trt.BuilderFlag.FP16)
        """,
        """
        def f(trt, config):
            has_monitor = hasattr(config, "progress_monitor")
            if has_monitor and f:
                class Monitor(trt.IProgressMonitor):
                    def phase_start(self, phase_name, parent_phase, num_steps): pass
                    def step_complete(self, phase_name, step): return True
                    def phase_finish(self, phase_name): pass
                config.progress_monitor = Monitor()
        """,
        """
        def f(trt, config):
            if hasattr(config, "progress_monitor"):
                _watch(trt, config)

        def _watch(trt, config):
            config.progress_monitor = None
        """,
        """
        def can_watch(config):
            return hasattr(config, "progress_monitor")

        def f(config, trt):
            return config.progress_monitor if can_watch(config) else None
        """,
        """
        def f(trt, config):
            try:
                config.set_flag(trt.BuilderFlag.FP16)
            except AttributeError:
                pass
        """,
        """
        def f(runtime_library, trt):
            if runtime_library == "tensorrt_rtx":
                return trt.ComputeCapability
        """,
        """
        def f(trt, config):
            if "FP16" in trt.BuilderFlag.__members__:
                config.set_flag(trt.BuilderFlag.FP16)
        """,
        """
        def f(trt, config):
            can = dict(watch=hasattr(config, "progress_monitor"))
            if can["watch"]:
                config.progress_monitor = None
        """,
        # not TensorRT's, whatever they are called
        "import argparse\ndef f(trt):\n    parser = argparse.ArgumentParser()\n    parser.add_argument('x')",
        "from polygraphy import config\ndef f(trt):\n    config.USE_TENSORRT_RTX = True",
        "def f(trt, folder):\n    return folder.glob('*'), {}.update(a=1)",
    ],
)
def test_a_name_that_is_asked_for_first_passes(inventory, snippet):
    assert _violations(inventory, snippet) == []


def test_names_that_come_and_go_are_kept_exactly():
    listed = {
        ("tensorrt", "8.5"): {"(module)": ["Builder"], "Builder": ["build", "old"]},
        ("tensorrt", "10.0"): {"(module)": ["Builder", "Monitor"], "Builder": ["build"], "Monitor": ["step"]},
        ("tensorrt", "11.0"): {"(module)": ["Builder"], "Builder": ["build", "old"]},
        ("tensorrt_rtx", "1.4"): {"(module)": ["Builder"], "Builder": ["fast"]},
    }
    rows = [{"runtime_library": runtime_library, "version": version} for runtime_library, version in listed]
    again = names.inventory_from(rows + names.inventory_rows(listed))
    for version, classes in listed.items():
        found = {
            owner: sorted(name for name, have in members.items() if version in have)
            for owner, members in again.members.items()
        }
        assert {owner: members for owner, members in found.items() if members} == classes


@pytest.mark.skipif(not shutil.which("gcc") or not shutil.which("nm"), reason="gcc is not installed")
def test_bindings_are_imported_over_stub_libraries(tmp_path):
    """A made-up wheel whose library asks for a TensorRT that is nowhere on this machine."""
    (tmp_path / "asks.c").write_text(
        "void *createInferBuilder_INTERNAL(void);\n"
        "void *ask(void) { return createInferBuilder_INTERNAL(); }\n"
    )
    (tmp_path / "answers.c").write_text("void *createInferBuilder_INTERNAL(void) { return 0; }\n")
    library, binding = tmp_path / "libnvinfer.so.99", tmp_path / "tensorrt.so"
    shared = ["gcc", "-shared", "-fPIC"]
    subprocess.run(
        [*shared, str(tmp_path / "answers.c"), "-Wl,-soname,libnvinfer.so.99", "-o", str(library)], check=True
    )
    subprocess.run([*shared, str(tmp_path / "asks.c"), str(library), "-o", str(binding)], check=True)
    library.unlink()
    package = """if True:
        import ctypes, os
        ctypes.CDLL(os.path.join(os.path.dirname(__file__), "tensorrt.so"), os.RTLD_NOW).ask()
        __version__ = "99.0"
        class Builder:
            class Kind:
                SMALL = 1
            def build(self): pass
    """
    wheel = tmp_path / "tensorrt_bindings-99.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(binding, "tensorrt_bindings/tensorrt.so")
        archive.writestr("tensorrt_bindings/__init__.py", package)
    assert names.list_names(wheel, sys.executable) == {
        "version": "99.0",
        "names": {"(module)": ["Builder"], "Builder": ["Kind", "build"], "Builder.Kind": ["SMALL"]},
    }
