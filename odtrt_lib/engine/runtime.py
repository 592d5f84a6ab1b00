"""Runs a plan on a GPU: TensorRT from 8.5 on, and TensorRT-RTX, through the calls that all of them have.

Two forms, same answers. Fused: ``detector.onnx``'s plan, whose plugin does the post-processing. Split:
``heads.onnx``'s plan, and behind it on the same stream the kernels of :mod:`odtrt_lib.native`; where the
native library has none for this GPU, the heads are copied back and post-processed on the CPU.

Deserialising a plan executes native code out of it. :func:`load` therefore hands TensorRT only bytes whose
SHA-256 is the one in their passport; whether they suit this machine is decided before, by
:func:`odtrt_lib.portability.check`.

TensorRT-RTX compiles its kernels when a plan is loaded, which takes seconds. They are kept beside the plan in
``plans/<plan>.<key>.kernels``, behind their own SHA-256; the key stands for the plan, the library's version
and the GPU. A file that is damaged, or that TensorRT-RTX does not want, is ignored and written anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import re
import threading
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, Union

import numpy as np

from odtrt_lib import native
from odtrt_lib.engine.bindings import TrtMessages, import_library, load_plugin, trt_messages
from odtrt_lib.engine.passport import BUILD_PLUGIN, PLANS, Passport, read_plan
from odtrt_lib.errors import (
    CheckError,
    InputError,
    MissingDependencyError,
    OdtrtError,
    UnsupportedError,
    one_line,
)
from odtrt_lib.folder import atomic_write
from odtrt_lib.machine import Machine, this_machine
from odtrt_lib.nms import Postprocessed, postprocess
from odtrt_lib.spec import DetectorSpec
from odtrt_lib.tensors import (
    CLIP_WINDOWS,
    DETECTIONS,
    Tensors,
    detector_tensors,
    has_clip_windows,
    heads_tensors,
)
from odtrt_lib.variants import RUNTIME_LIBRARIES, form_of

_LOADING = threading.Lock()
_SHA256_BYTES = 32
_FIELDS = (*DETECTIONS, "anchors")  # of Postprocessed, from the kernels
_INTEGERS = ("num_detections", "classes", "anchors")


class RunError(OdtrtError):
    """TensorRT or CUDA failed while a plan was loaded or run; the message quotes its reasons."""


def load(
    folder: Union[str, Path],
    passport: Passport,
    spec: DetectorSpec,
    anchors: np.ndarray,
    *,
    plugin: Union[str, Path, None] = None,
) -> LoadedPlan:
    """Loads the plan of ``passport`` out of ``folder`` and runs once, on zeros, all that runs on the GPU.

    anchors: float32 [N, 4]. plugin: ``libodtrt_tensorrt.so``, for a plan of ``detector.onnx``. Ask
    :func:`odtrt_lib.portability.check` first.

    Raises InputError where the plan is not the one of its passport, MissingDependencyError where the
    library, Polygraphy or the CUDA runtime is absent, CheckError where its tensors are not those that
    ``spec`` describes, RunError, with TensorRT's or CUDA's reasons, where it cannot be loaded or run. No
    device memory stays behind then.
    """
    folder = Path(folder)
    data = read_plan(folder, passport)
    trt = import_library(passport.runtime_library)
    who = f"{folder / PLANS / passport.plan}: {RUNTIME_LIBRARIES[passport.runtime_library]} {trt.__version__}"
    with _LOADING:
        messages = trt_messages(trt)
        device = _Device()
        plan = LoadedPlan(passport, spec, who, messages, device)
        try:
            with _one_line(f"{who} cannot load it", messages):
                keep_at = _load(device, data, trt, folder, passport, plugin, who, messages)
                del data
                plan._prepare(trt, np.ascontiguousarray(anchors, np.float32))
                if keep_at is not None:
                    _keep_kernels(device, keep_at)
        except BaseException:
            plan.close()
            raise
    return plan


class LoadedPlan:
    """A plan on the GPU, with a stream and memory of its own; :func:`load` makes one.

    Calls from several threads take turns. Device memory grows with the largest batch that was run, and is
    given back by :meth:`close`, or when nobody refers to the plan any more.

    passport: the plan's. postprocessing: where that happens, in words. smallest_batch, largest_batch: the
    profile's; other batches are filled up or divided.
    """

    def __init__(
        self, passport: Passport, spec: DetectorSpec, who: str, messages: TrtMessages, device: _Device
    ) -> None:
        self.passport = passport
        self.is_fused = form_of(passport.model) == "plugin"
        self._tensors: Tensors = detector_tensors(spec) if self.is_fused else heads_tensors(spec)
        self.postprocessing = "inside the plan"
        self.smallest_batch = self.largest_batch = 0
        self._spec, self._who, self._messages, self._device = spec, who, messages, device
        self._takes_windows = has_clip_windows(spec)
        self._anchors = np.empty((0, 4), np.float32)
        self._kernels: Optional[native.Library] = None
        self._lock = threading.Lock()
        self._release = weakref.finalize(self, _release, device)

    def run(self, images: np.ndarray, clip_windows: np.ndarray) -> Postprocessed:
        """The detections of a batch.

        images: float32 [B, 3, height, width]. clip_windows: float32 [B, 4], ``Frame.clip_window`` of each.
        From a fused plan ``anchors`` is -1: the plugin does not tell.

        Raises InputError for arrays of another form, RunError where TensorRT or CUDA fails.
        """
        self._check_array("images", images, (3, self._spec.input.height, self._spec.input.width))
        self._check_array("clip_windows", clip_windows, (4,))
        if len(images) != len(clip_windows):
            raise InputError(f"{len(images)} images, but {len(clip_windows)} clip_windows; expected as many")
        batch, most = len(images), self._spec.nms.max_total_detections
        found = Postprocessed(
            num_detections=np.zeros(batch, np.int32),
            boxes=np.zeros((batch, most, 4), np.float32),
            scores=np.zeros((batch, most), np.float32),
            classes=np.zeros((batch, most), np.int32),
            anchors=np.full((batch, most), -1, np.int32),
        )
        for rows, size in self._chunks(batch):
            part = self._in_turn(self._detect, _filled_up(images[rows], size), clip_windows[rows], size)
            for name, array in part.items():
                getattr(found, name)[rows] = array[: rows.stop - rows.start]
        return found

    def infer(self, images: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """The raw heads of a batch, float32 [B, N, 4] and [B, N, columns]; images as in :meth:`run`.

        Raises UnsupportedError for a fused plan, and what :meth:`run` raises.
        """
        if self.is_fused:
            raise UnsupportedError(
                f"{self._who}: the plan gives detections, no raw heads; open the folder without the plugin, "
                'or with backend="onnxruntime"'
            )
        self._check_array("images", images, (3, self._spec.input.height, self._spec.input.width))
        heads = self._spec.heads
        encodings = np.zeros((len(images), heads.num_anchors, 4), np.float32)
        logits = np.zeros((len(images), heads.num_anchors, heads.num_columns), np.float32)
        for rows, size in self._chunks(len(images)):
            part = self._in_turn(self._heads, _filled_up(images[rows], size))
            for whole, array in zip((encodings, logits), part):
                whole[rows] = array[: rows.stop - rows.start]
        return encodings, logits

    def run_again(self) -> None:
        """Runs the network once more on what its input buffers hold, and waits: what a benchmark times."""
        self._in_turn(self._execute)

    def close(self) -> None:
        """Gives the device memory back, after the call that is under way. Calls after it raise RunError."""
        with self._lock:
            self._release()

    def _in_turn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            if not self._release.alive:
                raise RunError(f"{self._who}: the plan is closed; open the detector again")
            with _one_line(f"{self._who} cannot run it", self._messages):
                return function(*arguments)

    def _chunks(self, batch: int) -> Iterator[Tuple[slice, int]]:
        """Which images go through the network together, and the size of that batch."""
        for start in range(0, batch, self.largest_batch):
            rows = slice(start, min(batch, start + self.largest_batch))
            yield rows, max(rows.stop - rows.start, self.smallest_batch)

    def _check_array(self, name: str, array: np.ndarray, shape: Tuple[int, ...]) -> None:
        if array.dtype != np.float32 or array.shape[1:] != shape or array.ndim != len(shape) + 1:
            sizes = ", ".join(map(str, shape))
            raise InputError(f"{name}: {array.dtype} {list(array.shape)}, expected float32 [batch, {sizes}]")

    def _prepare(self, trt: Any, anchors: np.ndarray) -> None:
        """Checks the plan's tensors, chooses the post-processing and runs once what runs on the GPU."""
        device, engine = self._device, self._device.engine
        self._check_tensors(trt)
        image = self._spec.input.name
        if engine.get_tensor_shape(image)[0] == -1:
            profile = [int(shape[0]) for shape in engine.get_tensor_profile_shape(image, 0)]
        else:
            profile = [int(engine.get_tensor_shape(image)[0])] * 3
        self.smallest_batch, usual, self.largest_batch = profile

        cuda = _cuda()
        device.stream = cuda.Stream()
        for tensor in self._tensors.all:
            device.network[tensor.name] = cuda.DeviceArray(dtype=np.dtype(tensor.dtype))
        self._anchors = anchors
        if not self.is_fused:
            self._choose_postprocessing(cuda)
        images = np.zeros(self._tensors.inputs[0].with_batch(usual), np.float32)
        windows = np.tile(np.array([0, 0, 1, 1], np.float32), (usual, 1))
        if self.is_fused or self._kernels is not None:
            try:
                self._detect(images, windows, usual)
                return
            except native.NativeError as error:  # e.g. compiled for other GPUs
                self._kernels = None
                self.postprocessing = f"on the CPU, because {one_line(error)}"
        self._heads(images)

    def _check_tensors(self, trt: Any) -> None:
        engine = self._device.engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        for mode, expected in (
            (trt.TensorIOMode.INPUT, self._tensors.inputs),
            (trt.TensorIOMode.OUTPUT, self._tensors.outputs),
        ):
            if {name for name in modes if modes[name] == mode} != {tensor.name for tensor in expected}:
                raise CheckError(
                    f"{self._who}: tensors {', '.join(names)}, expected "
                    f"{', '.join(tensor.name for tensor in self._tensors.all)} as spec.json says; run "
                    "`odtrt build` again"
                )
        for tensor in self._tensors.all:
            found, dtype = engine.get_tensor_dtype(tensor.name), getattr(trt, tensor.dtype)
            if found != dtype:
                raise CheckError(
                    f"{self._who}: `{tensor.name}` is {found}, expected {dtype}; run `odtrt build` again"
                )

    def _choose_postprocessing(self, cuda: Any) -> None:
        library = native.load()
        if library is None:
            self.postprocessing = "on the CPU, because the native library is not built: run `make plugin`"
        elif not library.cuda_architectures:
            self.postprocessing = "on the CPU, because the native library was built without CUDA"
        elif not native.can_postprocess(self._spec):
            self.postprocessing = "on the CPU, because the kernels do not take this detector"
        else:
            self.postprocessing = "on the GPU"
            self._kernels = library
            device = self._device
            device.anchors = cuda.DeviceArray(dtype=np.float32).resize(self._anchors.shape)
            _copy_in(self._anchors, device.anchors, device.stream)
            device.windows = cuda.DeviceArray(dtype=np.float32)
            device.workspace = cuda.DeviceArray(dtype=np.uint8)
            for name in _FIELDS:
                dtype = np.int32 if name in _INTEGERS else np.float32
                device.detections[name] = cuda.DeviceArray(dtype=dtype)

    def _detect(self, images: np.ndarray, windows: np.ndarray, size: int) -> Dict[str, np.ndarray]:
        """The fields of ``Postprocessed`` for one batch that the plan takes."""
        windows = _filled_up(windows, size)
        if self.is_fused:
            self._enqueue(images, windows)
            return self._fetch(self._device.network, DETECTIONS)
        if self._kernels is None:
            found = postprocess(*self._heads(images), self._anchors, self._spec, windows)
            return {name: getattr(found, name) for name in _FIELDS}
        self._enqueue(images, None)
        self._enqueue_postprocess(self._kernels, windows)
        return self._fetch(self._device.detections, _FIELDS)

    def _heads(self, images: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        self._enqueue(images, None)
        heads = self._spec.heads
        found = self._fetch(self._device.network, (heads.box_encodings, heads.class_logits))
        return found[heads.box_encodings], found[heads.class_logits]

    def _enqueue(self, images: np.ndarray, windows: Optional[np.ndarray]) -> None:
        """Copies a batch in, and starts the network on it."""
        device, batch = self._device, len(images)
        arrays = {self._spec.input.name: images}
        if windows is not None:
            arrays[CLIP_WINDOWS] = windows
        for tensor in self._tensors.inputs:
            name, shape = tensor.name, tensor.with_batch(batch)
            _copy_in(arrays[name], device.network[name].resize(shape), device.stream)
            if not device.context.set_input_shape(name, shape):
                raise self._error(f"does not take `{name}` {list(shape)}")
        for tensor in self._tensors.outputs:
            name, shape = tensor.name, tensor.with_batch(batch)
            found = tuple(device.context.get_tensor_shape(name))
            if found != shape:
                raise CheckError(
                    f"{self._who}: `{name}` is {list(found)}, expected {list(shape)} as spec.json says; run "
                    "`odtrt build` again"
                )
            device.network[name].resize(shape)
        for name, buffer in device.network.items():
            if not device.context.set_tensor_address(name, buffer.ptr):
                raise self._error(f"does not take the address of `{name}`")
        self._start()

    def _start(self) -> None:
        if not self._device.context.execute_async_v3(self._device.stream.ptr):
            raise self._error("cannot run it")

    def _error(self, what: str) -> RunError:
        return _run_error(f"{self._who} {what}", self._messages.reasons())

    def _execute(self) -> None:
        self._start()
        self._device.stream.synchronize()

    def _enqueue_postprocess(self, library: native.Library, windows: np.ndarray) -> None:
        device, spec, batch = self._device, self._spec, len(windows)
        most = spec.nms.max_total_detections
        params = native.postprocess_params(spec)
        workspace = native.postprocess_workspace(library, params, batch)
        device.workspace.resize((workspace,))
        if self._takes_windows:
            _copy_in(windows, device.windows.resize((batch, 4)), device.stream)
        sizes = {"num_detections": (batch,), "boxes": (batch, most, 4)}
        for name, buffer in device.detections.items():
            buffer.resize(sizes.get(name, (batch, most)))
        native.postprocess_cuda(
            library,
            params,
            batch,
            native.HeadPointers(
                device.network[spec.heads.box_encodings].ptr,
                device.network[spec.heads.class_logits].ptr,
                native.FLOAT32,
                device.anchors.ptr,
                device.windows.ptr if self._takes_windows else None,
            ),
            native.DetectionPointers(*(device.detections[name].ptr for name in _FIELDS)),
            device.workspace.ptr,
            workspace,
            device.stream.ptr,
        )

    def _fetch(self, buffers: Dict[str, Any], names: Sequence[str]) -> Dict[str, np.ndarray]:
        found = {}
        for name in names:
            is_integer = name in _INTEGERS and (self.is_fused or buffers is self._device.detections)
            found[name] = np.empty(buffers[name].shape, np.int32 if is_integer else np.float32)
            _copy_out(buffers[name], found[name], self._device.stream)
        self._device.stream.synchronize()
        return found


@dataclasses.dataclass(eq=False)
class _Device:
    """What one plan has on the GPU. Nothing else refers to it: :func:`_release` decides about the order."""

    runtime: Any = None
    engine: Any = None
    config: Any = None
    kernel_cache: Any = None
    context: Any = None
    stream: Any = None
    network: Dict[str, Any] = dataclasses.field(default_factory=dict)
    detections: Dict[str, Any] = dataclasses.field(default_factory=dict)
    anchors: Any = None
    windows: Any = None
    workspace: Any = None


# DeviceArray's own copies look at the array's type for 50 microseconds each, so these do without.


def _copy_in(array: np.ndarray, buffer: Any, stream: Any) -> None:
    from polygraphy import cuda

    to_device = cuda.MemcpyKind.HostToDevice
    cuda.wrapper().memcpy(buffer.ptr, array.ctypes.data, array.nbytes, to_device, stream.ptr)


def _copy_out(buffer: Any, array: np.ndarray, stream: Any) -> None:
    from polygraphy import cuda

    to_host = cuda.MemcpyKind.DeviceToHost
    cuda.wrapper().memcpy(array.ctypes.data, buffer.ptr, array.nbytes, to_host, stream.ptr)


def _release(device: _Device) -> None:
    with contextlib.suppress(Exception):
        if device.stream is not None:
            device.stream.synchronize()
    device.context = device.kernel_cache = device.config = None
    device.engine = None
    device.runtime = None
    buffers = [*device.network.values(), *device.detections.values()]
    buffers += [device.anchors, device.windows, device.workspace, device.stream]
    device.network, device.detections = {}, {}
    device.anchors = device.windows = device.workspace = device.stream = None
    for buffer in buffers:
        if buffer is not None:
            with contextlib.suppress(Exception):  # after an error CUDA refuses, and has freed everything
                buffer.free()


def _load(
    device: _Device,
    data: bytes,
    trt: Any,
    folder: Path,
    passport: Passport,
    plugin: Union[str, Path, None],
    who: str,
    messages: TrtMessages,
) -> Optional[Path]:
    """Fills ``device`` up to the context; where TensorRT-RTX keeps the kernels that it compiles, or None."""
    device.runtime = trt.Runtime(messages.logger)
    device.runtime.error_recorder = messages.recorder
    if form_of(passport.model) == "plugin":
        if plugin is None:
            raise InputError(f"{who}: the plan needs the plugin; name libodtrt_tensorrt.so")
        _require_plugin(trt, Path(plugin), who, messages)
    if passport.version_compatible and hasattr(device.runtime, "engine_host_code_allowed"):
        device.runtime.engine_host_code_allowed = True  # the lean runtime that such a plan carries
    device.engine = device.runtime.deserialize_cuda_engine(data)
    if device.engine is None:
        raise _run_error(f"{who} cannot load it", messages.reasons())
    path = None
    if hasattr(device.engine, "create_runtime_config"):
        device.config = device.engine.create_runtime_config()
        if hasattr(device.config, "create_runtime_cache"):
            path = kernels_path(folder, passport, trt.__version__, this_machine())
            device.kernel_cache = device.config.create_runtime_cache()
            kept = _read_kernels(path)
            if kept is not None and not device.kernel_cache.deserialize(kept):
                device.kernel_cache.reset()
            device.config.set_runtime_cache(device.kernel_cache)
    if device.kernel_cache is None:
        device.context = device.engine.create_execution_context()
    else:
        device.context = device.engine.create_execution_context(device.config)
    if device.context is None:
        raise _run_error(f"{who} cannot load it", messages.reasons())
    device.context.error_recorder = messages.recorder
    return path


def _require_plugin(trt: Any, plugin: Path, who: str, messages: TrtMessages) -> None:
    if not plugin.is_file():
        raise InputError(f"{plugin}: not found; {BUILD_PLUGIN}")
    # The process's registry: a runtime's own would unload the plugin with the runtime.
    if not load_plugin(trt.get_plugin_registry(), plugin):
        raise RunError(
            f"{plugin}: {who} cannot load the plugin ({messages.reasons()}); build it with this TensorRT's "
            "headers: `make plugin`"
        )


# ---- Kernels that TensorRT-RTX compiled -------------------------------------------------------------------


def kernels_path(folder: Union[str, Path], passport: Passport, version: str, machine: Machine) -> Path:
    """Where the kernels are kept that ``version`` of TensorRT-RTX compiles for the plan on ``machine``."""
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
    """The kernels that :func:`_keep_kernels` wrote; None where there are none or the file is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    kernels = data[_SHA256_BYTES:]
    return kernels if hashlib.sha256(kernels).digest() == data[:_SHA256_BYTES] else None


def _keep_kernels(device: _Device, path: Path) -> None:
    """Writes the kernels unless the file has them. They only save time: where that fails, it is no error."""
    serialized = device.kernel_cache.serialize()
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


@contextlib.contextmanager
def _one_line(what: str, messages: TrtMessages) -> Iterator[None]:
    """Turns what TensorRT's and Polygraphy's Python raise into a RunError of one line."""
    messages.messages.clear()
    try:
        yield
    except OdtrtError:
        raise
    except Exception as error:
        reasons = "; ".join(dict.fromkeys([_text(error), *messages.messages]))
        raise _run_error(what, one_line(reasons)) from error


def _text(error: Exception) -> str:
    """The exception's message; of Polygraphy's, which has the number of a CUDA error only, CUDA's text."""
    number = re.search(r"CUDA Error: (\d+)", str(error))
    if number is None:
        return one_line(error)
    describe = _cuda().wrapper().handle.cudaGetErrorString
    describe.restype = ctypes.c_char_p
    return f"CUDA error {number.group(1)}: {describe(int(number.group(1))).decode(errors='replace')}"


def _cuda() -> Any:
    """``polygraphy.cuda`` with the CUDA runtime library loaded. It prints at length where there is none."""
    try:
        from polygraphy import cuda
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingDependencyError(
            f"Polygraphy cannot be imported ({one_line(error)}): run `pip install polygraphy`"
        ) from error
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            cuda.wrapper()
    except Exception as error:
        raise MissingDependencyError(
            f"the CUDA runtime library libcudart.so cannot be loaded ({one_line(error)}): install the CUDA "
            "toolkit, and put its lib64 into LD_LIBRARY_PATH"
        ) from error
    return cuda


def _filled_up(array: np.ndarray, size: int) -> np.ndarray:
    """``array`` with its last row repeated until it has ``size`` rows."""
    if len(array) < size:
        array = np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
    return np.ascontiguousarray(array)
