"""One class for the whole way from an image to detections: preprocessing, network and post-processing.

A :class:`Backend` turns pictures into detections in the network's coordinates. The conversion to boxes in
pixels and to class names is the same for all backends.

* ``onnxruntime`` runs ``heads.onnx`` on the CPU. Preprocessing and post-processing run in the native library
  if it was built, otherwise in numpy.
* ``tensorrt`` and ``tensorrt_rtx`` run the newest plan in ``plans/`` that may be used here
  (:func:`odtrt_lib.portability.check`), split or fused; see :mod:`odtrt_lib.engine.pipeline`.
* ``auto``, the default, uses the newest plan of the installed TensorRT if there is an NVIDIA GPU, otherwise
  ONNX Runtime. If that plan is stale, another process rebuilds it. Meanwhile an older plan or ONNX Runtime is
  used. The new plan is loaded in the background and replaces it between two calls.

A detector belongs to the process that opened it. After ``fork`` the child has neither its threads nor its
GPU, and its calls raise InputError. Open it after the fork, or let multiprocessing "spawn" its processes.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import os
import threading
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, MutableSet, NoReturn, Optional, Sequence, Tuple, Union

import numpy as np

from odtrt_lib import onnx_model
from odtrt_lib.anchors import load_anchors
from odtrt_lib.engine.passport import BUILD_PLUGIN, PLANS
from odtrt_lib.errors import InputError, MissingDependencyError, OdtrtError, one_line
from odtrt_lib.folder import sealed
from odtrt_lib.machine import this_machine
from odtrt_lib.nms import Postprocessed, postprocess
from odtrt_lib.preprocess import boxes_to_pixels, frame_of, preprocess
from odtrt_lib.spans import span
from odtrt_lib.spec import DetectorSpec, load_spec
from odtrt_lib.tensors import Tensor, heads_tensors
from odtrt_lib.variants import PRECISIONS, RUNTIME_LIBRARIES, Variant, form_of

if TYPE_CHECKING:
    from odtrt_lib.engine.passport import Passport
    from odtrt_lib.engine.pipeline import Switches
    from odtrt_lib.portability import Environment

Heads = Tuple[np.ndarray, np.ndarray]

BACKENDS = ("auto", "onnxruntime", "tensorrt", "tensorrt_rtx")
MOST_WAITING = 16
"""Calls of :meth:`Detector.submit` that may be unfinished; the next one waits. From callbacks: twice that."""

_POLL_SECONDS = 0.5
_NO_GPU = "no NVIDIA GPU here: no plan runs, ONNX Runtime does"


@dataclasses.dataclass(frozen=True)
class Detections:
    """The K detections in one image, best score first.

    boxes: float32 [K, 4], ``[ymin, xmin, ymax, xmax]`` in pixels of the original image.
    scores: float32 [K]. class_ids: int64 [K], ids of the label map. names: K class names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray
    names: Tuple[str, ...]


def _nothing_to_close() -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Backend:
    """Something that finds objects in pictures.

    run: RGB pictures, uint8 [height, width, 3], of any sizes -> detections, one row for each picture; no more
    than ``InputSpec.batch`` if that is fixed. infer: what the network alone gives, to look at: float32 [B,
    3, height, width] -> (box_encodings float32 [B, N, 4], class_logits float32 [B, N, columns]), see
    :class:`odtrt_lib.spec.SsdHeads`; B is ``InputSpec.batch`` if that is fixed. A fused plan has no heads
    to give and raises UnsupportedError. close: gives its memory back. description: what runs, for people.
    plan: the fingerprint, if it is a plan. notes: which switches were turned off up to now, and why. layers:
    runs the network some times, and gives the name and the median time, in microseconds, of each layer;
    nothing if the runtime does not tell.
    """

    name: str
    run: Callable[[Sequence[np.ndarray]], Postprocessed]
    infer: Callable[[np.ndarray], Heads]
    close: Callable[[], None] = _nothing_to_close
    description: str = ""
    plan: Optional[str] = None
    notes: Callable[[], Sequence[str]] = tuple
    layers: Callable[[], Sequence[Tuple[str, float]]] = tuple


def host_backend(
    name: str,
    infer: Callable[[np.ndarray], Heads],
    spec: DetectorSpec,
    anchors: np.ndarray,
    description: str = "",
) -> Backend:
    """A backend whose network runs on the CPU, between preprocessing and post-processing there.

    infer: as of :class:`Backend`. anchors: float32 [N, 4], ``(ycenter, xcenter, height, width)``.
    """

    def run(images: Sequence[np.ndarray]) -> Postprocessed:
        network, count = spec.input, len(images)
        with span("preprocess"):
            batch = np.zeros((network.batch or count, 3, network.height, network.width), np.float32)
            frames = [preprocess(image, network, out=out)[1] for image, out in zip(images, batch)]
        windows = np.array([frame.clip_window for frame in frames], np.float32)
        with span("engine"):
            box_encodings, class_logits = infer(batch)
        with span("postprocess"):
            return postprocess(box_encodings[:count], class_logits[:count], anchors, spec, windows)

    return Backend(name, run, infer, description=description)


@dataclasses.dataclass(frozen=True)
class Status:
    """The backend in use, and the reasons why no better one is used.

    backend, description, plan: of :class:`Backend`. reasons: why a plan that was preferred is not used, in
    words; empty if the best one serves. rebuild: ``none``, ``running``, ``done`` or ``failed``; progress:
    0 to 1 while it runs, if it is known. message: what the rebuild says, e.g. why it failed.
    """

    backend: str
    description: str
    plan: Optional[str]
    reasons: Tuple[str, ...] = ()
    rebuild: str = "none"
    progress: Optional[float] = None
    message: str = ""


@dataclasses.dataclass(eq=False)
class _Serving:
    """What changes while a detector runs. ``lock`` guards the exchange of the backend, not its use.

    process: the one that opened the detector. free_places: for calls of submit that wait for one;
    extra_places: for those in the worker thread, which would wait for itself.
    """

    process: int = dataclasses.field(default_factory=os.getpid)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    watcher: Optional[threading.Thread] = None
    worker: Optional[ThreadPoolExecutor] = None
    free_places: threading.Semaphore = dataclasses.field(
        default_factory=lambda: threading.Semaphore(MOST_WAITING)
    )
    extra_places: threading.Semaphore = dataclasses.field(
        default_factory=lambda: threading.Semaphore(MOST_WAITING)
    )
    reasons: Tuple[str, ...] = ()
    rebuild: str = "none"
    progress: Optional[float] = None
    message: str = ""


@dataclasses.dataclass(eq=False)
class Detector:
    """One detector, ready to run, from any number of threads.

    anchors: float32 [N, 4], ``(ycenter, xcenter, height, width)``. A call of :meth:`detect` or
    :meth:`detect_batch` is answered by one backend as a whole, even if a new plan takes over in the meantime.
    """

    spec: DetectorSpec
    anchors: np.ndarray
    backend: Backend
    _serving: _Serving = dataclasses.field(default_factory=_Serving, init=False, repr=False)

    def __post_init__(self) -> None:
        _detectors.add(self)

    @classmethod
    def open(
        cls,
        folder: Union[str, Path],
        backend: str = "auto",
        *,
        plugin: Union[str, Path, None] = None,
        precision: Optional[str] = None,
        switches: Optional[Switches] = None,
        threads: Optional[int] = None,
    ) -> Detector:
        """Opens a model folder.

        backend: ``auto``: the newest plan that may be used here if there is an NVIDIA GPU, else ONNX
        Runtime; ``onnxruntime``; ``tensorrt`` or ``tensorrt_rtx``: a plan of that library or an error. With
        ``auto`` a plan that no longer fits (another library, GPU, ONNX file or spec.json) starts one process
        that rebuilds it in the background; :attr:`status` says so, and the other backends never do. plugin:
        ``libodtrt_tensorrt.so``; with it a fused plan is preferred to a split one, without it not looked at.
        precision: only plans of this one (ONNX Runtime has int8 and fp32); None: of any. switches: of a plan,
        see :class:`odtrt_lib.engine.pipeline.Switches`. threads: see :func:`odtrt_lib.onnx_model.session`.

        Close it, or use it in a ``with`` block, to give the GPU's memory back::

            with Detector.open("out/parts") as detector:
                found = detector.detect(image)

        Raises InputError if a file is missing, is not the one that its stage recorded
        (:func:`odtrt_lib.folder.sealed`) or does not agree with ``spec.json``, and, naming every plan and why
        it may not be used, if a TensorRT was asked for and no plan is left;
        MissingDependencyError if the backend is not installed or there is no GPU for it. ``auto`` falls
        back to ONNX Runtime instead, and :attr:`status` says why.
        """
        folder = Path(folder)
        _check_choices(backend, plugin, precision)
        if backend == "onnxruntime":
            return cls(*_open_onnxruntime(folder, precision, threads))
        here = _here(backend, plugin)
        if here is None:
            detector = cls(*_open_onnxruntime(folder, precision, threads))
            detector._serving.reasons = (_NO_GPU,) if any((folder / PLANS).glob("*.json")) else ()
            return detector
        wanted = _Wanted(folder, here, plugin, precision, switches)
        spec, anchors = _read_contract(folder)
        found = _open_best_plan(wanted, spec, anchors)
        if found.backend is not None and not _is_contract_of(folder, spec, anchors):
            found.backend.close()
            raise InputError(f"{folder}: the model was replaced while it was opened; open it again")
        if backend != "auto":
            if found.backend is None:
                reasons = "; ".join(found.reasons)
                raise InputError(f"{folder}: no plan that {backend} {here.version} can use here: {reasons}")
            return cls(spec, anchors, found.backend)
        is_started = found.stale is not None and _start_rebuild(wanted, found.stale)
        if found.backend is not None:
            detector = cls(spec, anchors, found.backend)
        else:
            detector = cls(*_open_onnxruntime_instead(folder, precision, threads, found.reasons))
        detector._serving.reasons = found.reasons
        if found.stale is not None:
            _watch_rebuild(detector, wanted, found.stale, is_started)
        return detector

    @property
    def status(self) -> Status:
        """The backend in use, and the state of a rebuild."""
        backend, serving = self.backend, self._serving
        with serving.lock:
            return Status(
                backend.name,
                "; ".join([backend.description, *backend.notes()]),
                backend.plan,
                serving.reasons,
                serving.rebuild,
                serving.progress,
                serving.message,
            )

    def wait_for_rebuild(self, timeout: Optional[float] = None) -> Status:
        """Waits until no rebuild is running and the new plan is in use, at most ``timeout`` seconds."""
        watcher = self._serving.watcher
        if watcher is not None:
            watcher.join(timeout)
        return self.status

    def detect(self, image: np.ndarray) -> Detections:
        """The detections in an RGB image, uint8 [height, width, 3]."""
        return self.detect_batch([image])[0]

    def detect_batch(self, images: Sequence[np.ndarray]) -> List[Detections]:
        """The detections in each of several RGB images, uint8 [height, width, 3], of any sizes.

        They go through the network together; if its batch size is fixed, that many at a time.
        """
        backend = self.backend
        at_a_time = self.spec.input.batch or len(images)
        found: List[Detections] = []
        while len(found) < len(images):
            found += self._detect_at_once(backend, images[len(found) : len(found) + at_a_time])
        return found

    def submit(self, image: np.ndarray) -> Future[Detections]:
        """:meth:`detect` in the background: ``result()`` gives the detections, or raises what it raised.

        One call after the other, in the order of submission. Do not write into the image before its result
        is there: it is not copied. While :data:`MOST_WAITING` results are unfinished this waits, so a
        camera that is faster than the detector does not fill the memory.

        A callback (``Future.add_done_callback``) runs in the thread that works, which must not wait for
        itself. There this never waits: as many calls again may be unfinished, then it raises InputError. A
        callback must not wait for another result either.
        """
        return self._in_background(self.detect, image)

    def submit_batch(self, images: Sequence[np.ndarray]) -> Future[List[Detections]]:
        """:meth:`detect_batch` in the background, as :meth:`submit`."""
        return self._in_background(self.detect_batch, images)

    def close(self) -> None:
        """Waits until all submitted calls are done, and frees the network's memory. A rebuild is not stopped.

        Raises InputError in a callback, see :meth:`submit`, because submitted calls could not finish.
        """
        if _in_worker():
            raise InputError(
                "close() was called in a callback of submit(), which would wait for itself; "
                "close the detector in another thread"
            )
        serving = self._serving
        serving.stop.set()
        with serving.lock:
            worker = serving.worker
        if worker is not None:
            worker.shutdown(wait=True)
        _stop_watching(serving)
        backend, self.backend = self.backend, _CLOSED
        backend.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _in_background(self, function: Callable[[Any], Any], argument: Any) -> Future[Any]:
        serving = self._serving
        places = _take_place(serving)
        try:
            with serving.lock:
                if serving.stop.is_set():
                    raise _closed_error()
                if serving.worker is None:
                    serving.worker = ThreadPoolExecutor(1, "odtrt-detect", initializer=_mark_worker)
                future = serving.worker.submit(function, argument)
        except BaseException:
            places.release()
            raise
        future.add_done_callback(lambda _: places.release())
        return future

    def _detect_at_once(self, backend: Backend, images: Sequence[np.ndarray]) -> List[Detections]:
        found = backend.run(images)
        frames = [frame_of(image, self.spec.input) for image in images]
        detections = []
        for i, frame in enumerate(frames):
            count = found.num_detections[i]
            labels = [self.spec.labels[column] for column in found.classes[i, :count]]
            detections.append(
                Detections(
                    boxes=boxes_to_pixels(found.boxes[i, :count], frame, self.spec.nms),
                    scores=found.scores[i, :count],
                    class_ids=np.array([label.id for label in labels], np.int64),
                    names=tuple(label.name for label in labels),
                )
            )
        return detections


def _check_choices(backend: str, plugin: Union[str, Path, None], precision: Optional[str]) -> None:
    if backend not in BACKENDS:
        raise InputError(f"backend {backend!r} is unknown; expected one of: {', '.join(BACKENDS)}")
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if plugin is not None and not Path(plugin).is_file():
        raise InputError(f"{plugin}: not found; {BUILD_PLUGIN}")


def _read_contract(folder: Path) -> Tuple[DetectorSpec, np.ndarray]:
    files = sealed(folder, "spec.json", "anchors.npy")
    spec = load_spec(folder / "spec.json", files["spec.json"])
    return spec, load_anchors(folder / "anchors.npy", spec, files["anchors.npy"])


def _is_contract_of(folder: Path, spec: DetectorSpec, anchors: np.ndarray) -> bool:
    """Whether the folder still contains the model from which these were read."""
    try:
        found = _read_contract(folder)
    except InputError:
        return False
    return found[0] == spec and np.array_equal(found[1], anchors)


def _open_onnxruntime(
    folder: Path, precision: Optional[str], threads: Optional[int]
) -> Tuple[DetectorSpec, np.ndarray, Backend]:
    """Opens ONNX Runtime, with all files from one model: another process may replace it in the meantime."""
    model = Variant(precision or "fp32", "heads").file
    files = sealed(folder, "spec.json", "anchors.npy", model)
    spec = load_spec(folder / "spec.json", files["spec.json"])
    anchors = load_anchors(folder / "anchors.npy", spec, files["anchors.npy"])
    return spec, anchors, _run_by_onnxruntime(folder / model, spec, anchors, files[model], threads)


def _open_onnxruntime_instead(
    folder: Path, precision: Optional[str], threads: Optional[int], reasons: Sequence[str]
) -> Tuple[DetectorSpec, np.ndarray, Backend]:
    """Opens ONNX Runtime because no plan can be used. reasons: why not, for the error if this fails too."""
    try:
        return _open_onnxruntime(folder, precision, threads)
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error}; {'; '.join(reasons)}") from error


def _run_by_onnxruntime(
    path: Path, spec: DetectorSpec, anchors: np.ndarray, model: bytes, threads: Optional[int]
) -> Backend:
    try:
        session = onnx_model.session(model, threads=threads)
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error}, or choose another backend") from error
    except Exception as error:
        raise InputError(
            f"{path}: ONNX Runtime cannot read it ({_first_line(error)}); run `odtrt convert` again"
        ) from error
    import onnxruntime

    tensors = heads_tensors(spec)
    _check_tensors(path, "inputs", session.get_inputs(), tensors.inputs)
    _check_tensors(path, "outputs", session.get_outputs(), tensors.outputs)
    outputs = [tensor.name for tensor in tensors.outputs]

    def infer(images: np.ndarray) -> Heads:
        box_encodings, class_logits = session.run(outputs, {spec.input.name: images})
        return box_encodings, class_logits

    said = f"ONNX Runtime {onnxruntime.__version__} on the CPU"
    backend = host_backend("onnxruntime", infer, spec, anchors, said)
    black = np.zeros(tensors.inputs[0].with_batch(spec.input.batch or 1), np.float32)
    layers = functools.partial(onnx_model.layer_times, model, {spec.input.name: black})
    return dataclasses.replace(backend, layers=layers)


def _check_tensors(path: Path, kind: str, found: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Compares ONNX Runtime's inputs or outputs with the spec. In ``found``, a dynamic dimension is a name or
    None."""
    again = "as spec.json says; run `odtrt convert` again"
    names, expected = [tensor.name for tensor in found], {tensor.name: tensor.shape for tensor in tensors}
    if sorted(names) != sorted(expected):
        raise InputError(f"{path}: {kind} {', '.join(names)}, expected {', '.join(expected)} {again}")
    for tensor in found:
        shape = expected[tensor.name]
        fixed = [size if isinstance(size, int) else None for size in tensor.shape]
        agrees = len(fixed) == len(shape) and all(
            one == other or (one is None and kind == "outputs") for one, other in zip(fixed, shape)
        )
        if tensor.type != "tensor(float)" or not agrees:
            raise InputError(
                f"{path}: {tensor.name} is {tensor.type} {_shape_text(fixed)}, "
                f"expected tensor(float) {_shape_text(shape)} {again}"
            )


def _shape_text(shape: Sequence[Optional[int]]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _closed_error() -> InputError:
    return InputError("this detector is closed; open the folder again")


def _refuse_when_closed(images: Any) -> NoReturn:
    raise _closed_error()


_CLOSED = Backend("closed", _refuse_when_closed, _refuse_when_closed)


# ---- The worker thread, and other processes ---------------------------------------------------------------

_this_thread = threading.local()
_detectors: MutableSet[Detector] = weakref.WeakSet()


def _mark_worker() -> None:
    _this_thread.is_worker = True


def _in_worker() -> bool:
    """Whether this thread works for a detector: this one, or another one that may wait for this one."""
    return getattr(_this_thread, "is_worker", False)


def _take_place(serving: _Serving) -> threading.Semaphore:
    """Reserves one of the places for unfinished calls; returns the semaphore to release. Outside of workers
    it waits for a free place."""
    if not _in_worker():
        serving.free_places.acquire()
        return serving.free_places
    for places in (serving.free_places, serving.extra_places):
        if places.acquire(blocking=False):
            return places
    raise InputError(
        f"{2 * MOST_WAITING} results are unfinished, and submit() cannot wait for them in a callback; "
        "submit fewer there"
    )


def _part_from_parent() -> None:
    """In a child after ``fork``: no detector of the parent's works, is released, or waits for a lost thread.

    ONNX Runtime waits for its threads when it is released, and CUDA does not survive a fork. So the child
    keeps what the parent opened for ever: its count of references never falls to zero.
    """
    _this_thread.is_worker = False
    for detector in list(_detectors):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(detector.backend))
        owner = detector._serving.process
        refuse = functools.partial(_refuse_after_fork, owner)
        detector.backend = Backend("of another process", refuse, refuse)
        detector._serving = _Serving(owner)


def _refuse_after_fork(owner: int, images: Any) -> NoReturn:
    raise InputError(
        f"this detector was opened by another process ({owner}) and does not work after a fork: open it in "
        'this one, or let multiprocessing "spawn" its processes'
    )


os.register_at_fork(after_in_child=_part_from_parent)


# ---- Plans ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The plans that a caller accepts."""

    folder: Path
    here: Environment
    plugin: Union[str, Path, None]
    precision: Optional[str]
    switches: Optional[Switches]


@dataclasses.dataclass(frozen=True)
class _Found:
    """backend: of the best plan that could be loaded. reasons: why no better one. stale: what to rebuild."""

    backend: Optional[Backend]
    reasons: Tuple[str, ...]
    stale: Optional[Passport]


def _here(backend: str, plugin: Union[str, Path, None]) -> Optional[Environment]:
    """This machine with the TensorRT that ``backend`` means; None if ``auto`` finds no GPU.

    TensorRT is imported only if there is one.
    """
    from odtrt_lib import portability
    from odtrt_lib.engine.bindings import import_library

    if this_machine().gpu is None:
        if backend == "auto":
            return None
        raise MissingDependencyError(
            f'backend {backend!r} needs an NVIDIA GPU and its driver, none was found; use "onnxruntime"'
        )
    here = portability.this_environment(plugin)
    if backend in ("auto", here.runtime_library):
        return here
    version = import_library(backend).__version__
    return dataclasses.replace(here, runtime_library=backend, version=version)


def _open_best_plan(
    wanted: _Wanted, spec: DetectorSpec, anchors: np.ndarray, *, of_any_kind: bool = True
) -> _Found:
    """Loads the newest plan that may be used. Its kind is its model and precision: the newest plan's kind is
    preferred, and without ``of_any_kind`` nothing else will do.

    A plan is stale if no plan of its kind may be used: a folder can hold plans for several machines, and
    those of the others are no reason to rebuild.
    """
    from odtrt_lib.engine.passport import passports, survey

    if wanted.here.runtime_library is None:
        reason = "there is a GPU, but neither tensorrt nor tensorrt_rtx can be imported"
        return _Found(None, (reason,), None)
    for _ in range(3):
        present, damaged = survey(wanted.folder)
        found = _open_best_of(present, tuple(damaged.values()), wanted, spec, anchors, of_any_kind)
        if found.stale is None or passports(wanted.folder) == present:
            break  # else a plan was replaced meanwhile
    return found


def _open_best_of(
    passports: Sequence[Passport],
    reasons: Tuple[str, ...],
    wanted: _Wanted,
    spec: DetectorSpec,
    anchors: np.ndarray,
    of_any_kind: bool,
) -> _Found:
    from odtrt_lib.portability import Action, check

    in_question = [one for one in passports if _comes_into_question(one, wanted)]
    if not in_question:
        return _Found(None, (*reasons, f"{wanted.folder} has no plan for it: run `odtrt build`"), None)
    if wanted.plugin is not None:
        in_question.sort(key=lambda one: form_of(one.model) != "plugin")
    best_kind = [one for one in in_question if _kind(one) == _kind(in_question[0])]
    others = [one for one in in_question if one not in best_kind] if of_any_kind else []
    stale: List[Passport] = []
    is_stale = True
    for one in (*best_kind, *others):
        verdict = check(wanted.folder, one, wanted.here)
        if verdict.action is not Action.OK:
            reasons += (f"plan {one.fingerprint}: {', '.join(verdict.reasons)}",)
            if verdict.rebuild_helps and one in best_kind:
                stale.append(one)
            continue
        is_stale = is_stale and one not in best_kind
        try:
            backend = _open_plan(wanted, one, spec, anchors)
        except OdtrtError as error:
            reasons += (str(error),)
            warnings.warn(f"a plan that may be used here cannot be: {error}", RuntimeWarning, stacklevel=4)
            continue
        if one in best_kind:
            return _Found(backend, (), None)
        return _Found(backend, reasons, stale[0] if stale and is_stale else None)
    return _Found(None, reasons, stale[0] if stale and is_stale else None)


def _comes_into_question(one: Passport, wanted: _Wanted) -> bool:
    if wanted.precision is not None and one.precision != wanted.precision:
        return False
    form = form_of(one.model)
    return form == "heads" or (form == "plugin" and wanted.plugin is not None)


def _kind(one: Passport) -> Tuple[str, str]:
    return one.model, one.precision


def _open_plan(wanted: _Wanted, one: Passport, spec: DetectorSpec, anchors: np.ndarray) -> Backend:
    from odtrt_lib.engine import pipeline

    plan = pipeline.load(wanted.folder, one, spec, anchors, plugin=wanted.plugin, switches=wanted.switches)
    return Backend(
        one.runtime_library,
        plan.run,
        plan.infer,
        plan.close,
        f"{RUNTIME_LIBRARIES[one.runtime_library]} {wanted.here.version}, plan {one.fingerprint}, "
        f"{one.precision}, post-processing {plan.postprocessing}",
        one.fingerprint,
        lambda: plan.notes,
        plan.layer_times,
    )


def _start_rebuild(wanted: _Wanted, stale: Passport) -> bool:
    """Starts a rebuild. Returns False if another process rebuilds, or if it failed before or cannot start."""
    from odtrt_lib import portability

    return portability.start_rebuild(wanted.folder, stale, plugin=wanted.plugin) is not None


def _watch_rebuild(detector: Detector, wanted: _Wanted, stale: Passport, is_started: bool) -> None:
    """Starts the thread that lets the rebuilt plan take over. It does not keep the detector alive."""
    serving = detector._serving
    serving.rebuild = "running"
    serving.watcher = threading.Thread(
        target=_await_rebuild,
        args=(weakref.ref(detector), serving, wanted, stale, is_started),
        name="odtrt-rebuild",
        daemon=True,
    )
    serving.watcher.start()
    # TensorRT must not be at work in a thread while the interpreter and CUDA go down around it.
    stop = functools.partial(_stop_watching, serving)
    atexit.register(stop)
    weakref.finalize(detector, atexit.unregister, stop).atexit = False


def _stop_watching(serving: _Serving) -> None:
    if serving.process != os.getpid():
        return
    serving.stop.set()
    if serving.watcher is not None:
        serving.watcher.join()


def _await_rebuild(
    detector_alive: Callable[[], Optional[Detector]],
    serving: _Serving,
    wanted: _Wanted,
    stale: Passport,
    is_started: bool,
) -> None:
    from odtrt_lib import portability

    while not serving.stop.wait(_POLL_SECONDS) and detector_alive() is not None:
        state = portability.rebuild_status(wanted.folder)
        with serving.lock:
            serving.progress, serving.message = state.progress, state.message
        if state.state == "running":
            continue
        try:
            problem = _take_over(detector_alive(), wanted)
        except Exception as error:  # nobody would see it leave this thread
            problem = f"{type(error).__name__}: {one_line(error)}"
        if problem is None:
            return
        if not is_started and _start_rebuild(wanted, stale):  # what ended was the rebuild of another plan
            is_started = True
            continue
        with serving.lock:
            serving.rebuild, serving.progress = "failed", None
            serving.message = f"{state.message or 'no rebuild could be started'}; {problem}"
        warnings.warn(
            f"{wanted.folder}: the plan was not rebuilt, the detector goes on as it is: {serving.message}",
            RuntimeWarning,
            stacklevel=2,
        )
        return


def _take_over(detector: Optional[Detector], wanted: _Wanted) -> Optional[str]:
    """Loads the plan that a rebuild left behind, beside the one that serves, and exchanges them.

    Returns why there is none.
    """
    if detector is None:
        return None
    found = _open_best_plan(wanted, detector.spec, detector.anchors, of_any_kind=False)
    if found.backend is None:
        return "; ".join(found.reasons)
    if not _is_contract_of(wanted.folder, detector.spec, detector.anchors):
        found.backend.close()
        return "the folder holds another model now: open it again"
    serving = detector._serving
    with serving.lock:
        if not serving.stop.is_set():
            detector.backend = found.backend  # whoever is using the old one still holds it
            serving.rebuild, serving.progress, serving.reasons = "done", None, ()
            return None
    found.backend.close()
    return None
