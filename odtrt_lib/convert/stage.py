"""Chapter 2: ``frozen.pb`` -> ``heads.onnx``, with proof that the two compute the same.

tf2onnx translates the operations, and :mod:`odtrt_lib.convert.rewrite` changes the result into a graph that
TensorRT runs well. Neither is trusted: :func:`convert` compares every Resize of the two graphs
(:func:`odtrt_lib.convert.resizes.audit_resizes`) and runs both graphs on the same images
(:func:`check_parity`). It writes ``heads.onnx`` only if they agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odtrt_lib import folder as folders
from odtrt_lib import onnx_model
from odtrt_lib.convert.resizes import audit_resizes, refuse_unconvertible, require_agreement
from odtrt_lib.convert.rewrite import INPUT, OUTPUTS, serialize, to_onnx
from odtrt_lib.errors import CheckError, InputError, UnsupportedError
from odtrt_lib.export import noise, odapi
from odtrt_lib.spec import DetectorSpec, load_spec
from odtrt_lib.tensors import heads_tensors

if TYPE_CHECKING:
    pass

OPSETS = (15, 16, 17, 18)
"""The ONNX opsets offered: what tf2onnx 1.17 writes and TensorRT 8.5 to 11 and TensorRT-RTX read."""

_VERSIONED = ("tensorflow", "tf2onnx", "onnx", "onnxruntime")
_DISTRIBUTIONS = {
    "tensorflow": ("tensorflow-cpu", "tensorflow"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}


@dataclasses.dataclass(frozen=True)
class HeadParity:
    """The distance of one output of ``heads.onnx`` from ``frozen.pb`` in float64, for the worst image.

    The relative figures are in units of the output's scale for that image: its standard deviation, or a
    thousandth of its largest magnitude if that is more (as for a head that is constant except for its bias).
    ``noise_max_relative`` and ``noise_rms_relative`` are those of TensorFlow in float32. ``times_noise`` is
    the largest quotient, see :func:`odtrt_lib.export.noise.compare`. ``std`` is the standard deviation over
    all images.
    """

    max_abs_err: float
    max_relative_err: float
    rms_relative_err: float
    noise_max_relative: float
    noise_rms_relative: float
    times_noise: float
    std: float


@dataclasses.dataclass(frozen=True)
class Parity:
    """What :func:`check_parity` measured, its limit, and how small an error it would reveal.

    ``sees_kernel_change`` and ``is_decisive`` are those of :class:`odtrt_lib.export.noise.Yardstick`. If the
    second is false, rounding hides the errors that this check should find.
    """

    box_encodings: HeadParity
    class_logits: HeadParity
    images: int
    max_times_noise: float
    sees_kernel_change: float
    is_decisive: bool


def convert(folder: str | Path, *, opset: int = 17, force: bool = False) -> folders.StageResult:
    """Writes ``folder/heads.onnx`` from ``folder/frozen.pb`` and proves that they agree.

    The input of ``heads.onnx`` is ``image``, float32 ``[batch, 3, height, width]``; its outputs are
    ``box_encodings`` and ``class_logits`` as in ``spec.SsdHeads``. A batch that is dynamic in
    ``frozen.pb`` stays dynamic. The same ``frozen.pb``, opset and versions give the same bytes.

    opset: one of :data:`OPSETS`. force: convert even if ``heads.onnx`` is up to date.

    Raises UnsupportedError for another opset and for operations that cannot be converted exactly; InputError
    for a missing or damaged input, or one that does not match ``spec.json``; CheckError if the Resize audit,
    the ONNX checker or the parity check fails. Nothing is written then.
    """
    if opset not in OPSETS:
        raise UnsupportedError(
            f"opset {opset} is not offered; choose one of {', '.join(map(str, OPSETS))} "
            "(17 is read by TensorRT 8.5 and later)"
        )
    folder = Path(folder)
    frozen_path = folders.require(folder, "frozen.pb", "export")
    files = folders.sealed(folder, "frozen.pb", "spec.json")
    spec = load_spec(folder / "spec.json", files["spec.json"])
    inputs = folders.made_from("heads.onnx", files)
    stage = folders.Stage(folder, "convert", inputs, {"opset": opset})
    record = stage.finished(force)
    if record is not None:
        return folders.StageResult(record, is_up_to_date=True)

    frozen = load_frozen(frozen_path, files["frozen.pb"])
    refuse_unconvertible(frozen_path, frozen)
    with folders.staging(folder) as staged:
        model = to_onnx(frozen, opset)
        findings = audit_resizes(frozen, model)
        require_agreement(folder / "heads.onnx", findings)
        path = staged / "heads.onnx"
        path.write_bytes(serialize(model))
        onnx_model.require_valid(folder / "heads.onnx", path)
        parity = _compare(frozen, path, spec, images=4)
        _require_parity(folder / "heads.onnx", parity)
        operations = Counter(node.op_type for node in model.graph.node)
        record = stage.record(
            staged,
            outputs=["heads.onnx"],
            versions={name: _version(name) for name in _VERSIONED},
            checks={
                "opset": model.opset_import[0].version,
                "ir_version": model.ir_version,
                "nodes": sum(operations.values()),
                "transposes": operations["Transpose"],
                "batch_norms": operations["BatchNormalization"],
                "resizes": [dataclasses.asdict(finding) for finding in findings],
                "resizes_agree": all(finding.agrees for finding in findings),
                "onnx_checker": "full check passed",
                "parity": dataclasses.asdict(parity),
            },
        )
    return folders.StageResult(record, is_up_to_date=False)


def check_parity(folder: str | Path, *, images: int = 4) -> Parity:
    """Runs ``frozen.pb`` (TensorFlow) and ``heads.onnx`` (ONNX Runtime, CPU) on the same images.

    images: how many. In turn they are noise and a checkerboard with the contrast of a photograph (mid-grey +-
        64), crossed gradients with an edge over the full range, and darkness, in the network's units
        (``InputSpec.scale`` and ``offset``). Each has a little grain: if a picture repeats one value, the
        float32 sums of squeeze-and-excitation drift up to 30 times as far as they round otherwise, and this
        would hide errors. A network with a dynamic batch gets one image, then the rest as one batch.

    The truth is ``frozen.pb`` in float64. A head may be :data:`odtrt_lib.export.noise.FACTOR` = 5 times as
    far from it as TensorFlow's float32 is. This holds for each image and each group of anchors, for the root
    mean square and for the maximum. The limit cannot be zero. float32 has a unit roundoff u = 2^-24 = 6e-8.
    Two correct programs that add the n products of a convolution in another order differ by about u *
    sqrt(n), and every layer after it multiplies this by its own gain. The error of the outputs depends on the
    weights and the image: 1e-6 of the scale in the root mean square (the shipped detector), 2e-5 (FPNLite and
    EfficientDet-D0, synthetic weights), 1e-4 (D1). ``results/noise.cpu.json`` has the distances of ONNX
    Runtime and of graphs with seeded defects. A network with untrained weights can be chaotic: its outputs
    move by 0.2 of the scale for one unit in the input's last place. Then nothing can be proved, and
    ``is_decisive`` is false.

    Raises CheckError if a head differs by more, InputError if a file is missing, damaged or does not match
    ``spec.json``.
    """
    folder = Path(folder)
    spec = load_spec(folders.require(folder, "spec.json", "export"))
    frozen = load_frozen(folders.require(folder, "frozen.pb", "export"))
    path = folders.require(folder, "heads.onnx", "convert")
    parity = _compare(frozen, path, spec, images)
    _require_parity(path, parity)
    return parity


def load_frozen(path: str | Path, content: bytes | None = None) -> Any:
    """The ``GraphDef`` in ``path``; InputError if it is damaged or lacks the nodes that export writes.

    content: the bytes of the file, if they have been read already.
    """
    tf = odapi.tensorflow()
    from google.protobuf.message import DecodeError

    graph_def = tf.compat.v1.GraphDef()
    try:
        graph_def.ParseFromString(Path(path).read_bytes() if content is None else content)
    except DecodeError as error:
        raise InputError(f"{path}: not a TensorFlow GraphDef ({error}); run `odtrt export` again") from error
    missing = {INPUT, *OUTPUTS} - {node.name for node in graph_def.node}
    if missing:
        raise InputError(
            f"{path}: has no node {', '.join(sorted(missing))}; expected the graph that `odtrt export` writes"
        )
    return graph_def


def _compare(frozen: Any, onnx_path: Path, spec: DetectorSpec, images: int) -> Parity:
    if images < 1:
        raise InputError(f"images is {images}, expected at least 1")
    pictures = _test_images(spec, images)
    yardstick = noise.measure(frozen, pictures, spec.input.batch)
    candidate = _run_onnx(onnx_path, noise.batches(pictures.transpose(0, 3, 1, 2), spec.input.batch), images)
    for name, tensor in zip(OUTPUTS, heads_tensors(spec).outputs, strict=True):
        expected = tensor.shape[1:]
        for side, outputs in (("frozen.pb", yardstick.exact), ("heads.onnx", candidate)):
            if outputs[name].shape[1:] != expected:
                raise InputError(
                    f"{onnx_path.name}: {name} in {side} is {list(outputs[name].shape)}, spec.json says "
                    f"[batch, {', '.join(map(str, expected))}]; run `odtrt export` again"
                )
    distances = noise.compare(yardstick, candidate)

    def head_parity(name: str) -> HeadParity:
        distance = distances[name]
        return HeadParity(
            max_abs_err=float(np.abs(candidate[name] - yardstick.exact[name]).max()),
            max_relative_err=distance.max_relative,
            rms_relative_err=distance.rms_relative,
            noise_max_relative=distance.noise_max_relative,
            noise_rms_relative=distance.noise_rms_relative,
            times_noise=distance.times_noise,
            std=float(yardstick.exact[name].std()),
        )

    return Parity(
        box_encodings=head_parity("box_encodings"),
        class_logits=head_parity("class_logits"),
        images=images,
        max_times_noise=noise.FACTOR,
        sees_kernel_change=yardstick.sees_kernel_change,
        is_decisive=yardstick.is_decisive,
    )


def _require_parity(path: Path, parity: Parity) -> None:
    for name in OUTPUTS:
        head: HeadParity = getattr(parity, name)
        if not head.times_noise <= parity.max_times_noise:
            raise CheckError(
                f"{path}: {name} differs from frozen.pb's by up to {head.max_relative_err:.3g} of its scale "
                f"and {head.rms_relative_err:.3g} rms, {head.times_noise:.3g} times the noise of float32 "
                f"(expected at most {parity.max_times_noise:g} times; TensorFlow's own is "
                f"{head.noise_max_relative:.3g} and {head.noise_rms_relative:.3g} rms): this is not "
                "rounding, the two graphs differ"
            )


def _test_images(spec: DetectorSpec, count: int) -> np.ndarray:
    """``[count, height, width, 3]`` float32 network inputs; see :func:`check_parity`."""
    height, width = spec.input.height, spec.input.width
    generator = np.random.default_rng(20)
    row, column = np.mgrid[:height, :width].astype(np.float64)
    edge = column > width * 0.6
    gradients = np.stack([255 * row / height, 255 * column / width, 255.0 * edge], axis=-1)
    pictures = []
    for i in range(count):
        square = max(2, 32 >> (i // 4))
        board = 63.5 + 128 * ((row // square + column // square) % 2)
        picture, grain = (
            (np.full((height, width, 3), 127.5), 64),
            (np.roll(gradients, i // 4, axis=-1), 8),
            (np.repeat(board[..., None], 3, axis=-1), 8),
            (np.full((height, width, 3), 8.0), 8),
        )[i % 4]
        pictures.append(picture + generator.uniform(-grain, grain, picture.shape))
    return (np.stack(pictures) * spec.input.scale + spec.input.offset).astype(np.float32)


def _run_onnx(path: Path, batches: list[np.ndarray], images: int) -> dict[str, np.ndarray]:
    session = onnx_model.session(str(path))
    results = [session.run(list(OUTPUTS), {INPUT: np.ascontiguousarray(batch)}) for batch in batches]
    return {
        name: np.concatenate(parts)[:images]
        for name, parts in zip(OUTPUTS, zip(*results, strict=True), strict=True)
    }


def _version(package: str) -> str:
    for distribution in _DISTRIBUTIONS.get(package, (package,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "unknown"
