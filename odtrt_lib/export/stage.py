"""Chapter 1: pipeline.config + checkpoint -> a frozen graph of the raw heads, the anchors, ``spec.json``.

The OD API's own exporter puts preprocessing, a loop over the batch and one NonMaxSuppression for each class
into the graph. TensorRT accepts none of them. So only ``predict`` is traced here, which is the network
itself, from the preprocessed image to box encodings and class logits. ``spec.json`` describes everything
else, so that the later stages can do it exactly as the OD API does.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import heapq
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from odtrt_lib.anchors import anchor_problem
from odtrt_lib.errors import CheckError, InputError, UnsupportedError, one_line
from odtrt_lib.export import noise, odapi
from odtrt_lib.export.gate import compare_with_odapi
from odtrt_lib.export.pipeline import PipelineSettings, read_pipeline
from odtrt_lib.folder import (
    Stage,
    StageResult,
    last_record,
    sealed,
    sha256,
    staging,
)
from odtrt_lib.spec import DetectorSpec, InputSpec, Source, SsdHeads, problems

OUTPUTS = ("frozen.pb", "anchors.npy", "spec.json")
_OF_THE_NETWORK = ("frozen.pb", "anchors.npy")
# The names of a record's checks start with one of these if they are not about the network.
_OF_THE_SPEC = ("label_map", "spec_vs_odapi_")

# Ops that a raw-heads graph must not contain: post-processing, loops, branches, dynamic lists.
_FORBIDDEN = re.compile(
    r"(.*NonMaxSuppression.*|(Stateless)?While|(Stateless)?If|Switch|Merge|Enter|Exit|LoopCond|"
    r"TensorArray.*|TensorList.*|.*PartitionedCall)"
)
_MAX_ANCHOR_ERROR = 1e-6

_LFS = b"version https://git-lfs"
_OTHER_FILES = {
    ".pb": "a frozen graph, which holds the network but not the model it was made from",
    ".meta": "a graph of TensorFlow 1",
    ".tflite": "a TensorFlow Lite model",
    ".onnx": "an ONNX model",
    ".h5": "a Keras model",
    ".keras": "a Keras model",
    ".tar.gz": "an archive: unpack it and name the folder",
    ".tgz": "an archive: unpack it and name the folder",
    ".zip": "an archive: unpack it and name the folder",
    ".tar": "an archive: unpack it and name the folder",
}


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """The places of a model's files.

    ``root`` is the model's name inside the checkpoint. ``choice`` says why this checkpoint was chosen.
    """

    pipeline: Path
    checkpoint: Path
    root: str
    choice: str


def find_model(source: str | Path, pipeline: str | Path | None = None) -> ModelFiles:
    """Finds a model's pipeline.config and checkpoint.

    source: an exported model (``pipeline.config`` with ``checkpoint/`` or only ``saved_model/``), one of its
        folders, a training directory (the checkpoint that its ``checkpoint`` file names; without this file,
        the highest ``ckpt-N``), a checkpoint itself (``.../ckpt-7`` or one of its files), or a
        ``pipeline.config`` beside one.
    pipeline: the config, if it does not lie beside the checkpoint or in a folder above it.

    Raises InputError if nothing is found (the message says what was looked for, and where), and if the
    ``checkpoint`` file names a checkpoint that is absent; UnsupportedError for a checkpoint of TensorFlow 1.
    """
    source = Path(source)
    if source.is_file() and source.suffix == ".config":
        pipeline, source = pipeline or source, source.parent
    elif source.is_file() and source.name in ("checkpoint", "saved_model.pb"):
        source = source.parent
    is_folder = source.is_dir()
    checkpoint, choice = _checkpoint_in(source) if is_folder else _named_checkpoint(source)
    root = "_model" if checkpoint.name == "variables" else "model"
    if pipeline is None:
        above = list(checkpoint.parents)[: 3 if root == "_model" else 2]
        pipeline = _config_near(source, [source, *above, source.parent] if is_folder else above)
    _check_checkpoint_files(checkpoint)
    return ModelFiles(Path(pipeline), checkpoint, root, choice)


def export(
    source: str | Path,
    folder: str | Path,
    *,
    pipeline: str | Path | None = None,
    label_map: str | Path | None = None,
    batch: int | None = 1,
    input_size: tuple[int, int] | None = None,
    force: bool = False,
) -> StageResult:
    """Writes ``frozen.pb``, ``anchors.npy`` and ``spec.json`` into ``folder``.

    frozen.pb: a TensorFlow GraphDef without variables. Input ``image``: float32
        ``[batch, height, width, 3]``, resized and normalised. Outputs ``box_encodings`` and
        ``class_logits``, see :class:`odtrt_lib.spec.SsdHeads`.
    anchors.npy: float32 ``[num_anchors, 4]``, (ycenter, xcenter, height, width), normalised.

    source, pipeline: see :func:`find_model`; label_map: see :func:`odtrt_lib.export.pipeline.read_pipeline`.
    batch: the fixed batch size, or None for a dynamic one.
    input_size: ``(height, width)`` of the network input if the config's resizer does not determine it
        (keep_aspect_ratio_resizer without padding).

    These checks are made, and recorded in ``log.jsonl``: every model variable was restored; the anchors that
    the config's generator makes are those that the model uses; no post-processing or control flow is left;
    the frozen graph computes what the eager model computes; with spec.json and anchors.npy, raw heads give
    the OD API's own detections (:func:`odtrt_lib.export.gate.compare_with_odapi`). If a check fails, raises
    InputError, UnsupportedError or CheckError, and leaves nothing half-written.

    If the config or the label map changed, but neither the checkpoint nor the config's settings of the
    network, ``frozen.pb`` and ``anchors.npy`` are kept. ``spec.json`` is made anew and compared with the OD
    API. The note and the check ``network_kept_from`` say so. force: make everything anew in any case.
    """
    folder = Path(folder)
    files = find_model(source, pipeline)
    odapi.regenerate_protos()
    settings = read_pipeline(files.pipeline, label_map)
    size = _network_size(settings, input_size)
    _check_batch(batch)
    inputs = {"pipeline.config": sha256(files.pipeline), "checkpoint": _checkpoint_sha256(files.checkpoint)}
    options = _options(files, settings, size, batch)
    note = f"checkpoint: {files.checkpoint} ({files.choice})"
    stage = Stage(folder, "export", inputs, options)
    record = stage.finished(force)
    if record is not None:
        return StageResult(record, True, note)

    versions = {"tensorflow": odapi.tensorflow().__version__, "odapi": odapi.version()}
    kept = None if force else _find_kept(folder, inputs, options, versions)
    network = None if kept is None else _keep_network(kept, settings, size)
    if network is None:
        kept, network = None, _make_network(files, settings, size, batch)
    spec = _spec(files, settings, network, inputs, folder.resolve().name, versions)
    checks = {**network.checks, **_check_spec(settings, spec, network)}
    if kept is not None:
        note = f"{note}; {' and '.join(_OF_THE_NETWORK)} kept: the network and its checkpoint are unchanged"
    with staging(folder) as out:
        _stage(folder, out, network, kept)
        (out / "spec.json").write_text(spec.to_json(), encoding="utf-8")
        record = stage.record(out, OUTPUTS, versions, checks)
    return StageResult(record, False, note)


def _check_batch(batch: int | None) -> None:
    if batch is not None and batch < 1:
        raise InputError(f"batch {batch}: expected at least 1, or none for a dynamic batch")


def _options(
    files: ModelFiles, settings: PipelineSettings, size: tuple[int, int], batch: int | None
) -> dict[str, Any]:
    names = json.dumps([label.name for label in settings.labels])
    return {
        "checkpoint": files.checkpoint.name,
        "batch": batch,
        "input_size": list(size),
        "labels_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "network_sha256": _network_sha256(settings),
    }


def _network_sha256(settings: PipelineSettings) -> str:
    """The SHA-256 of the config's settings of network and anchors: all of the model but its
    post-processing."""
    model = type(settings.message.model).FromString(settings.message.model.SerializeToString())
    model.ssd.ClearField("post_processing")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Network:
    """The OD API's model of a config, its frozen graph, and the results of the checks.

    predictions: the model's, for one network input. scale, offset: its normalisation.
    """

    model: Any
    predictions: dict[str, Any]
    graph: Any
    batch: int | None
    size: tuple[int, int]
    anchors: np.ndarray
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]
    checks: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """An earlier export of the same network: its record, and the bytes of :data:`_OF_THE_NETWORK`."""

    record: dict[str, Any]
    files: dict[str, bytes]


def _make_network(
    files: ModelFiles, settings: PipelineSettings, size: tuple[int, int], batch: int | None
) -> _Network:
    tf = odapi.tensorflow()
    model = odapi.build_model(settings.path, settings.message)
    with odapi.call_errors(settings.path, settings.message, size):
        concrete = _trace(model, batch, size)
    num_variables = _restore(model, files, settings)
    scale, offset = _normalisation(model)
    images = _probe_images(size, scale, offset)
    predictions = [model.predict(tf.constant(image[np.newaxis]), None) for image in images]
    _require_finite_heads(files.checkpoint, predictions[0])
    anchors, anchor_error = _checked_anchors(settings, size, predictions[0])
    graph = _freeze(concrete)
    checks = {
        "variables_restored": num_variables,
        "graph_nodes": len(graph.node),
        "postprocessing_or_control_flow_ops": 0,
        "anchors": len(anchors),
        "anchors_from_config_max_abs_err": anchor_error,
        **_compare_with_eager(graph, images, predictions, batch),
    }
    return _Network(model, predictions[0], graph, batch, size, anchors, scale, offset, checks)


@dataclasses.dataclass(frozen=True)
class TrainableNetwork:
    """The OD API's model of a checkpoint, and its network as a graph.

    graph: the GraphDef of ``frozen.pb``, for any batch. variables: a constant of the graph -> the model's
    variable from which it was made. size: ``(height, width)`` of the network input. label_map: None if the
    model has none.
    """

    files: ModelFiles
    label_map: Path | None
    model: Any
    graph: Any
    variables: dict[str, Any]
    size: tuple[int, int]


def trainable_network(source: str | Path, spec: DetectorSpec) -> TrainableNetwork:
    """The network of the checkpoint ``source``, from which ``spec`` was exported.

    Raises InputError if that is another checkpoint, and what :func:`export` raises for a bad one.
    """
    files = find_model(source)
    settings = read_pipeline(files.pipeline)
    if _checkpoint_sha256(files.checkpoint) != spec.source.checkpoint_sha256:
        raise InputError(
            f"{files.checkpoint}: not the checkpoint of the model folder, which was made from another "
            f"{spec.source.checkpoint!r}; name that one, or run `odtrt export` again"
        )
    size = (spec.input.height, spec.input.width)
    model = odapi.build_model(settings.path, settings.message)
    with odapi.call_errors(settings.path, settings.message, size):
        concrete = _trace(model, None, size)
    _restore(model, files, settings)
    by_handle = {id(variable.handle): variable for variable in concrete.variables}
    variables = {
        placeholder.op.name: by_handle[id(handle)]
        for handle, placeholder in concrete.graph.captures
        if id(handle) in by_handle
    }
    return TrainableNetwork(files, settings.label_map, model, _freeze(concrete), variables, size)


def _find_kept(
    folder: Path, inputs: dict[str, str], options: dict[str, Any], versions: dict[str, str]
) -> _Kept | None:
    """The last export into ``folder``, if it has the network asked for and its files are intact; or None."""
    record = last_record(folder, "export")
    same = ("batch", "input_size", "network_sha256")
    if (
        record is None
        or record["inputs"].get("checkpoint") != inputs["checkpoint"]
        or record["versions"] != versions
        or any(record["settings"].get(name, "unknown") != options[name] for name in same)
    ):
        return None
    try:
        files = sealed(folder, *_OF_THE_NETWORK)
    except InputError:
        return None
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return _Kept(record, files) if digests.items() <= record["outputs"].items() else None


def _keep_network(kept: _Kept, settings: PipelineSettings, size: tuple[int, int]) -> _Network | None:
    """The kept network, with the model of the new config. The model has no weights, because only its
    post-processing is used.

    None if that model has other anchors than the kept ones.
    """
    tf = odapi.tensorflow()
    model = odapi.build_model(settings.path, settings.message)
    with odapi.call_errors(settings.path, settings.message, size):
        predictions = model.predict(tf.zeros([1, *size, 3]), None)
    anchors, _ = _checked_anchors(settings, size, predictions)
    if _npy(anchors) != kept.files["anchors.npy"]:
        return None
    graph = tf.compat.v1.GraphDef.FromString(kept.files["frozen.pb"])
    found = kept.record["checks"]
    checks = {name: figure for name, figure in found.items() if not name.startswith(_OF_THE_SPEC)}
    checks.setdefault("network_kept_from", kept.record["time"])
    batch = kept.record["settings"]["batch"]
    return _Network(model, predictions, graph, batch, size, anchors, *_normalisation(model), checks)


def _stage(folder: Path, out: Path, network: _Network, kept: _Kept | None) -> None:
    """Puts the network's files into ``out``. Kept files become links, or copies if they have changed."""
    if kept is None:
        (out / "frozen.pb").write_bytes(network.graph.SerializeToString(deterministic=True))
        (out / "anchors.npy").write_bytes(_npy(network.anchors))
        return
    for name, content in kept.files.items():
        try:
            os.link(folder / name, out / name)
            is_kept = (out / name).read_bytes() == content
        except OSError:
            is_kept = False
        if not is_kept:
            (out / name).unlink(missing_ok=True)
            (out / name).write_bytes(content)


def _npy(anchors: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, anchors)
    return content.getvalue()


def _spec(
    files: ModelFiles,
    settings: PipelineSettings,
    network: _Network,
    inputs: dict[str, str],
    name: str,
    versions: dict[str, str],
) -> DetectorSpec:
    height, width = network.size
    return DetectorSpec(
        name=name,
        source=Source(
            pipeline_sha256=inputs["pipeline.config"],
            checkpoint=files.checkpoint.name,
            checkpoint_sha256=inputs["checkpoint"],
            feature_extractor=settings.feature_extractor,
            odapi_version=versions["odapi"],
            tensorflow_version=versions["tensorflow"],
        ),
        input=InputSpec(height, width, settings.resizer, network.scale, network.offset, network.batch),
        heads=SsdHeads(
            len(network.anchors),
            settings.num_classes,
            settings.background_column,
            settings.box_coder,
            settings.scores,
        ),
        nms=settings.nms,
        labels=settings.labels,
    )


def _check_spec(settings: PipelineSettings, spec: DetectorSpec, network: _Network) -> dict[str, Any]:
    _check_head_shapes(settings, spec, network.predictions)
    _check_values(settings, spec, network.anchors)
    agreement = compare_with_odapi(
        network.model, network.predictions, spec, network.anchors, network.graph, settings.label_map
    )
    return {
        "label_map": _label_map_read(settings),
        **{f"spec_vs_odapi_{name}": figure for name, figure in dataclasses.asdict(agreement).items()},
    }


def anchors_from_config(
    settings: PipelineSettings,
    size: tuple[int, int],
    feature_maps: list[tuple[int, int]] | None = None,
) -> np.ndarray:
    """The anchors that the config's generator makes for a network input of ``size`` (height, width).

    The OD API's generator computes them without the model. feature_maps: the sizes (height, width) of the
    model's feature maps; by default those of a network in which each level halves the sides, rounding up.
    Returns float32 ``[N, 4]``, (ycenter, xcenter, height, width), normalised.
    """
    tf = odapi.tensorflow()
    from object_detection.builders import anchor_generator_builder
    from object_detection.core import box_list_ops

    ssd = settings.message.model.ssd
    generator = anchor_generator_builder.build(ssd.anchor_generator)
    maps = feature_maps or _halving_maps(ssd, size)
    grid = generator.generate(maps, im_height=size[0], im_width=size[1])
    boxes = box_list_ops.concatenate(grid).get()
    return _centre_size(tf.convert_to_tensor(boxes).numpy())


def _label_map_read(settings: PipelineSettings) -> str:
    """The label map that was read, without the folders of this machine, in words; also if there was none."""
    found, folder = settings.label_map, settings.path.parent
    if found is None:
        return f"none: {settings.label_map_note}" if settings.label_map_note else "none"
    return str(found.relative_to(folder)) if folder in found.parents else found.name


def _config_near(source: Path, folders: list[Path]) -> Path:
    several: list[Path] = []
    for folder in folders:
        named = folder / "pipeline.config"
        if named.is_file():
            return named
        others = sorted(folder.glob("*.config"))
        if len(others) == 1:
            return others[0]
        several = several or others
    there = f" (there: {_listed([path.name for path in several])})" if several else ""
    raise InputError(f"{source}: no pipeline.config beside the checkpoint{there}; name it with --pipeline")


def _checkpoint_in(folder: Path) -> tuple[Path, str]:
    for candidate in (folder / "checkpoint", folder):
        found = _chosen_checkpoint(candidate)
        if found is not None:
            return found
    for variables in (folder / "saved_model" / "variables", folder / "variables"):
        if (variables / "variables.index").is_file():
            return variables / "variables", "that of the SavedModel"
    graph = folder / "frozen_inference_graph.pb"
    if graph.is_file():
        raise UnsupportedError(f"{graph}: with {odapi.TF1_ADVICE}")
    if (folder / "frozen.pb").is_file() and (folder / "spec.json").is_file():
        raise InputError(
            f"{folder}: a model folder that `odtrt export` wrote; expected the folder of the checkpoint: "
            f"run `odtrt convert {folder}` to go on with this one"
        )
    below = sorted(path.name for path in folder.glob("*/") if _looks_like_model(path))
    advice = f"; {below[0]} in it looks like one: name that folder" if len(below) == 1 else ""
    raise InputError(
        f"{folder}: no checkpoint found; expected checkpoint/ckpt-0.index, ckpt-N.index or "
        f"saved_model/variables/variables.index in it{advice}"
    )


def _looks_like_model(folder: Path) -> bool:
    places = (folder, folder / "checkpoint", folder / "saved_model" / "variables")
    return any(next(place.glob("*.index"), None) is not None for place in places)


def _chosen_checkpoint(folder: Path) -> tuple[Path, str] | None:
    """The checkpoint to use in ``folder``, and the reason; None if the folder has none."""
    present = sorted(path.name[: -len(".index")] for path in folder.glob("*.index"))
    if not present:
        return None
    state = folder / "checkpoint"
    if state.is_file():
        return _followed(state, present), f"the one that {state} names"
    numbered = sorted((int(name[5:]), name) for name in present if re.fullmatch(r"ckpt-\d+", name))
    if len(numbered) > 1:
        why = f"the highest number of {len(numbered)}, as {folder} has no file named checkpoint"
        return folder / numbered[-1][1], why
    if numbered or len(present) == 1:
        return folder / (numbered[0][1] if numbered else present[0]), f"the only one in {folder}"
    raise InputError(
        f"{folder}: several checkpoints ({_listed(present)}) and no file named checkpoint that says which; "
        f"name one: {folder / present[-1]}"
    )


def _followed(state: Path, present: list[str]) -> Path:
    """The checkpoint that TensorFlow's ``checkpoint`` file names: at that path, otherwise the one of that
    name beside the file.

    Nothing outside of the file's own folder is used: a path of another machine means that the files were
    copied.
    """
    named = _read_state(state)
    folder = state.parent
    inside = Path(os.path.normpath(folder / named))
    if inside.is_relative_to(os.path.normpath(folder)) and Path(f"{inside}.index").is_file():
        return inside
    name = re.split(r"[\\/]", named)[-1]
    if name in present:
        return folder / name
    raise InputError(
        f"{state}: names {named or 'no checkpoint'!r}, which is not in {folder} (there: {_listed(present)}); "
        f"copy it, or name the one to take: {folder / present[-1]}"
    )


def _read_state(state: Path) -> str:
    """``model_checkpoint_path`` of a text-format ``CheckpointState`` (tensorflow/python/training)."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    file = descriptor_pb2.FileDescriptorProto(name="state.proto", package="odtrt", syntax="proto2")
    field = descriptor_pb2.FieldDescriptorProto
    file.message_type.add(name="State").field.add(
        name="model_checkpoint_path", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("odtrt.State"))()
    advice = "delete it to take the highest ckpt-N, or name a checkpoint itself"
    try:
        content = state.read_bytes()
        if content.startswith(_LFS):
            raise InputError(f"{state}: a Git LFS pointer; run `git lfs pull` where it was cloned")
        text_format.Parse(content.decode("utf-8"), message, allow_unknown_field=True)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise InputError(
            f"{state}: not a readable CheckpointState ({one_line(error)[:200]}); {advice}"
        ) from error
    return str(message.model_checkpoint_path)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _named_checkpoint(source: Path) -> tuple[Path, str]:
    checkpoint = Path(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", str(source)))
    if Path(f"{checkpoint}.index").is_file():
        return checkpoint, "the one that was named"
    expected = "expected a model's folder or a checkpoint such as model/checkpoint/ckpt-0"
    if not source.is_file():
        beside = sorted(path.name[: -len(".index")] for path in source.parent.glob("*.index"))
        advice = f" (in {source.parent}: {_listed(beside)})" if beside else ""
        raise InputError(f"{source}: not found; {expected}{advice}")
    kind = next((kind for ending, kind in _OTHER_FILES.items() if source.name.endswith(ending)), "")
    raise InputError(f"{source}: {kind or 'a file, but not a checkpoint'}; {expected}")


def _checkpoint_files(checkpoint: Path) -> list[Path]:
    shards = sorted(checkpoint.parent.glob(f"{glob.escape(checkpoint.name)}.data-*-of-*"))
    return [Path(f"{checkpoint}.index"), *shards]


def _check_checkpoint_files(checkpoint: Path) -> None:
    index, *shards = _checkpoint_files(checkpoint)
    for path in (index, *shards):
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            raise InputError(f"{path}: empty (0 bytes); expected checkpoint data: copy the file again")
        if head.startswith(_LFS):
            raise InputError(
                f"{path}: a Git LFS pointer, not the checkpoint; run `git lfs pull` where it was cloned"
            )
    is_tensorflow_1 = odapi.OBJECT_GRAPH.encode() not in index.read_bytes()
    if is_tensorflow_1 and Path(f"{checkpoint}.meta").is_file():
        raise UnsupportedError(f"{checkpoint}: {odapi.TF1_ADVICE}")
    expected = int(shards[0].name.rsplit("-of-", 1)[1]) if shards else 1
    if len(shards) != expected:
        raise InputError(
            f"{checkpoint}.data-*: {len(shards)} of {expected} files found; copy the whole checkpoint "
            "(.index and every .data-* file)"
        )


def _checkpoint_sha256(checkpoint: Path) -> str:
    return hashlib.sha256("".join(map(sha256, _checkpoint_files(checkpoint))).encode()).hexdigest()


def _network_size(settings: PipelineSettings, asked: tuple[int, int] | None) -> tuple[int, int]:
    fixed = settings.input_size
    if fixed is not None and asked is not None and tuple(asked) != fixed:
        raise InputError(
            f"{settings.path}: the resizer gives {fixed[0]}x{fixed[1]} (height x width), "
            f"--input-size asks for {asked[0]}x{asked[1]}; leave it out, or change the config"
        )
    size = fixed or asked
    if size is None:
        raise UnsupportedError(
            f"{settings.path}: keep_aspect_ratio_resizer without pad_to_max_dimension gives every aspect "
            "ratio its own network size, an engine has one; name the one of your camera with --input-size"
        )
    return (int(size[0]), int(size[1]))


def _trace(model: Any, batch: int | None, size: tuple[int, int]) -> Any:
    import tensorflow as tf

    # The OD API builds its graphs without AutoGraph, too. AutoGraph would double the time.
    signature = [tf.TensorSpec([batch, *size, 3], tf.float32, name="image")]

    @tf.function(input_signature=signature, autograph=False)
    def heads(image: Any) -> dict[str, Any]:
        predictions = model.predict(image, None)
        return {
            "box_encodings": predictions["box_encodings"],
            "class_logits": predictions["class_predictions_with_background"],
        }

    return heads.get_concrete_function()


def _restore(model: Any, files: ModelFiles, settings: PipelineSettings) -> int:
    """Restores the model's variables and checks that all are finite; returns their number."""
    variables = list({id(v): v for v in _variables(model)}.values())
    status = odapi.restore(model, files.checkpoint, settings.path, settings.message, files.root)
    status.expect_partial()
    try:
        status.assert_existing_objects_matched()
    except AssertionError as error:
        names = re.findall(r"Variable '?path=([^,]+),|Variable '([^']+)'", str(error))
        listed = ", ".join([a or b for a, b in names][:3]) or one_line(error)[:200]
        raise InputError(
            f"{files.checkpoint} does not fit {settings.path}: the checkpoint lacks {listed}, ...; "
            f"{odapi.FITTING_CONFIG}"
        ) from error
    _require_finite(files.checkpoint, variables)
    return len(variables)


def _require_finite(checkpoint: Path, variables: list[Any]) -> None:
    broken = []
    for variable in variables:
        values = variable.numpy()
        count = int(np.count_nonzero(~np.isfinite(values))) if values.dtype.kind == "f" else 0
        if count:
            broken.append(f"{variable.name} ({count} of {values.size} values)")
    if broken:
        raise InputError(
            f"{checkpoint}: {len(broken)} of {len(variables)} variables hold NaN or infinity, the first is "
            f"{broken[0]}; the training diverged: take an earlier checkpoint, or train with a lower learning "
            "rate"
        )


def _require_finite_heads(checkpoint: Path, eager: dict[str, Any]) -> None:
    for name in ("box_encodings", "class_predictions_with_background"):
        values = eager[name].numpy()
        count = int(np.count_nonzero(~np.isfinite(values)))
        if count:
            raise InputError(
                f"{checkpoint}: for a smooth image TensorFlow itself computes NaN or infinity in {count} of "
                f"{values.size} values of {name}, though every variable is finite: the weights are too "
                "large; take an earlier checkpoint"
            )


def _variables(model: Any) -> list[Any]:
    import tensorflow as tf

    return [
        leaf
        for child in (model.feature_extractor, model._box_predictor)
        for leaf in tf.Module.variables.fget(child)
    ]


def _normalisation(model: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    import tensorflow as tf

    def normalise(image: np.ndarray) -> np.ndarray:
        return np.asarray(model.feature_extractor.preprocess(tf.constant(image)), np.float64)

    offset = normalise(np.zeros((1, 1, 1, 3), np.float32))[0, 0, 0]
    scale = (normalise(np.full((1, 1, 1, 3), 255, np.float32))[0, 0, 0] - offset) / 255
    image = np.random.default_rng(0).uniform(0, 255, (1, 8, 8, 3)).astype(np.float32)
    if not np.allclose(normalise(image), image * scale + offset, rtol=1e-5, atol=1e-4):
        raise UnsupportedError(
            f"{type(model.feature_extractor).__name__}.preprocess is not one scale and offset a channel; "
            "odtrt cannot reproduce this normalisation"
        )
    return tuple(map(float, scale)), tuple(map(float, offset))  # type: ignore[return-value]


def _probe_images(
    size: tuple[int, int], scale: tuple[float, float, float], offset: tuple[float, float, float]
) -> np.ndarray:
    """Two network inputs, float32 ``[2, height, width, 3]``: smooth random shading, and noise with the
    contrast of a photograph.

    Noise over the full range would give deep networks inputs far from those of their training.
    """
    generator = np.random.default_rng(0)
    coarse = generator.uniform(0, 255, (9, 9, 3))
    rows, columns = (np.linspace(0, 8, side) for side in size)
    knots = np.arange(9)
    tall = np.stack([[np.interp(rows, knots, coarse[:, j, c]) for j in range(9)] for c in range(3)], -1)
    smooth = np.stack([[np.interp(columns, knots, row) for row in tall[..., c].T] for c in range(3)], -1)
    pixels = np.stack([smooth, generator.uniform(63.5, 191.5, (*size, 3))])
    return (pixels * scale + offset).astype(np.float32)


def _halving_maps(ssd: Any, size: tuple[int, int]) -> list[tuple[int, int]]:
    extractor = ssd.feature_extractor
    multiple = max(1, extractor.pad_to_multiple)
    height, width = (-(-side // multiple) * multiple for side in size)
    kind = ssd.anchor_generator.WhichOneof("anchor_generator_oneof")
    generator = getattr(ssd.anchor_generator, kind)
    if kind == "flexible_grid_anchor_generator":
        strides = [(grid.height_stride, grid.width_stride) for grid in generator.anchor_grid]
    elif kind == "multiscale_anchor_generator":
        strides = [(2**level, 2**level) for level in range(generator.min_level, generator.max_level + 1)]
    else:
        pyramid = extractor.bifpn if "bifpn" in extractor.type else extractor.fpn
        first = pyramid.min_level if "fpn" in extractor.type else 4
        levels = generator.num_layers if kind == "ssd_anchor_generator" else 1
        strides = [(2**level, 2**level) for level in range(first, first + levels)]
    return [(-(-height // rows), -(-width // columns)) for rows, columns in strides]


def _checked_anchors(
    settings: PipelineSettings, size: tuple[int, int], predictions: dict[str, Any]
) -> tuple[np.ndarray, float | str]:
    """The model's anchors, and the distance of the config's anchors, or the reason why it is not known."""
    anchors = _centre_size(np.asarray(predictions["anchors"]))
    maps = [(int(each.shape[1]), int(each.shape[2])) for each in predictions.get("feature_maps", ())]
    if not maps:
        return anchors, "not compared: the model does not tell its feature maps; its own anchors are taken"
    try:
        computed = anchors_from_config(settings, size, maps)
    except (ValueError, TypeError) as error:
        reason = one_line(error)[:200]
        return anchors, f"not compared: the generator alone fails ({reason}); the model's anchors are taken"
    if computed.shape != anchors.shape:
        raise CheckError(
            f"{settings.path}: model.ssd.anchor_generator makes {len(computed)} anchors for feature maps of "
            f"{', '.join(f'{height}x{width}' for height, width in maps)}, the model uses {len(anchors)}; the "
            "config is not the model's"
        )
    difference = float(np.abs(computed - anchors).max())
    if not difference <= _MAX_ANCHOR_ERROR:
        raise CheckError(
            f"{settings.path}: the anchors of model.ssd.anchor_generator differ from those that the model "
            f"uses by {difference:.3g} (limit {_MAX_ANCHOR_ERROR:g}); the config is not the model's"
        )
    return anchors, difference


def _centre_size(boxes: np.ndarray) -> np.ndarray:
    boxes = boxes.astype(np.float64)
    low, high = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1).astype(np.float32)


def _freeze(concrete: Any) -> Any:
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    frozen = convert_variables_to_constants_v2(concrete, lower_control_flow=False)
    graph = frozen.graph.as_graph_def()
    outputs = dict(zip(sorted(concrete.structured_outputs), frozen.outputs, strict=True))
    for name, tensor in outputs.items():
        node = next(node for node in graph.node if node.name == tensor.op.name)
        node.name = name
    graph = tf.compat.v1.graph_util.extract_sub_graph(graph, list(outputs))
    left = sorted({node.op for node in graph.node if _FORBIDDEN.fullmatch(node.op)})
    if left:
        raise CheckError(
            f"the frozen graph still holds {', '.join(left)}; expected convolutions and shapes only: "
            "this feature extractor cannot be exported as raw heads"
        )
    _sort_nodes(graph)
    return graph


def _sort_nodes(graph: Any) -> None:
    """Sorts the nodes: inputs before their users, otherwise by name. TensorFlow's order differs between
    runs."""
    nodes = {node.name: node for node in graph.node}
    sources = {name: {wire.lstrip("^").split(":")[0] for wire in node.input} for name, node in nodes.items()}
    users: dict[str, list[str]] = {name: [] for name in nodes}
    for name, inputs in sources.items():
        for each in inputs:
            users[each].append(name)
    waiting = {name: len(inputs) for name, inputs in sources.items()}
    ready = [name for name, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        name = heapq.heappop(ready)
        order.append(type(nodes[name]).FromString(nodes[name].SerializeToString()))
        for user in users[name]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, user)
    del graph.node[:]
    graph.node.extend(order)


def _compare_with_eager(
    graph: Any, images: np.ndarray, predictions: list[dict[str, Any]], batch: int | None
) -> dict[str, float | bool]:
    """Compares the graph with the eager model; returns the figures for the record. Raises CheckError if they
    differ by more than rounding."""
    eager = {
        name: np.concatenate([prediction[theirs].numpy() for prediction in predictions])
        for name, theirs in zip(
            noise.OUTPUTS, ("box_encodings", "class_predictions_with_background"), strict=True
        )
    }
    yardstick = noise.measure(graph, images, batch)
    distances = noise.compare(yardstick, eager)
    for name, distance in distances.items():
        if not distance.is_noise:
            raise CheckError(
                f"frozen {name} differs from the eager model by up to {distance.max_relative:.3g} of its "
                f"scale and {distance.rms_relative:.3g} rms, {distance.times_noise:.3g} times the noise of "
                f"float32 (expected at most {noise.FACTOR:g} times; TensorFlow's own is "
                f"{distance.noise_max_relative:.3g} and {distance.noise_rms_relative:.3g} rms): this is not "
                "rounding, the freezing changed the network"
            )
    return {
        "frozen_vs_eager_is_decisive": yardstick.is_decisive,
        "frozen_vs_eager_sees_kernel_change": yardstick.sees_kernel_change,
        "frozen_vs_eager_times_noise": max(distance.times_noise for distance in distances.values()),
        "frozen_vs_eager_max_abs_err": max(
            float(np.abs(yardstick.rounded[name] - eager[name]).max()) for name in noise.OUTPUTS
        ),
    }


def run_frozen(graph: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    """Runs a frozen raw-heads GraphDef with TensorFlow.

    image: float32 ``[batch, height, width, 3]``, preprocessed; repeated to the graph's fixed batch if
    that is larger. Returns ``box_encodings`` and ``class_logits`` as float32 arrays.
    """
    import tensorflow as tf

    names = ["box_encodings", "class_logits"]
    function = tf.compat.v1.wrap_function(lambda: tf.compat.v1.import_graph_def(graph, name=""), []).prune(
        ["image:0"], [f"{name}:0" for name in names]
    )
    batch = function.inputs[0].shape[0]
    if batch is not None and batch != len(image):
        image = np.repeat(image[:1], batch, axis=0)
    results = function(tf.constant(image))
    return {name: result.numpy() for name, result in zip(names, results, strict=True)}


def _check_head_shapes(settings: PipelineSettings, spec: DetectorSpec, eager: dict[str, Any]) -> None:
    expected = {
        "box_encodings": (1, spec.heads.num_anchors, 4),
        "class_predictions_with_background": (1, spec.heads.num_anchors, spec.heads.num_columns),
    }
    for name, shape in expected.items():
        found = tuple(eager[name].shape)
        if found != shape:
            raise CheckError(f"{settings.path}: the model's {name} is {found}, the config says {shape}")


def _check_values(settings: PipelineSettings, spec: DetectorSpec, anchors: np.ndarray) -> None:
    """Raises an error if the later stages would refuse to read these values."""
    problem = anchor_problem(anchors)
    if problem:
        raise CheckError(f"{settings.path}: model.ssd.anchor_generator: {problem}; correct the config")
    for problem in problems(spec):
        raise CheckError(f"{settings.path}: gives {problem}; correct the config, or the options of export")
