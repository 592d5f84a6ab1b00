"""One attempt to build a plan, in its own process: ``python -m odtrt_lib.engine.builder REQUEST.json``.

This is the only module that uses a TensorRT builder. :mod:`odtrt_lib.engine.watch` starts and watches the
process, and :mod:`odtrt_lib.engine.fallback` decides what is tried next. The process writes the plan and
``ANSWER.json`` into the request's folder. It writes its progress, a line of JSON for each step, into the pipe
whose descriptor the request names.

It works with TensorRT 8.5, 8.6, 10, 11 and TensorRT-RTX. ``hasattr`` tells what a library can do; version
numbers are never compared. It does not import onnx: TensorRT reads the file itself, and onnx would hold a
second and a third copy of the weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import json
import mmap
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from odtrt_lib import errors
from odtrt_lib.engine.bindings import error_recorder, let_rtx_find_itself, load_plugin, trt_messages
from odtrt_lib.errors import (
    BuildError,
    CheckError,
    CudaError,
    InputError,
    MissingDependencyError,
    OdtrtError,
    UnsupportedError,
    one_line,
)
from odtrt_lib.folder import atomic_write, cannot_write, exclusive
from odtrt_lib.machine import MIB, peak_rss_mb

ANSWER = "ANSWER.json"
PLAN = "plan"
HALF_PRECISION_MODEL = "half.onnx"
# Parts of messages, in lower case, that mean that memory ran out. "Resource temporarily unavailable" means
# that a thread could not start, because its stack did not fit.
OUT_OF_MEMORY = (
    "bad_alloc",
    "out of memory",
    "outofmemory",
    "memoryerror",
    "cannot allocate memory",
    "resource temporarily unavailable",
)
# TensorRT crashes if its objects are freed in the order in which Python frees them. So none is freed.
_KEPT: List[Any] = []


@dataclasses.dataclass(frozen=True)
class Request:
    """What one process must do. Paths are absolute; every field is a JSON value.

    task: ``build``, or ``half_precision``: write :data:`HALF_PRECISION_MODEL` from ``onnx``. onnx: the file
    that the parser reads. name: what messages call it. tensors: name -> [shape, type] of every input and
    output that the network must have, -1 for a dynamic batch. batch: smallest, best-tuned and largest size of
    a dynamic batch, or None. settings: see :func:`known_settings`. data_limit: bytes for RLIMIT_DATA, or
    None. timing_cache: its file, or None. progress: a file descriptor to write to. who: the library and its
    version, for messages.
    """

    task: str
    runtime_library: str
    who: str
    onnx: str
    name: str
    folder: str
    precision: str
    image: str
    tensors: Dict[str, Any]
    batch: Optional[List[int]]
    settings: Dict[str, Any]
    plugin: Optional[str]
    version_compatible: bool
    hardware_compatibility: str
    compute_capabilities: List[str]
    timing_cache: Optional[str]
    can_load_plans: bool
    data_limit: Optional[int]
    progress: Optional[int]
    again: str


def main(path: Union[str, Path]) -> None:
    """Does what the request at ``path`` says, and writes the outcome, or the error, to ANSWER.json."""
    _end_with_the_parent()
    request = Request(**json.loads(Path(path).read_text(encoding="utf-8")))
    if request.data_limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (request.data_limit, request.data_limit))
    try:
        answer = _half_precision(request) if request.task == "half_precision" else _build(request)
    except OdtrtError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        for name in (PLAN, HALF_PRECISION_MODEL):
            with contextlib.suppress(OSError):
                (Path(request.folder) / name).unlink()
        answer = {"error": "InputError", "message": str(cannot_write(Path(request.folder), error))}
    except MemoryError:
        answer = {"error": "MemoryError", "message": "Python: MemoryError"}
    answer["peak_rss_mb"] = peak_rss_mb("self")
    with atomic_write(Path(request.folder) / ANSWER) as temporary:
        temporary.write_text(json.dumps(answer), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skips TensorRT's clean-up, which can take long


def error_in(answer: Mapping[str, Any]) -> Optional[OdtrtError]:
    """The error in a builder's answer, as an exception to raise; None if there is none."""
    kind = getattr(errors, str(answer.get("error")), None)
    return kind(answer["message"]) if kind is not None else None


def is_weakly_typed(trt: Any) -> bool:
    """Whether a builder flag sets the precision, because this library has no strongly typed networks."""
    return not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") and hasattr(
        trt.BuilderFlag, "FP16"
    )


def is_out_of_memory(text: str) -> bool:
    """Whether a library's message means that memory ran out."""
    return any(words in text.lower() for words in OUT_OF_MEMORY)


def is_workspace_too_small(text: str, workspace_mib: Optional[int]) -> bool:
    """Whether a build under a workspace limit failed because of that limit."""
    if workspace_mib is None:
        return False
    wanted = re.search(r"requested size was (\d+)", text.lower())
    too_much = wanted is not None and int(wanted.group(1)) > workspace_mib * MIB
    return too_much or "insufficient workspace" in text.lower()


# ---- The build --------------------------------------------------------------------------------------------


def _build(request: Request) -> Dict[str, Any]:
    if request.plugin is not None and request.runtime_library == "tensorrt_rtx":
        let_rtx_find_itself()
    trt: Any = importlib.import_module(request.runtime_library)
    tell = _teller(request.progress)
    refusals: List[str] = []
    recorder = error_recorder(trt, refusals)
    logger = trt.Logger(trt.Logger.ERROR)
    try:
        builder = trt_messages(trt).make(trt.Builder)
    except CudaError as error:  # also where the GPU's memory is full: no step needs less for CUDA's context
        raise BuildError(f"{request.name}: {request.who} cannot begin: {error}") from error
    builder.error_recorder = recorder
    config = builder.create_builder_config()
    _KEPT.extend((recorder, logger, builder, config))
    tell({"knows": known_settings(config)})
    if request.plugin is not None:
        _require_plugin(trt, builder, request, refusals)

    tell({"phase": "reading the model", "fraction": 0.0})
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    _KEPT.extend((network, parser))
    if not parser.parse_from_file(request.onnx):
        reason = _parser_error(parser)
        if is_out_of_memory(reason):
            return {"error": "MemoryError", "message": f"{request.who}: {reason}"}
        raise BuildError(f"{request.name}: {request.who} refuses {reason}")
    _check_network(trt, network, request)
    in_network = _layers_of_network(network)
    cache_note, cache, cache_start = _configure(trt, builder, network, config, request)
    has_monitor = hasattr(config, "progress_monitor")
    if has_monitor:
        monitor = _monitor(trt, tell)
        _KEPT.append(monitor)
        config.progress_monitor = monitor
    else:
        tell({"phase": "building", "fraction": 0.0})
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return _refused_to_build(request, refusals)
    (Path(request.folder) / PLAN).write_bytes(plan)
    if cache is not None:
        cache_note = _store_timing_cache(config, cache, cache_start, str(request.timing_cache), cache_note)
    tell({"phase": "counting layers", "fraction": 1.0})
    return {
        "layers": network.num_layers,
        **_layers_by_precision(trt, logger, plan, request, in_network),
        "timing_cache": cache_note,
        "progress_monitor": has_monitor,
        "builder": {
            "strongly_typed": not is_weakly_typed(trt),
            "fp16_flag": is_weakly_typed(trt) and bool(config.get_flag(trt.BuilderFlag.FP16)),
            "tf32": bool(config.get_flag(trt.BuilderFlag.TF32)),
            "optimization_level": getattr(config, "builder_optimization_level", None),
        },
        "trtexec": _trtexec(trt, config, request),
    }


def _refused_to_build(request: Request, refusals: List[str]) -> Dict[str, Any]:
    """The answer that reports a lack of memory. Raises BuildError if the build failed for another reason."""
    reasons = one_line("; ".join(refusals) or "TensorRT gives no reason")
    is_small = is_workspace_too_small(reasons, request.settings.get("workspace_mib"))
    if is_out_of_memory(reasons) or is_small:
        return {"error": "MemoryError", "message": f"{request.who}: {reasons}"}
    raise BuildError(f"{request.name}: {request.who} parsed the model but cannot build it: {reasons}")


def _layers_by_precision(
    trt: Any,
    logger: Any,
    plan: Any,
    request: Request,
    in_network: Tuple[Dict[str, int], Dict[str, int]],
) -> Dict[str, Any]:
    """The answer's fields about layers, counted in the engine if it can be loaded, else in the network."""
    (counts, computing), counted_in, note = in_network, "network", "no GPU here to load the plan on"
    if request.can_load_plans:
        found, note = _layers_of_engine(trt, logger, plan, request)
        if found is not None:
            (counts, computing), counted_in = found, "engine"
    return {
        "layers_by_precision": counts,
        "computing_by_precision": computing,
        "layers_counted_in": counted_in,
        "layers_note": note,
    }


def known_settings(config: Any) -> List[str]:
    """Names of the settings that this library has to reduce a build's memory. They change nothing that the
    caller asked for."""
    known = ["frugal_heap"]
    if hasattr(config, "set_memory_pool_limit"):
        known.append("workspace_mib")
    if hasattr(config, "set_tactic_sources"):
        known.append("tactic_sources")
    if hasattr(config, "builder_optimization_level"):
        known.append("optimization_level")
    return known


def _network_flags(trt: Any) -> int:
    kinds = trt.NetworkDefinitionCreationFlag
    if hasattr(kinds, "STRONGLY_TYPED"):
        return 1 << int(kinds.STRONGLY_TYPED)
    return 1 << int(kinds.EXPLICIT_BATCH) if hasattr(kinds, "EXPLICIT_BATCH") else 0


def _configure(
    trt: Any, builder: Any, network: Any, config: Any, request: Request
) -> Tuple[str, Any, Optional[str]]:
    """Applies the request to ``config``. Returns what :func:`_read_timing_cache` returns; without a file for
    the timing cache, an empty note and None."""
    _demand_compatibility(trt, config, request)
    if is_weakly_typed(trt):
        if request.precision in ("fp16", "int8"):  # what INT8 leaves would run in FP32 otherwise
            config.set_flag(trt.BuilderFlag.FP16)
        if any(network.get_layer(i).type == trt.LayerType.QUANTIZE for i in range(network.num_layers)):
            config.set_flag(trt.BuilderFlag.INT8)
    if hasattr(config, "profiling_verbosity"):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector gives names only
    settings = request.settings
    if settings.get("workspace_mib") is not None and hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(settings["workspace_mib"]) * MIB)
    if settings.get("tactic_sources") == "none":
        config.set_tactic_sources(0)
    if settings.get("optimization_level") is not None and hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = int(settings["optimization_level"])
    if request.batch is not None:
        profile = builder.create_optimization_profile()
        for tensor in (network.get_input(i) for i in range(network.num_inputs)):
            rest = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, *((batch, *rest) for batch in request.batch))
        config.add_optimization_profile(profile)
    if request.timing_cache is None:
        return "", None, None
    return _read_timing_cache(config, Path(request.timing_cache))


def _demand_compatibility(trt: Any, config: Any, request: Request) -> None:
    if request.version_compatible:
        if request.runtime_library == "tensorrt_rtx" or not hasattr(trt.BuilderFlag, "VERSION_COMPATIBLE"):
            raise UnsupportedError(
                f"{request.who} makes no version-compatible plans; build on each version instead, "
                "without --version-compatible"
            )
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if request.plugin is not None and hasattr(config, "plugins_to_serialize"):
            config.plugins_to_serialize = [request.plugin]
    if request.hardware_compatibility != "none":
        levels = getattr(trt, "HardwareCompatibilityLevel", None)
        name = request.hardware_compatibility.upper()
        if request.runtime_library == "tensorrt_rtx" or levels is None or not hasattr(levels, name):
            instead = (
                "its plans run on several GPU architectures anyway; name them with --gpu"
                if request.runtime_library == "tensorrt_rtx"
                else "build on each GPU instead"
            )
            raise UnsupportedError(
                f"{request.who} has no hardware compatibility level {request.hardware_compatibility}; "
                + instead
            )
        config.hardware_compatibility_level = getattr(levels, name)
    if request.compute_capabilities:
        if not hasattr(config, "set_compute_capability"):
            raise UnsupportedError(
                f"{request.who} builds for the GPU of this machine only; --gpu "
                f"{', '.join(request.compute_capabilities)} is for TensorRT-RTX"
            )
        wanted = [f"SM{text.replace('.', '')}" for text in request.compute_capabilities]
        known = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
        for text, name in zip(request.compute_capabilities, wanted):
            if name not in known:
                raise UnsupportedError(
                    f"{request.who} cannot build for compute capability {text}; it knows "
                    + ", ".join(
                        f"{one[2:-1]}.{one[-1]}" for one in sorted(known, key=lambda name: int(name[2:]))
                    )
                )
        config.num_compute_capabilities = len(wanted)
        for i, name in enumerate(wanted):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)


def _parser_error(parser: Any) -> str:
    """The ONNX parser's first error in words: the node with its operator, and NVIDIA's reason."""
    if parser.num_errors == 0:
        return "it, and gives no reason"
    error = parser.get_error(0)
    where = "it"
    if error.node() >= 0:
        where = f"node {error.node()}"
        if hasattr(error, "node_name") and hasattr(error, "node_operator"):
            where += f" `{error.node_name()}` (op {error.node_operator()})"
    return f"{where}: {one_line(error.desc())}"


def _require_plugin(trt: Any, builder: Any, request: Request, refusals: List[str]) -> None:
    has_own = hasattr(builder, "get_plugin_registry")
    registry = builder.get_plugin_registry() if has_own else trt.get_plugin_registry()
    problem = "it gives no reason"
    try:
        if load_plugin(registry, Path(str(request.plugin))):
            return
    except OSError as error:
        problem = str(error)
    reasons = "; ".join(refusals) or problem
    headers = "TensorRT 10 or newer" if hasattr(registry, "get_creator") else "this TensorRT"
    raise BuildError(
        f"{request.plugin}: {request.who} cannot load the plugin ({one_line(reasons)}); compile it with the "
        f"headers of {headers}: `make plugin`, without a GPU `make plugin ARCH=all`"
    )


def _check_network(trt: Any, network: Any, request: Request) -> None:
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    found = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    expected = {name: tuple(shape) for name, (shape, _) in request.tensors.items()}
    size = found.get(request.image, ())[2:]
    if -1 in size:
        height, width = expected[request.image][2:]
        raise UnsupportedError(
            f"{request.name}: `{request.image}` has a dynamic height or width, but a model folder has one "
            f"input size, because its anchors belong to it (spec.input: {height}x{width}); {request.again}"
        )
    if found != expected:
        raise CheckError(
            f"{request.name}: inputs and outputs {found}, but spec.json describes {expected}; {request.again}"
        )
    for tensor in tensors:
        kind = request.tensors[tensor.name][1]
        if tensor.dtype != (trt.int32 if kind == "int32" else trt.float32):
            raise CheckError(
                f"{request.name}: `{tensor.name}` is {tensor.dtype}, expected {kind}; {request.again}"
            )


# ---- Progress ---------------------------------------------------------------------------------------------


def _teller(descriptor: Optional[int]) -> Callable[[Mapping[str, Any]], None]:
    def tell(message: Mapping[str, Any]) -> None:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.write(descriptor, (json.dumps(message) + "\n").encode())

    return tell


def _monitor(trt: Any, tell: Callable[[Mapping[str, Any]], None]) -> Any:
    """A progress monitor that computes the progress of the whole build from nested phases."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.phases: Dict[str, List[Any]] = {}  # name -> parent, steps, steps done
            self.told = -1

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            self.phases[phase_name] = [parent_phase, max(1, num_steps), 0]
            self.tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][2] = step + 1
                self.tell(phase_name)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def tell(self, name: str) -> None:
            fraction, inner, outer = 0.0, 1.0, name
            chain = []
            while outer in self.phases:
                chain.append(self.phases[outer])
                outer = self.phases[outer][0]
            for _, steps, done in reversed(chain):
                inner /= steps
                fraction += inner * done
            percent = min(100, int(100 * fraction))
            if percent > self.told:
                self.told = percent
                tell({"phase": name, "fraction": percent / 100})

    return Monitor()


# ---- The timing cache -------------------------------------------------------------------------------------


def read_cache_file(path: Path) -> Tuple[Optional[bytes], str]:
    """The timing cache in a file, and a note about it. A missing or damaged one is None."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, "new"
    except OSError as error:
        return None, f"new (the old one cannot be read: {error.strerror or error})"
    digest, _, blob = data.partition(b"\n")
    if hashlib.sha256(blob).hexdigest().encode() != digest:
        return None, "new (the old one is damaged and was ignored)"
    return blob, "used"


def write_cache_file(path: Path, blob: bytes) -> None:
    """Writes the SHA-256 of a timing cache, then the cache; whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(hashlib.sha256(blob).hexdigest().encode() + b"\n" + blob)


def _read_timing_cache(config: Any, path: Path) -> Tuple[str, Any, Optional[str]]:
    blob, note = read_cache_file(path)
    cache = None
    if blob is not None:
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            cache = config.create_timing_cache(blob)
        if cache is None or not config.set_timing_cache(cache, False):
            cache, note = None, "new (the old one belongs to another version or GPU and was ignored)"
    if cache is None:
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, False):
            return "none: the builder refuses even an empty one", None, None
    return note, cache, None if blob is None else hashlib.sha256(blob).hexdigest()


def _store_timing_cache(config: Any, cache: Any, start: Optional[str], file: str, note: str) -> str:
    """Adds this build's timings to the file, and keeps those that other builds added in the meantime."""
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.parent):
            blob, _ = read_cache_file(path)
            if blob is not None and hashlib.sha256(blob).hexdigest() != start:
                cache.combine(config.create_timing_cache(blob), False)
            write_cache_file(path, bytes(cache.serialize()))
    except (OSError, InputError) as error:
        return f"{note}; not stored ({one_line(error)})"
    return f"{note}, {path.stat().st_size} bytes in {path.name}"


# ---- Which precision runs ---------------------------------------------------------------------------------

_COMPUTING = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "FULLY_CONNECTED")
_PRECISIONS = {
    "float16": "fp16",
    "half": "fp16",
    "fp16": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "fp32": "fp32",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "int8": "int8",
    "fp8": "fp8",
}

Counts = Dict[str, int]


def _layers_of_network(network: Any) -> Tuple[Counts, Counts]:
    """How many layers have outputs of each precision: of all layers, and of convolutions and matrix products.

    A layer whose inputs are dequantised counts as int8, because TensorRT computes it in int8.
    """
    every: Counts = {}
    computing: Counts = {}
    dequantised = set()
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.num_outputs == 0:
            continue
        kind, output = str(layer.type).rpartition(".")[2], layer.get_output(0)
        precision = _PRECISIONS.get(str(output.dtype).rpartition(".")[2].lower(), "other")
        every[precision] = every.get(precision, 0) + 1
        if kind == "DEQUANTIZE":
            dequantised.add(output.name)
        elif kind in _COMPUTING:
            if layer.num_inputs and layer.get_input(0).name in dequantised:
                precision = "int8"
            computing[precision] = computing.get(precision, 0) + 1
    return every, computing


def _layers_of_engine(
    trt: Any, logger: Any, plan: Any, request: Request
) -> Tuple[Optional[Tuple[Counts, Counts]], str]:
    """The same counts as :func:`_layers_of_network`, from the plan, and a note. None, and the reason, if the
    plan cannot be inspected."""
    if not hasattr(trt, "EngineInspector"):
        return None, "this library has no engine inspector"
    runtime = trt.Runtime(logger)
    if request.version_compatible and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None, "the plan was not built for this machine's GPU"
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    _KEPT.extend((runtime, engine, inspector))
    every, computing = count_inspected(text)
    if not computing:
        return (
            None,
            "the inspector names no convolution or matrix product: they are fused into larger kernels",
        )
    return (every, computing), "by the engine inspector"


def count_inspected(text: str) -> Tuple[Counts, Counts]:
    """Layers by precision in an engine inspector's JSON: of all layers, and of convolutions and products.

    A layer counts by the type of its first input, which is the type in which the kernel multiplies.
    """
    every: Counts = {}
    computing: Counts = {}
    try:
        layers = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return every, computing
    for layer in layers:
        if not isinstance(layer, dict):
            continue
        tensors = layer.get("Inputs") or layer.get("Outputs") or [{}]
        words = re.findall(r"[a-z]+\d*", str(tensors[0].get("Format/Datatype", "")).lower())
        precision = next((_PRECISIONS[word] for word in words if word in _PRECISIONS), "other")
        every[precision] = every.get(precision, 0) + 1
        if re.search(r"conv|gemm|matri|einsum|fullyconnected", str(layer.get("LayerType", "")).lower()):
            computing[precision] = computing.get(precision, 0) + 1
    return every, computing


# ---- The equivalent command -------------------------------------------------------------------------------


def _trtexec(trt: Any, config: Any, request: Request) -> str:
    """The command line that makes the same build with the tool that comes with the library.

    The flags are those that NVIDIA/TensorRT, samples/common/sampleOptions.cpp, reads in 8.5, 8.6, 9.0 and
    10.0 to 11.1: ``--memPoolSize`` from 8.4; ``--plugins``, and from 8.6
    ``--staticPlugins``/``--dynamicPlugins``; ``--buildOnly``, from 8.6 ``--skipInference``; ``--fp16`` up to
    10; ``--stronglyTyped`` from 9, without effect in 11. TensorRT-RTX has the tool ``tensorrt_rtx`` instead,
    which has no precision flags. Its memory settings are not documented, so they are left out; with a plugin
    there is no line. A file called ``.fp16.onnx`` is what :func:`odtrt_lib.engine.half_precision` makes of
    the model.
    """
    is_rtx = request.runtime_library == "tensorrt_rtx"
    if is_rtx and request.plugin is not None:
        return ""
    model = Path(request.name).name
    if Path(request.onnx).name == HALF_PRECISION_MODEL:
        model = model.replace(".onnx", ".fp16.onnx")
    words = [f"--onnx={model}", "--saveEngine=model.plan"]
    if request.batch is not None:
        for word, batch in zip(("min", "opt", "max"), request.batch):
            shapes = [
                f"{name}:{'x'.join(str(batch if size == -1 else size) for size in shape)}"
                for name, (shape, _) in request.tensors.items()
                if name in (request.image, "clip_windows")
            ]
            words.append(f"--{word}Shapes={','.join(shapes)}")
    if is_rtx:
        if request.compute_capabilities:
            targets = ",".join(text.replace(".", "") for text in request.compute_capabilities)
            words.append(f"--computeCapabilities={targets}")
        return " ".join(["tensorrt_rtx", *words, "--skipInference"])
    is_newer = hasattr(trt.get_plugin_registry(), "load_library")
    if is_weakly_typed(trt):
        flags = [name for name in ("FP16", "INT8") if config.get_flag(getattr(trt.BuilderFlag, name))]
        words += [f"--{name.lower()}" for name in flags]
    elif hasattr(trt.BuilderFlag, "FP16"):
        words.append("--stronglyTyped")
    settings = request.settings
    if settings.get("workspace_mib") is not None:
        words.append(f"--memPoolSize=workspace:{settings['workspace_mib']}")
    if settings.get("tactic_sources") == "none":
        names = [name for name in dir(trt.TacticSource) if re.fullmatch(r"[A-Z][A-Z_]+", name)]
        words.append("--tacticSources=" + ",".join(f"-{name}" for name in names))
    if settings.get("optimization_level") is not None:
        words.append(f"--builderOptimizationLevel={settings['optimization_level']}")
    if request.plugin is not None:
        words.append(f"--{'dynamicPlugins' if is_newer else 'plugins'}={Path(request.plugin).name}")
    if request.version_compatible:
        words.append("--versionCompatible")
        if request.plugin is not None:
            words.append(f"--setPluginsToSerialize={Path(request.plugin).name}")
    if request.hardware_compatibility != "none":
        levels = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
        words.append(f"--hardwareCompatibilityLevel={levels[request.hardware_compatibility]}")
    return " ".join(["trtexec", *words, "--skipInference" if is_newer else "--buildOnly"])


# ---- The model --------------------------------------------------------------------------------------------


def _half_precision(request: Request) -> Dict[str, Any]:
    from odtrt_lib.engine.half import half_precision

    _teller(request.progress)({"phase": "half precision", "fraction": 0.0})
    try:
        import onnx

        half = half_precision(onnx.load(request.onnx))
    except ImportError as error:
        raise MissingDependencyError(
            f"half precision needs onnx and onnxconverter-common ({error}): run `pip install -e '.[engine]'`"
        ) from error
    except (UnsupportedError, BuildError) as error:
        raise type(error)(f"{request.name}: {error}") from error
    (Path(request.folder) / HALF_PRECISION_MODEL).write_bytes(half.SerializeToString())
    return {}


_ONNX_TYPES = {1: "FLOAT", 10: "FLOAT16", 16: "BFLOAT16", 3: "INT8", 2: "UINT8", 6: "INT32", 7: "INT64"}


def weights_by_type(path: Union[str, Path]) -> Dict[str, int]:
    """How many weights an ONNX file has of each type, e.g. ``{"FLOAT": 749960, "INT64": 12}``.

    Reads the structure of the file but no weights, so it needs neither onnx nor memory for them. Fields in
    protobuf: ModelProto.graph is 7, GraphProto.initializer 5, TensorProto.dims 1, .data_type 2 and
    .data_location 14.

    Raises InputError if the file is not an ONNX model, or if it keeps weights in another file.
    """
    path = Path(path)
    refusal = InputError(f"{path}: not an ONNX model; run `odtrt convert` again")
    counts: Dict[str, int] = {}
    if path.stat().st_size == 0:
        raise refusal
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            graphs = [value for field, value in _fields(data, (0, len(data))) if field == 7]
            if len(graphs) != 1 or not isinstance(graphs[0], tuple):
                raise refusal
            for field, tensor in _fields(data, graphs[0]):
                if field != 5 or not isinstance(tensor, tuple):
                    continue
                size, kind = 1, 0
                for number, value in _fields(data, tensor):
                    if number == 1:
                        dims = [value] if isinstance(value, int) else [d for d, _ in _varints(data, value)]
                        for dim in dims:
                            size *= dim
                    elif number == 2 and isinstance(value, int):
                        kind = value
                    elif number == 14 and value == 1:
                        raise InputError(
                            f"{path}: its weights lie in other files (external data), expected all of them "
                            "in it; run `odtrt convert` again, or save it with onnx as one file"
                        )
                name = _ONNX_TYPES.get(kind, "OTHER")
                counts[name] = counts.get(name, 0) + size
    except (IndexError, ValueError) as error:
        raise refusal from error
    return counts


def _fields(data: Any, span: Tuple[int, int]) -> Iterator[Tuple[int, Union[int, Tuple[int, int]]]]:
    """The fields of a protobuf message: the number, and a varint's value or the span of the bytes."""
    at, end = span
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if number == 0 or at + length > end:
            raise ValueError("beyond the end")
        yield number, (at, at + length)
        at += length


def _varints(data: Any, span: Tuple[int, int]) -> Iterator[Tuple[int, int]]:
    at, end = span
    while at < end:
        value, at = _varint(data, at)
        yield value, at


def _varint(data: Any, at: int) -> Tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("not a varint")


def _end_with_the_parent() -> None:
    """Asks the kernel to end this process when its parent ends (prctl PR_SET_PDEATHSIG)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
