"""Loads a plan with TensorRT 8.5 and newer, or TensorRT-RTX, by the calls that all of them have.

A :class:`Network` is a plan on the GPU. :mod:`odtrt_lib.engine.pipeline` adds preprocessing and
post-processing.

Deserialising a plan executes native code from its file. So :func:`load` gives TensorRT only bytes whose
SHA-256 is that of the passport. :func:`odtrt_lib.portability.check` must decide before whether they suit this
machine.

TensorRT-RTX compiles its kernels when a plan is loaded, which takes seconds. They are stored beside the plan
in ``plans/<plan>.<key>.kernels``, after their SHA-256. The key stands for the plan, the library's version and
the GPU. A file that is damaged, or that TensorRT-RTX refuses, is ignored and written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from odtrt_lib import cuda
from odtrt_lib.engine.bindings import TrtMessages, import_library, load_plugin, trt_messages
from odtrt_lib.engine.passport import BUILD_PLUGIN, PLANS, Passport, read_plan
from odtrt_lib.errors import CheckError, InputError, OdtrtError, one_line
from odtrt_lib.folder import atomic_write
from odtrt_lib.machine import Machine, this_machine
from odtrt_lib.spec import DetectorSpec
from odtrt_lib.tensors import Tensor, Tensors, detector_tensors, heads_tensors
from odtrt_lib.variants import RUNTIME_LIBRARIES, form_of

_LOADING = threading.Lock()
_SHA256_BYTES = 32
PROFILED_RUNS = 10


class RunError(OdtrtError):
    """TensorRT or CUDA failed while a plan was loaded or run; the message quotes its reasons."""


def load(
    folder: Union[str, Path],
    passport: Passport,
    spec: DetectorSpec,
    *,
    plugin: Union[str, Path, None] = None,
) -> Network:
    """Loads the plan of ``passport`` from ``folder``; ``Network.bind`` comes next. For errors see
    :func:`odtrt_lib.engine.pipeline.load`.
    """
    folder = Path(folder)
    data = read_plan(folder, passport)
    trt = import_library(passport.runtime_library)
    cuda.library()
    who = f"{folder / PLANS / passport.plan}: {RUNTIME_LIBRARIES[passport.runtime_library]} {trt.__version__}"
    with _LOADING:
        network = Network(trt, who, passport, spec)
        try:
            with network.errors("cannot load it"):
                network.deserialize(data, folder, plugin)
        except BaseException:
            network.close()
            raise
    return network


class Network:
    """A plan that TensorRT has loaded, and one execution context. Not for several threads at a time.

    who: the plan and the library, for messages. tensors: the plan's inputs and outputs. min_batch,
    usual_batch, max_batch: the smallest, best-tuned and largest batch of its profile.
    """

    def __init__(self, trt: Any, who: str, passport: Passport, spec: DetectorSpec) -> None:
        self.who, self.passport = who, passport
        self.is_fused = form_of(passport.model) == "plugin"
        self.tensors: Tensors = detector_tensors(spec) if self.is_fused else heads_tensors(spec)
        self.min_batch = self.usual_batch = self.max_batch = 0
        self._trt = trt
        self._messages: TrtMessages = trt_messages(trt)
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._kernel_cache: Any = None
        self._kernels_path: Optional[Path] = None
        self._context: Any = None
        self._bound: Tuple[int, Dict[str, int]] = (0, {})

    def deserialize(self, data: bytes, folder: Path, plugin: Union[str, Path, None]) -> None:
        """Deserialises the plan, and checks its tensors."""
        trt, passport = self._trt, self.passport
        self._runtime = self._messages.make(trt.Runtime)
        self._runtime.error_recorder = self._messages.recorder
        if self.is_fused:
            if plugin is None:
                raise InputError(f"{self.who}: the plan needs the plugin; name libodtrt_tensorrt.so")
            self._require_plugin(Path(plugin))
        if passport.version_compatible and hasattr(self._runtime, "engine_host_code_allowed"):
            self._runtime.engine_host_code_allowed = True  # the lean runtime that such a plan carries
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise self.error("cannot load it")
        self._offer_kernels(folder)
        self._context = self._new_context()
        if self._context is None:
            raise self.error("cannot load it")
        self._context.error_recorder = self._messages.recorder
        self._check_tensors()
        image = self.tensors.inputs[0].name
        batch = int(self._engine.get_tensor_shape(image)[0])
        profile = (
            [int(shape[0]) for shape in self._engine.get_tensor_profile_shape(image, 0)]
            if batch == -1
            else [batch] * 3
        )
        self.min_batch, self.usual_batch, self.max_batch = profile

    def _new_context(self) -> Any:
        if self._kernel_cache is None:
            return self._engine.create_execution_context()
        return self._engine.create_execution_context(self._config)

    def keep_kernels(self) -> None:
        """Stores the kernels that TensorRT-RTX has compiled beside the plan, for the next start."""
        if self._kernels_path is not None:
            _keep_kernels(self._kernel_cache, self._kernels_path)

    def bind(self, batch: int, addresses: Dict[str, int]) -> None:
        """Sets the batch, and the address of each tensor in memory that the GPU can access.

        Raises CheckError if the plan's outputs have other shapes than ``spec.json`` says.
        """
        self._bind(self._context, batch, addresses)
        self._bound = batch, dict(addresses)

    def _bind(self, context: Any, batch: int, addresses: Dict[str, int]) -> None:
        for tensor in self.tensors.inputs:
            shape = tensor.with_batch(batch)
            if not context.set_input_shape(tensor.name, shape):
                raise self.error(f"does not take `{tensor.name}` {list(shape)}")
        for tensor in self.tensors.outputs:
            self._check_shape(context, tensor, tensor.with_batch(batch))
        for tensor in self.tensors.all:
            if not context.set_tensor_address(tensor.name, addresses[tensor.name]):
                raise self.error(f"does not take the address of `{tensor.name}`")

    def enqueue(self, stream: cuda.Stream) -> None:
        """Enqueues the network on the bound tensors."""
        if not self._context.execute_async_v3(stream.handle):
            raise self.error("cannot run it")

    def layer_times(self, stream: cuda.Stream) -> List[Tuple[str, float]]:
        """Runs the network :data:`PROFILED_RUNS` times on the bound tensors, and gives each layer's name and
        median time in microseconds. Their sum exceeds the network's time: layers that are timed do not
        overlap. A context of its own runs them, which needs as much memory again; nothing if that is not
        there, or if the runtime does not tell."""
        context = self._new_context()
        if context is None or not hasattr(self._trt, "IProfiler") or not hasattr(context, "profiler"):
            return []
        context.error_recorder = self._messages.recorder
        times: Dict[str, List[float]] = {}
        profiler = _layer_profiler(self._trt, times)
        context.profiler = profiler
        self._bind(context, *self._bound)
        for _ in range(PROFILED_RUNS + 1):
            if not context.execute_async_v3(stream.handle):
                raise self.error("cannot run it")
            stream.synchronize()
        return [(name, statistics.median(one[1:])) for name, one in times.items() if len(one) > 1]

    def close(self) -> None:
        """Frees context, engine and runtime, in the order that TensorRT needs. No work of it may be
        enqueued."""
        self._context = self._kernel_cache = self._config = None
        self._engine = None
        self._runtime = None

    def error(self, what: str) -> RunError:
        """An error of this plan, with TensorRT's own reasons."""
        return _run_error(f"{self.who} {what}", self._messages.reasons())

    def closed_error(self) -> RunError:
        return RunError(f"{self.who}: the plan is closed; open the detector again")

    @contextlib.contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turns what CUDA and TensorRT's Python raise inside into a RunError of one line."""
        self._messages.messages.clear()
        try:
            yield
        except Exception as error:
            if isinstance(error, OdtrtError) and not isinstance(error, cuda.CudaError):
                raise
            reasons = "; ".join(dict.fromkeys([one_line(error), *self._messages.messages]))
            raise _run_error(f"{self.who} {what}", one_line(reasons)) from error

    def _require_plugin(self, plugin: Path) -> None:
        if not plugin.is_file():
            raise InputError(f"{plugin}: not found; {BUILD_PLUGIN}")
        # The process's registry: a runtime's own would unload the plugin with the runtime.
        if not load_plugin(self._trt.get_plugin_registry(), plugin):
            raise RunError(
                f"{plugin}: {self.who} cannot load the plugin ({self._messages.reasons()}); build it with "
                "this TensorRT's headers: `make plugin`"
            )

    def _offer_kernels(self, folder: Path) -> None:
        """Gives TensorRT-RTX the stored kernels."""
        if not hasattr(self._engine, "create_runtime_config"):
            return
        self._config = self._engine.create_runtime_config()
        if not hasattr(self._config, "create_runtime_cache"):
            return
        path = kernels_path(folder, self.passport, self._trt.__version__, this_machine())
        self._kernel_cache = self._config.create_runtime_cache()
        kept = _read_kernels(path)
        if kept is not None and not self._kernel_cache.deserialize(kept):
            self._kernel_cache.reset()
        self._config.set_runtime_cache(self._kernel_cache)
        self._kernels_path = path

    def _check_tensors(self) -> None:
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        for mode, expected in (
            (trt.TensorIOMode.INPUT, self.tensors.inputs),
            (trt.TensorIOMode.OUTPUT, self.tensors.outputs),
        ):
            if {name for name in modes if modes[name] == mode} != {tensor.name for tensor in expected}:
                raise CheckError(
                    f"{self.who}: tensors {', '.join(names)}, expected "
                    f"{', '.join(tensor.name for tensor in self.tensors.all)} as spec.json says; run "
                    "`odtrt build` again"
                )
        for tensor in self.tensors.all:
            found, dtype = engine.get_tensor_dtype(tensor.name), getattr(trt, tensor.dtype)
            if found != dtype:
                raise CheckError(
                    f"{self.who}: `{tensor.name}` is {found}, expected {dtype}; run `odtrt build` again"
                )

    def _check_shape(self, context: Any, tensor: Tensor, shape: Tuple[int, ...]) -> None:
        found = tuple(context.get_tensor_shape(tensor.name))
        if found != shape:
            raise CheckError(
                f"{self.who}: `{tensor.name}` is {list(found)}, expected {list(shape)} as spec.json says; "
                "run `odtrt build` again"
            )


def _layer_profiler(trt: Any, times: Dict[str, List[float]]) -> Any:
    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(1e3 * ms)

    return Profiler()


# ---- Kernels that TensorRT-RTX compiled -------------------------------------------------------------------


def kernels_path(folder: Union[str, Path], passport: Passport, version: str, machine: Machine) -> Path:
    """The file for the kernels that this version of TensorRT-RTX compiles for the plan on ``machine``."""
    identity = [
        passport.plan_sha256,
        passport.runtime_library,
        version,
        machine.gpu,
        machine.compute_capability,
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    return Path(folder) / PLANS / f"{Path(passport.plan).stem}.{key}.kernels"


def _read_kernels(path: Path) -> Optional[bytes]:
    """The kernels that :func:`_keep_kernels` wrote; None if there are none or the file is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    kernels = data[_SHA256_BYTES:]
    return kernels if hashlib.sha256(kernels).digest() == data[:_SHA256_BYTES] else None


def _keep_kernels(cache: Any, path: Path) -> None:
    """Writes the kernels unless the file has them. They only save time, so a failure is no error."""
    serialized = cache.serialize()
    if serialized is None:
        return
    kernels = bytes(serialized)
    if kernels == _read_kernels(path):
        return
    with contextlib.suppress(OdtrtError, OSError):
        with atomic_write(path) as temporary:
            temporary.write_bytes(hashlib.sha256(kernels).digest() + kernels)
        fingerprint = path.name.split("-")[0]
        for other in path.parent.glob(f"{fingerprint}-*.kernels"):
            if not other.with_name(f"{other.name.split('.')[0]}.plan").exists():
                other.unlink()


# ---- What TensorRT and CUDA say ---------------------------------------------------------------------------


def _run_error(what: str, reasons: str) -> RunError:
    return RunError(f'{what}: {reasons}; run `odtrt doctor`, or use backend="onnxruntime"')
