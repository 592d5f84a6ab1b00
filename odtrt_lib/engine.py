"""Chapter 3: ``heads.onnx`` -> a TensorRT plan, ``plans/<fingerprint>.plan`` with a ``.json`` beside it.

With the plugin (``plugins/tensorrt``) ``detector.onnx`` is built, the post-processing inside the plan.

A plan belongs to one TensorRT version, one precision and one set of GPU architectures; all of them are
in its fingerprint, so plans for several targets lie side by side and none is ever taken for another.

The network is strongly typed: TensorRT computes in the types that the ONNX model carries and adds none
of its own. Half precision is therefore made in the ONNX (:func:`half_precision`), not asked of the
builder; TensorRT 11 and TensorRT-RTX have no builder flag for it any more.

Polygraphy makes network, configuration and plan, because it knows what each TensorRT release calls
them. Its parser front only prints a refusal's reasons, so the parser is called directly.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import resource
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import numpy as np

from odtrt_lib import fuse
from odtrt_lib.errors import (
    BuildError,
    CheckError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
    one_line,
)
from odtrt_lib.folder import StageResult, read_log, require, sha256, staging, write_record
from odtrt_lib.spec import DetectorSpec, load_spec

PRECISIONS = ("fp32", "fp16")
# Smallest, best-tuned and largest batch of a model that was exported with a dynamic batch.
DYNAMIC_BATCH = (1, 1, 8)

_FLAVOURS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_INSTALL = "run `pip install -e '.[gpu]'`"
_INSTALL_TENSORRT = (
    f"{_INSTALL} on a PC (TensorRT-RTX; no GPU is needed to build); on a Jetson TensorRT comes with "
    "JetPack: `sudo apt install nvidia-jetpack`"
)
# The architectures that TensorRT picks unasked: this machine's GPU, or those that an ahead-of-time
# build of TensorRT-RTX covers.
_COMPUTE_CAPABILITIES = ("default",)


def available_runtimes() -> List[Tuple[str, str]]:
    """The TensorRT flavours that can be imported here, as (module, version), the preferred one first.

    ``tensorrt`` is the full library, ``tensorrt_rtx`` TensorRT-RTX, which also builds without a GPU.
    """
    modules = ((flavour, _import(flavour)) for flavour in _FLAVOURS)
    return [(flavour, module.__version__) for flavour, module in modules if module is not None]


def fingerprint(flavour: str, version: str, precision: str, onnx_sha256: str) -> str:
    """The name of a plan: 16 hexadecimal digits of the SHA-256 over all that a plan depends on."""
    identity = json.dumps([flavour, version, precision, onnx_sha256, list(_COMPUTE_CAPABILITIES)])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def build(
    folder: Union[str, Path],
    *,
    precision: str = "fp32",
    plugin: Union[str, Path, None] = None,
    force: bool = False,
) -> StageResult:
    """Writes ``plans/<fingerprint>.plan`` and ``.json`` for the TensorRT that is installed here.

    precision: ``fp32``, or ``fp16``: weights and arithmetic in half precision, inputs and outputs float32.
    plugin: ``libodtrt_tensorrt.so``; with it ``detector.onnx`` is built, not ``heads.onnx``. Whoever loads
    the plan loads the plugin first.

    Inputs and outputs of the network are compared with ``spec.json``. The plan is not loaded: that
    needs a GPU, a build with TensorRT-RTX does not.

    Raises InputError where a file is absent or not ONNX, MissingDependencyError where TensorRT or Polygraphy
    is absent, UnsupportedError for a TensorRT without strongly typed networks (before 10) or weights that do
    not fit into half precision, BuildError, naming the node, where TensorRT refuses the model or the plugin,
    CheckError where the network is not the one that ``spec.json`` describes.
    """
    started = time.perf_counter()
    folder = Path(folder)
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if plugin is None:
        model_file = require(folder, "heads.onnx", "convert")
    else:
        if not Path(plugin).is_file():
            raise InputError(f"{plugin}: not found; run `make plugin` where TensorRT's headers are installed")
        model_file = require(folder, "detector.onnx", "fuse")
        fuse.let_rtx_find_itself()
    spec = load_spec(require(folder, "spec.json", "export"))
    flavour, version = _preferred_runtime()
    onnx_sha256 = sha256(model_file)
    name = fingerprint(flavour, version, precision, onnx_sha256)
    record = None if force else _finished(folder, name)
    if record is not None:
        return StageResult(record, True)

    plan, details = _build_plan(flavour, version, model_file, precision, spec, plugin)
    seconds = time.perf_counter() - started
    identity = {
        "model": model_file.name,
        "flavour": flavour,
        "version": version,
        "precision": precision,
        "compute_capabilities": list(_COMPUTE_CAPABILITIES),
    }
    with staging(folder) as out:
        (out / "plans").mkdir()
        (out / "plans" / f"{name}.plan").write_bytes(plan)
        description = {
            "schema": 1,
            "fingerprint": name,
            **identity,
            "onnx_sha256": onnx_sha256,
            "plan_sha256": hashlib.sha256(plan).hexdigest(),
            "bytes": len(plan),
            "seconds": round(seconds, 3),
            **details,
        }
        (out / "plans" / f"{name}.json").write_text(json.dumps(description, indent=2) + "\n")
    record = write_record(
        folder,
        "engine",
        inputs={model_file.name: onnx_sha256},
        settings={**identity, **details["builder"]},
        outputs=[f"plans/{name}.plan", f"plans/{name}.json"],
        versions={flavour: version},
        seconds=time.perf_counter() - started,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        checks={
            "inputs_and_outputs_match_spec": True,
            "layers": details["layers"],
            "half_precision_weights": details["weights"].get("FLOAT16", 0),
            "single_precision_weights": details["weights"].get("FLOAT", 0),
            "loaded_on_a_gpu": None,
        },
    )
    return StageResult(record, False)


def half_precision(model: Any) -> Any:
    """The ONNX model with float16 weights and arithmetic; its inputs and outputs stay float32.

    model: an ``onnx.ModelProto``; it is changed in place. Operators that onnxconverter-common holds
    unsafe in half precision (Resize, TopK, ...) stay float32 between casts.

    Raises UnsupportedError where a weight exceeds 65504, the largest half number (it would be clipped
    silently otherwise), MissingDependencyError without onnxconverter-common, and BuildError where
    ``onnx.checker`` refuses the outcome.
    """
    try:
        import onnx
        from onnx import numpy_helper
        from onnxconverter_common.float16 import convert_float_to_float16
    except ImportError as error:
        raise MissingDependencyError(
            f"half precision needs onnx and onnxconverter-common ({error}): {_INSTALL}"
        ) from error
    limit = float(np.finfo(np.float16).max)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
            if not largest <= limit:
                raise UnsupportedError(
                    f"weight `{tensor.name}` reaches {largest:g}, beyond half precision's {limit:g}; "
                    "build with fp32"
                )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the float32 number .* will be truncated")
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            min_positive_val=2.0**-24,
            max_finite_val=limit,
        )
    try:
        onnx.checker.check_model(half, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(f"the half-precision model is not valid ONNX ({one_line(error)})") from error
    return half


def _import(flavour: str) -> Optional[ModuleType]:
    if flavour == "tensorrt_rtx" and flavour not in sys.modules:
        with contextlib.suppress(OSError):
            fuse.let_rtx_find_itself()
    try:
        return importlib.import_module(flavour)
    except (ImportError, OSError):
        return None


def _preferred_runtime() -> Tuple[str, str]:
    found = available_runtimes()
    if not found:
        raise MissingDependencyError(
            f"no TensorRT can be imported (looked for {' and '.join(_FLAVOURS)}): {_INSTALL_TENSORRT}"
        )
    return found[0]


def _finished(folder: Path, name: str) -> Optional[Dict[str, Any]]:
    """The newest record of the plan ``name`` if its files are intact. A folder can hold several plans."""
    plan = f"plans/{name}.plan"
    for record in reversed(read_log(folder)):
        if record["stage"] == "engine" and plan in record["outputs"]:
            is_intact = all(
                (folder / output).is_file() and sha256(folder / output) == digest
                for output, digest in record["outputs"].items()
            )
            return record if is_intact else None
    return None


def _build_plan(
    flavour: str,
    version: str,
    model_file: Path,
    precision: str,
    spec: DetectorSpec,
    plugin: Union[str, Path, None],
) -> Tuple[bytes, Dict[str, Any]]:
    """The plan, and what the ``.json`` beside it says about its making."""
    model, weights = _typed_model(model_file, precision)
    trt = importlib.import_module(flavour)
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        raise UnsupportedError(f"tensorrt {version} has no strongly typed networks; expected 10 or newer")
    who = f"{_FLAVOURS[flavour]} {version}"
    with _quiet_polygraphy(flavour):
        from polygraphy.backend.trt import Profile, create_network, engine_bytes_from_network
        from polygraphy.exception import PolygraphyException

        if flavour == "tensorrt_rtx":
            from polygraphy.backend.tensorrt_rtx import create_config_rtx as create_config
        else:
            from polygraphy.backend.trt import create_config

        builder, network = create_network(strongly_typed=True)
        refusals = _refusals(flavour)
        refusals.clear()
        builder.error_recorder = refusals
        if plugin is not None:
            _load_plugin(builder.get_plugin_registry(), plugin, who, refusals)
        parser = trt.OnnxParser(network, builder.logger)
        if not parser.parse(model):
            raise BuildError(f"{model_file}: {who} refuses {_parser_error(parser)}")
        _check_network(trt, network, model_file, spec, is_detector=plugin is not None)
        profile = Profile()
        batches = DYNAMIC_BATCH if spec.input.batch is None else (spec.input.batch,) * 3
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            profile.add(tensor.name, *((batch, *tuple(tensor.shape)[1:]) for batch in batches))
        config = create_config(builder, network, profiles=[profile])
        try:
            plan = engine_bytes_from_network((builder, network), config=config)
        except PolygraphyException as error:
            reasons = "; ".join(refusals.messages) or one_line(error)
            raise BuildError(
                f"{model_file}: {who} parsed the model but cannot build it: {one_line(reasons)}"
            ) from error
        return bytes(plan), {
            "layers": network.num_layers,
            "weights": weights,
            "builder": {
                "strongly_typed": True,
                "tf32": bool(config.get_flag(trt.BuilderFlag.TF32)),
                "optimization_level": config.builder_optimization_level,
                "batch_min_opt_max": list(batches),
            },
        }


def _typed_model(model_file: Path, precision: str) -> Tuple[bytes, Dict[str, int]]:
    """The serialized model in ``precision``, and how many weights it has of each ONNX type."""
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(f"onnx cannot be imported ({error}): {_INSTALL}") from error
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(model_file))
    except DecodeError as error:
        raise InputError(f"{model_file}: not an ONNX model; run `odtrt convert` again") from error
    if precision == "fp16":
        try:
            has_plugin = any(node.op_type == fuse.PLUGIN for node in model.graph.node)
            model = fuse.half_precision(model) if has_plugin else half_precision(model)
        except (UnsupportedError, BuildError) as error:
            raise type(error)(f"{model_file}: {error}") from error
    weights: Dict[str, int] = {}
    for tensor in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        weights[kind] = weights.get(kind, 0) + int(np.prod(tensor.dims))
    return model.SerializeToString(), weights


@contextlib.contextmanager
def _quiet_polygraphy(flavour: str) -> Iterator[None]:
    """Points Polygraphy at ``flavour`` and keeps it from printing; our errors carry the reasons."""
    try:
        from polygraphy import config
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingDependencyError(f"Polygraphy cannot be imported ({error}): {_INSTALL}") from error
    config.USE_TENSORRT_RTX = flavour == "tensorrt_rtx"
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


@functools.lru_cache(maxsize=None)
def _refusals(flavour: str) -> Any:
    """An error recorder: TensorRT tells a builder's recorder, but not its caller, why a build failed.

    One for the whole process, because TensorRT still uses it while it takes builder and network down,
    and crashes if Python has freed it by then.
    """
    trt: Any = importlib.import_module(flavour)

    class Refusals(trt.IErrorRecorder):
        def __init__(self) -> None:
            super().__init__()
            self.errors: List[Tuple[Any, str]] = []

        @property
        def messages(self) -> List[str]:
            return [message for _, message in self.errors]

        def report_error(self, code: Any, message: str) -> bool:
            self.errors.append((code, message))
            return True

        def num_errors(self) -> int:
            return len(self.errors)

        def get_error_code(self, index: int) -> Any:
            return self.errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self.errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.errors.clear()

    return Refusals()


def _parser_error(parser: Any) -> str:
    """What the ONNX parser objects to: the node with its operator, and NVIDIA's reason."""
    if parser.num_errors == 0:
        return "it, and gives no reason"
    error = parser.get_error(0)
    node = f"node {error.node()} `{error.node_name()}` (op {error.node_operator()})"
    return f"{node if error.node() >= 0 else 'it'}: {one_line(error.desc())}"


def _load_plugin(registry: Any, plugin: Union[str, Path], who: str, refusals: Any) -> None:
    """Loads the plugin unless this process has it already: a registry refuses a library that it has."""
    key = (fuse.PLUGIN, fuse.PLUGIN_VERSION, fuse.DOMAIN)
    if registry.get_creator(*key) is None:
        registry.load_library(str(Path(plugin).resolve()))
    if registry.get_creator(*key) is None:
        reasons = "; ".join(refusals.messages) or "it gives no reason"
        raise BuildError(
            f"{plugin}: {who} cannot load the plugin ({one_line(reasons)}); compile it with the headers of "
            "TensorRT 10 or newer: `make plugin`"
        )


def _check_network(
    trt: Any, network: Any, model_file: Path, spec: DetectorSpec, *, is_detector: bool
) -> None:
    batch = -1 if spec.input.batch is None else spec.input.batch
    heads, most = spec.heads, spec.nms.max_total_detections
    expected: Dict[str, Tuple[int, ...]] = {spec.input.name: (batch, 3, spec.input.height, spec.input.width)}
    if is_detector:
        if fuse.has_clip_windows(spec):
            expected[fuse.CLIP_WINDOWS] = (batch, 4)
        expected["num_detections"], expected["boxes"] = (batch,), (batch, most, 4)
        expected["scores"] = expected["classes"] = (batch, most)
    else:
        expected[heads.box_encodings] = (batch, heads.num_anchors, 4)
        expected[heads.class_logits] = (batch, heads.num_anchors, heads.num_columns)
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    found = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    again = f"run `odtrt {'fuse' if is_detector else 'convert'}` again"
    if found != expected:
        raise CheckError(
            f"{model_file}: inputs and outputs {found}, but spec.json describes {expected}; {again}"
        )
    for tensor in tensors:
        is_whole = is_detector and tensor.name in fuse.INTEGER_OUTPUTS
        if tensor.dtype != (trt.int32 if is_whole else trt.float32):
            raise CheckError(
                f"{model_file}: `{tensor.name}` is {tensor.dtype}, expected "
                f"{'int32' if is_whole else 'float32'}; {again}"
            )
