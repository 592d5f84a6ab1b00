"""Chapter 1: pipeline.config + checkpoint -> a frozen graph of the raw heads, the anchors, ``spec.json``.

The OD API's own exporter puts preprocessing, a loop over the batch and one NonMaxSuppression a class
into the graph; TensorRT takes none of them. Here only ``predict`` is traced: the network proper, from
the preprocessed image to box encodings and class logits. What was left out is written down in
``spec.json``, so that the later stages can do it exactly as the OD API would have done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from odtrt_lib import noise, odapi
from odtrt_lib.errors import CheckError, InputError, UnsupportedError, one_line
from odtrt_lib.folder import StageResult, sha256, staging, up_to_date, write_record
from odtrt_lib.spec import (
    DetectorSpec,
    HeadsSpec,
    InputSpec,
    PipelineSettings,
    Source,
    read_pipeline,
)

OUTPUTS = ("frozen.pb", "anchors.npy", "spec.json")

# Ops that a raw-heads graph must not hold: post-processing, loops, branches, dynamic lists.
_FORBIDDEN = re.compile(
    r"(.*NonMaxSuppression.*|(Stateless)?While|(Stateless)?If|Switch|Merge|Enter|Exit|LoopCond|"
    r"TensorArray.*|TensorList.*|.*PartitionedCall)"
)
_MAX_ANCHOR_ERROR = 1e-6


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where a model's files were found. ``root`` is the model's name inside the checkpoint."""

    pipeline: Path
    checkpoint: Path
    root: str


def find_model(source: str | Path, pipeline: str | Path | None = None) -> ModelFiles:
    """Finds pipeline.config and checkpoint in what a user has.

    source: an exported model (``pipeline.config`` with ``checkpoint/`` or only ``saved_model/``), a
        training directory (``ckpt-N``, the one that its ``checkpoint`` file names, else the highest N),
        or a checkpoint itself (``.../ckpt-7`` or one of its files).
    pipeline: the config, where it does not lie beside the checkpoint or one folder up.

    Raises InputError, saying what was looked for and where.
    """
    source = Path(source)
    if source.is_dir():
        checkpoint = _checkpoint_in(source)
        config = Path(pipeline) if pipeline else _config_near(source, [source, source.parent])
    else:
        checkpoint = Path(re.sub(r"\.(index|data-\d+-of-\d+)$", "", str(source)))
        if not Path(f"{checkpoint}.index").is_file():
            found = "a file, but not a checkpoint" if source.is_file() else "not found"
            raise InputError(
                f"{source}: {found}; expected a model's folder or a checkpoint such as "
                "model/checkpoint/ckpt-0"
            )
        config = (
            Path(pipeline)
            if pipeline
            else _config_near(source, [checkpoint.parent, checkpoint.parent.parent])
        )
    _check_checkpoint_files(checkpoint)
    root = "_model" if checkpoint.name == "variables" else "model"
    return ModelFiles(config, checkpoint, root)


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
        ``class_logits``, see :class:`odtrt_lib.spec.HeadsSpec`.
    anchors.npy: float32 ``[num_anchors, 4]``, (ycenter, xcenter, height, width), normalised.

    source, pipeline: see :func:`find_model`; label_map: see :func:`odtrt_lib.spec.read_pipeline`.
    batch: the fixed batch size, or None for a dynamic one.
    input_size: ``(height, width)`` of the network input where the config's resizer leaves it open
        (keep_aspect_ratio_resizer without padding).

    Checked, and recorded in ``log.jsonl``: every model variable was restored; the anchors that the
    config's generator makes are those that the model uses; no post-processing or control flow is left;
    the frozen graph computes what the eager model computes. Raises InputError, UnsupportedError or
    CheckError otherwise, and leaves nothing half-written.
    """
    started = time.perf_counter()
    folder = Path(folder)
    files = find_model(source, pipeline)
    odapi.regenerate_protos()
    settings = read_pipeline(files.pipeline, label_map)
    size = _network_size(settings, input_size)
    if batch is not None and batch < 1:
        raise InputError(f"batch {batch}: expected at least 1, or none for a dynamic batch")
    inputs = {"pipeline.config": sha256(files.pipeline), "checkpoint": _checkpoint_sha256(files.checkpoint)}
    names = json.dumps([label.name for label in settings.labels])
    options = {
        "batch": batch,
        "input_size": list(size),
        "labels_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }
    record = None if force else up_to_date(folder, "export", inputs, options)
    if record is not None:
        return StageResult(record, True)

    odapi.prepare()
    import tensorflow as tf

    model = _build_model(settings)
    concrete = _trace(model, batch, size)
    num_variables = _restore(model, files, settings)
    scale, offset = _normalisation(model)
    images = _probe_images(size, scale, offset)
    predictions = [model.predict(tf.constant(image[np.newaxis]), None) for image in images]
    eager = predictions[0]
    anchors, anchor_error = _checked_anchors(settings, size, eager["anchors"].numpy())
    graph = _freeze(concrete)
    against_eager = _compare_with_eager(graph, images, predictions, batch)
    spec = DetectorSpec(
        name=folder.resolve().name,
        source=Source(
            pipeline_sha256=inputs["pipeline.config"],
            checkpoint=files.checkpoint.name,
            checkpoint_sha256=inputs["checkpoint"],
            feature_extractor=settings.feature_extractor,
            odapi_version=odapi.version(),
            tensorflow_version=tf.__version__,
        ),
        input=InputSpec(size[0], size[1], settings.resizer, scale, offset, batch),
        heads=HeadsSpec(len(anchors), settings.num_classes, settings.background_column),
        box_coder=settings.box_coder,
        scores=settings.scores,
        nms=settings.nms,
        labels=settings.labels,
    )
    _check_head_shapes(settings, spec, eager)
    with staging(folder) as out:
        (out / "frozen.pb").write_bytes(graph.SerializeToString(deterministic=True))
        np.save(out / "anchors.npy", anchors)
        (out / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    record = write_record(
        folder,
        "export",
        inputs=inputs,
        settings=options,
        outputs=list(OUTPUTS),
        versions={"tensorflow": tf.__version__, "odapi": odapi.version()},
        seconds=time.perf_counter() - started,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        checks={
            "variables_restored": num_variables,
            "graph_nodes": len(graph.node),
            "postprocessing_or_control_flow_ops": 0,
            "anchors": len(anchors),
            "anchors_from_config_max_abs_err": anchor_error,
            **against_eager,
        },
    )
    return StageResult(record, False)


def anchors_from_config(settings: PipelineSettings, size: tuple[int, int]) -> np.ndarray:
    """The anchors that the config's generator makes for a network input of ``size`` (height, width).

    Computed without the model: by the OD API's generator on the feature map sizes that follow from the
    config, ``ceil(size / 2**level)`` for each level. Returns float32 ``[N, 4]``,
    (ycenter, xcenter, height, width), normalised.
    """
    odapi.prepare()
    import tensorflow as tf
    from object_detection.builders import anchor_generator_builder
    from object_detection.core import box_list_ops

    ssd = settings.message.model.ssd
    generator = anchor_generator_builder.build(ssd.anchor_generator)
    grid = generator.generate(_feature_map_shapes(ssd, size), im_height=size[0], im_width=size[1])
    boxes = box_list_ops.concatenate(grid).get()
    return _centre_size(tf.convert_to_tensor(boxes).numpy())


def _config_near(source: Path, folders: list[Path]) -> Path:
    for folder in folders:
        named = folder / "pipeline.config"
        if named.is_file():
            return named
        others = sorted(folder.glob("*.config"))
        if len(others) == 1:
            return others[0]
    raise InputError(f"{source}: no pipeline.config beside the checkpoint; name it with --pipeline")


def _checkpoint_in(folder: Path) -> Path:
    for candidate in (folder / "checkpoint", folder):
        found = _newest_checkpoint(candidate)
        if found is not None:
            return found
    saved_model = folder / "saved_model" / "variables" / "variables"
    if Path(f"{saved_model}.index").is_file():
        return saved_model
    raise InputError(
        f"{folder}: no checkpoint found; expected checkpoint/ckpt-0.index, ckpt-N.index or "
        "saved_model/variables/variables.index in it"
    )


def _newest_checkpoint(folder: Path) -> Path | None:
    numbered = {path.stem: path for path in folder.glob("ckpt-*.index")}
    state = folder / "checkpoint"
    named = None
    if state.is_file():
        match = re.search(r'^model_checkpoint_path:\s*"([^"]+)"', state.read_text(errors="replace"), re.M)
        named = Path(match.group(1)).name if match else None
    if named in numbered:
        return folder / str(named)
    by_number = sorted(numbered, key=lambda stem: int(re.sub(r"\D", "", stem) or -1))
    return folder / by_number[-1] if by_number else None


def _checkpoint_files(checkpoint: Path) -> list[Path]:
    shards = sorted(checkpoint.parent.glob(f"{checkpoint.name}.data-*-of-*"))
    return [Path(f"{checkpoint}.index"), *shards]


def _check_checkpoint_files(checkpoint: Path) -> None:
    index, *shards = _checkpoint_files(checkpoint)
    expected = int(shards[0].name.rsplit("-of-", 1)[1]) if shards else 1
    if len(shards) != expected:
        raise InputError(
            f"{checkpoint}.data-*: {len(shards)} of {expected} files found; copy the whole checkpoint "
            "(.index and every .data-* file)"
        )
    for path in (index, *shards):
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            raise InputError(f"{path}: empty (0 bytes); expected checkpoint data: copy the file again")
        if head.startswith(b"version https://git-lfs"):
            raise InputError(
                f"{path}: a Git LFS pointer, not the checkpoint; run `git lfs pull` where it was cloned"
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


def _build_model(settings: PipelineSettings) -> Any:
    from object_detection.builders import model_builder

    try:
        return model_builder.build(settings.message.model, is_training=False)
    except (ValueError, KeyError, AttributeError, TypeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"{settings.path}: the OD API cannot build this model ({one_line(error)}); "
            f"model.ssd.feature_extractor.type is {settings.feature_extractor!r}"
        ) from error


def _trace(model: Any, batch: int | None, size: tuple[int, int]) -> Any:
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([batch, *size, 3], tf.float32, name="image")])
    def heads(image: Any) -> dict[str, Any]:
        predictions = model.predict(image, None)
        return {
            "box_encodings": predictions["box_encodings"],
            "class_logits": predictions["class_predictions_with_background"],
        }

    return heads.get_concrete_function()


def _restore(model: Any, files: ModelFiles, settings: PipelineSettings) -> int:
    import tensorflow as tf

    variables = list({id(v): v for v in _variables(model)}.values())
    with _checkpoint_errors(files, settings):
        status = tf.train.Checkpoint(**{files.root: model}).read(str(files.checkpoint))
        status.expect_partial()
        status.assert_existing_objects_matched()
    return len(variables)


@contextlib.contextmanager
def _checkpoint_errors(files: ModelFiles, settings: PipelineSettings) -> Iterator[None]:
    import tensorflow as tf

    pair = f"{files.checkpoint} does not fit {settings.path}"
    advice = "use the pipeline.config that the checkpoint was trained with"
    try:
        yield
    except AssertionError as error:
        names = re.findall(r"Variable '?path=([^,]+),|Variable '([^']+)'", str(error))
        missing = [a or b for a, b in names]
        listed = ", ".join(missing[:3]) or one_line(error)[:200]
        raise InputError(f"{pair}: the checkpoint lacks {listed}, ...; {advice}") from error
    except ValueError as error:
        raise InputError(
            f"{pair}: {one_line(error)}; model.ssd.num_classes is "
            f"{settings.message.model.ssd.num_classes}: {advice}"
        ) from error
    except (tf.errors.OpError, IndexError, UnicodeDecodeError, RuntimeError) as error:
        raise InputError(
            f"{files.checkpoint}: damaged or truncated checkpoint ({one_line(error)[:200]}); copy it again"
        ) from error


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
    """Smooth random shading, and noise of a photograph's contrast, both float32: ``[2, height, width, 3]``.

    Noise over the full range would drive deep networks far outside of what they were trained on.
    """
    generator = np.random.default_rng(0)
    coarse = generator.uniform(0, 255, (9, 9, 3))
    rows, columns = (np.linspace(0, 8, side) for side in size)
    knots = np.arange(9)
    tall = np.stack([[np.interp(rows, knots, coarse[:, j, c]) for j in range(9)] for c in range(3)], -1)
    smooth = np.stack([[np.interp(columns, knots, row) for row in tall[..., c].T] for c in range(3)], -1)
    pixels = np.stack([smooth, generator.uniform(63.5, 191.5, (*size, 3))])
    return (pixels * scale + offset).astype(np.float32)


def _feature_map_shapes(ssd: Any, size: tuple[int, int]) -> list[tuple[int, int]]:
    multiple = ssd.feature_extractor.pad_to_multiple
    height, width = (-(-side // multiple) * multiple for side in size)
    generator = ssd.anchor_generator
    if generator.WhichOneof("anchor_generator_oneof") == "multiscale_anchor_generator":
        pyramid = generator.multiscale_anchor_generator
        levels = range(pyramid.min_level, pyramid.max_level + 1)
    else:
        first = ssd.feature_extractor.fpn.min_level if ssd.feature_extractor.HasField("fpn") else 4
        levels = range(first, first + generator.ssd_anchor_generator.num_layers)
    return [(-(-height // 2**level), -(-width // 2**level)) for level in levels]


def _checked_anchors(
    settings: PipelineSettings, size: tuple[int, int], boxes: np.ndarray
) -> tuple[np.ndarray, float]:
    anchors = _centre_size(boxes)
    computed = anchors_from_config(settings, size)
    if computed.shape != anchors.shape:
        raise CheckError(
            f"{settings.path}: model.ssd.anchor_generator makes {len(computed)} anchors for a "
            f"{size[0]}x{size[1]} input, the model uses {len(anchors)}; the config is not the model's"
        )
    error = float(np.abs(computed - anchors).max())
    if not error <= _MAX_ANCHOR_ERROR:
        raise CheckError(
            f"{settings.path}: the anchors of model.ssd.anchor_generator differ from those that the model "
            f"uses by {error:.3g} (limit {_MAX_ANCHOR_ERROR:g}); the config is not the model's"
        )
    return anchors, error


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
    return graph


def _compare_with_eager(
    graph: Any, images: np.ndarray, predictions: list[dict[str, Any]], batch: int | None
) -> dict[str, float | bool]:
    """The figures of the comparison for the record; CheckError where the two differ by more than rounding."""
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
