"""Makes the Object Detection API's PyPI package importable with a current TensorFlow.

The package ``tf-models-research-object-detection`` (2.8.0.post1, the last one) was made for
TensorFlow 2.8 and protobuf 3. This module removes the three obstacles to using it today:

* An old ``protoc`` generated its ``*_pb2.py`` modules, and protobuf >= 4 refuses to load them.
  :func:`regenerate_protos` writes them anew from the descriptors that they contain, without protoc.
* ``tensorflow.compat.v1.estimator`` no longer exists, and ``tensorflow_io`` is a 50 MB package that serves
  one colour conversion of one unsupported model. :func:`prepare` puts empty stand-ins in their place.
* Its layers are those of Keras 2. TensorFlow >= 2.16 must be told this before it is imported.

``python -m odtrt_lib.export.odapi`` does the first step once, at set-up. Every run calls :func:`prepare`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import glob
import importlib
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from odtrt_lib.errors import InputError, MissingDependencyError, UnsupportedError, one_line
from odtrt_lib.export.pipeline import parse_pipeline
from odtrt_lib.folder import atomic_write

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
"""The key that a TensorFlow 2 checkpoint has and one of TensorFlow 1 lacks."""

TF1_ADVICE = (
    "a TensorFlow 1 checkpoint, which names its variables in another way; odtrt reads those of TensorFlow 2: "
    "take the model's TensorFlow 2 version, or train it again with model_main_tf2.py"
)

FITTING_CONFIG = "use the pipeline.config that the checkpoint was trained with"

_CALL_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
_INSTALL = "run `make install`"
_ENDS_A_RESIDUAL_BLOCK = re.compile(r"conv\d_block\d+_3_bn")  # a layer of the OD API's ResNets


def regenerate_protos() -> int:
    """Rewrites every outdated ``object_detection/protos/*_pb2.py`` in place.

    Returns the number of files rewritten (0 if all are current). Raises MissingDependencyError if the
    package is absent or its folder cannot be written.
    """
    stale = [path for path in _proto_modules() if "_descriptor.FileDescriptor(" in path.read_text()]
    for path in stale:
        module = _modern_module(path.stem, _serialized_descriptor(path))
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(module)
        except InputError as error:
            reason = getattr(error.__cause__, "strerror", None) or error
            raise MissingDependencyError(
                f"{path}: outdated protobuf module and the folder cannot be written ({reason}): "
                "run `python -m odtrt_lib.export.odapi` as a user who can write it"
            ) from error
    return len(stale)


def prepare() -> None:
    """Makes ``import object_detection`` work in this process; call it before any such import.

    Raises MissingDependencyError, naming the command that installs it, if TensorFlow or the OD API
    is absent.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise MissingDependencyError(f"TensorFlow is not installed; chapters 1 and 2 need it: {_INSTALL}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    version = importlib.metadata.version(
        "tensorflow-cpu" if _is_installed("tensorflow-cpu") else "tensorflow"
    )
    if tuple(int(part) for part in version.split(".")[:2]) >= (2, 16):
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
    regenerate_protos()
    _stand_in("tensorflow_io")
    import tensorflow.compat.v1 as tf1
    from tensorflow.python.ops import cond, control_flow_case, control_flow_ops, while_loop

    tf1.logging.set_verbosity(tf1.logging.ERROR)
    if not hasattr(tf1, "estimator"):
        modes = types.SimpleNamespace(TRAIN="train", EVAL="eval", PREDICT="infer")
        tf1.estimator = _stand_in("tensorflow.compat.v1.estimator")
        tf1.estimator.ModeKeys = modes
    for name, function in (
        ("case", control_flow_case.case),
        ("cond", cond.cond),
        ("while_loop", while_loop.while_loop),
    ):
        if not hasattr(control_flow_ops, name):
            setattr(control_flow_ops, name, function)


@functools.cache
def tensorflow() -> Any:
    """The TensorFlow module, after :func:`prepare`. Raises MissingDependencyError if it is absent."""
    prepare()
    return importlib.import_module("tensorflow")


def load_model(pipeline: str | Path, checkpoint: str | Path) -> Any:
    """The OD API's own model, restored. It is the reference for everything that odtrt makes.

    pipeline: a pipeline.config. checkpoint: a prefix such as ``model/checkpoint/ckpt-0``. This function does
    none of the checks of :func:`odtrt_lib.export.export`. Raises InputError or UnsupportedError if the OD API
    cannot read, build, call or restore the model.
    """
    model, _ = _build_and_call(Path(pipeline), is_training=False)
    restore(model, Path(checkpoint), Path(pipeline), _read_config(Path(pipeline))).expect_partial()
    return model


def detect(model: Any, image: np.ndarray, image_id: int = 0) -> list[dict[str, Any]]:
    """The OD API's detections in an RGB image, uint8 ``[height, width, 3]``, in COCO's results form.

    All four steps are the OD API's own: preprocess, predict, postprocess, label map ids from 1.
    ``bbox`` is ``[xmin, ymin, width, height]`` in pixels of the image.
    """
    import tensorflow as tf

    inputs, shapes = model.preprocess(tf.constant(image[np.newaxis], tf.float32))
    found = {k: v.numpy()[0] for k, v in model.postprocess(model.predict(inputs, shapes), shapes).items()}
    height, width = image.shape[:2]
    count = int(found["num_detections"])
    boxes = found["detection_boxes"][:count].astype(np.float64) * [height, width, height, width]
    return [
        {
            "image_id": image_id,
            "category_id": int(found["detection_classes"][i]) + 1,
            "bbox": [xmin, ymin, xmax - xmin, ymax - ymin],
            "score": float(found["detection_scores"][i]),
        }
        for i, (ymin, xmin, ymax, xmax) in enumerate(boxes.tolist())
    ]


@contextlib.contextmanager
def exact_means() -> Iterator[None]:
    """Models that run inside the block compute their spatial means (squeeze-and-excitation) in float64.

    If the values of a large feature map repeat, as in the padding of a letterboxed image, TensorFlow's
    float32 sum has an error of about 1e-4. Without this error, errors of a conversion can be recognised.
    """
    tf = tensorflow()
    pooling = tf.keras.layers.GlobalAveragePooling2D
    original = pooling.call

    def call(layer: Any, inputs: Any) -> Any:
        mean = tf.reduce_mean(tf.cast(inputs, tf.float64), [1, 2], keepdims=layer.keepdims)
        return tf.cast(mean, inputs.dtype)

    pooling.call = call
    try:
        yield
    finally:
        pooling.call = original


def write_random_checkpoint(pipeline: str | Path, folder: str | Path, *, seed: int = 0) -> Path:
    """Writes ``folder/ckpt-0`` with random weights for a pipeline.config, and returns that prefix.

    Use it to learn, before training, how large and how fast a configuration is, and whether it converts. The
    initial weights of the OD API are not suitable: the signal vanishes below batch norm's epsilon, and no
    comparison of outputs would mean anything. Here kernels are normal with variance 1 / fan-in. One pass in
    training mode over four kinds of images sets the batch norm statistics. Batch norm's gain is 0.5, so that
    one rounding error does not change the outputs completely.

    A ResNet needs a smaller gain, because random kernels enlarge the error again in each residual block. So
    the last batch norm of a block has a gain of 0.05, near the 0 with which training may start (Goyal et al.
    2017, arXiv:1706.02677, section 5.1). With 0.5, half precision moved the boxes of an SSD ResNet-50 at 640
    x 640 by about a tenth of the largest box; with 0.05, by less than a hundredth.
    """
    prepare()
    import tensorflow as tf

    tf.keras.utils.set_random_seed(seed)
    learning_phase = tf.keras.backend.learning_phase()
    tf.keras.backend.set_learning_phase(True)
    try:
        model, images = _build_and_call(Path(pipeline), is_training=True)
        for part in (model.feature_extractor, model._box_predictor):
            for layer in tf.Module.submodules.fget(part):
                if "BatchNorm" in type(layer).__name__:
                    layer.momentum = 0.0
                    gain = 0.05 if _ENDS_A_RESIDUAL_BLOCK.fullmatch(layer.name) else 0.5
                    layer.gamma.assign(tf.fill(layer.gamma.shape, gain))
            for kernel in tf.Module.variables.fget(part):
                if kernel.shape.rank == 4:
                    fan_in = math.prod(kernel.shape[:2] if "depthwise" in kernel.name else kernel.shape[:3])
                    kernel.assign(tf.random.normal(kernel.shape, stddev=fan_in**-0.5))
        model.predict(images, None)
    finally:
        tf.keras.backend.set_learning_phase(learning_phase)
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=model), str(folder), max_to_keep=1)
    return Path(manager.save(checkpoint_number=0))


def build_model(pipeline: Path, message: Any, *, is_training: bool = False) -> Any:
    """Builds the OD API's model of a parsed ``TrainEvalPipelineConfig`` that was read from ``pipeline``.

    Layer names are counted from one again, so that all models of a process have the same names. Raises
    UnsupportedError if the OD API cannot build the model.
    """
    tf = tensorflow()
    from object_detection.builders import model_builder

    tf.keras.backend.reset_uids()
    try:
        return model_builder.build(message.model, is_training=is_training)
    except (ValueError, KeyError, AttributeError, TypeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"{pipeline}: the OD API cannot build this model ({one_line(error)}); "
            f"model.ssd.feature_extractor.type is {message.model.ssd.feature_extractor.type!r}"
        ) from error


@contextlib.contextmanager
def call_errors(pipeline: Path, message: Any, size: tuple[int, int]) -> Iterator[None]:
    """Turns an error that the OD API's model raises when it is called in this block into one line.

    size: ``(height, width)`` of the network input. Raises InputError. If the network cannot have that size,
    the message names the nearest sizes that were tried and work. If the anchors are for another number of
    feature maps, it names both numbers. Otherwise it quotes the cause.
    """
    tf = tensorflow()
    try:
        yield
    except (*_CALL_ERRORS, tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
        raise InputError(f"{pipeline}: {_refusal(pipeline, message, size, error)}") from error


def restore(model: Any, checkpoint: Path, pipeline: Path, message: Any, root: str = "model") -> Any:
    """Reads a checkpoint into a model of ``pipeline`` that was called once; returns TensorFlow's load status.

    checkpoint: a prefix with any name, even with ``[``, which TensorFlow takes for a pattern. root: the
    model's name inside the checkpoint. Raises InputError if the checkpoint is absent, damaged, or has values
    of other shapes; UnsupportedError if it is TensorFlow 1's.
    """
    tf = tensorflow()
    try:
        with _without_patterns(checkpoint) as plain:
            if not tf.train.load_checkpoint(str(plain)).has_tensor(OBJECT_GRAPH):
                raise UnsupportedError(f"{checkpoint}: {TF1_ADVICE}")
            return tf.train.Checkpoint(**{root: model}).read(str(plain))
    except ValueError as error:
        raise InputError(
            f"{checkpoint} does not fit {pipeline}: {one_line(error)}; model.ssd.num_classes is "
            f"{message.model.ssd.num_classes}: {FITTING_CONFIG}"
        ) from error
    except (tf.errors.OpError, IndexError, UnicodeDecodeError, RuntimeError) as error:
        raise InputError(
            f"{checkpoint}: damaged or truncated checkpoint ({one_line(error)[:200]}); copy it again"
        ) from error


@contextlib.contextmanager
def _without_patterns(checkpoint: Path) -> Iterator[Path]:
    """A path of the checkpoint that TensorFlow takes for no pattern. If its own path is one, makes links."""
    if glob.escape(str(checkpoint)) == str(checkpoint) and "\\" not in str(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="odtrt-checkpoint-") as folder:
        for file in checkpoint.parent.glob(f"{glob.escape(checkpoint.name)}.*"):
            (Path(folder) / f"checkpoint{file.name[len(checkpoint.name) :]}").symlink_to(file.resolve())
        yield Path(folder) / "checkpoint"


def _refusal(pipeline: Path, message: Any, size: tuple[int, int], error: BaseException) -> str:
    from object_detection.builders import anchor_generator_builder

    ssd = message.model.ssd
    asked = f"{size[0]}x{size[1]} (height x width)"
    maps = _feature_map_sizes(pipeline, message, size)
    if maps is None:
        return (
            f"the network cannot take an input of {asked}: {_advice_on_size(pipeline, message, size, error)}"
        )
    levels = len(anchor_generator_builder.build(ssd.anchor_generator).num_anchors_per_location())
    if levels != len(maps):
        kind = ssd.anchor_generator.WhichOneof("anchor_generator_oneof")
        return (
            f"model.ssd.anchor_generator.{kind} makes anchors for {levels} feature maps, the feature "
            f"extractor has {len(maps)}; give both the levels that the checkpoint was trained with"
        )
    return f"the OD API cannot run this model on an input of {asked} ({_cause(error)}); {FITTING_CONFIG}"


def _advice_on_size(pipeline: Path, message: Any, size: tuple[int, int], error: BaseException) -> str:
    multiple = _multiple(message.model.ssd.feature_extractor)
    found = re.search(r"image size must be >= (\d+)", str(error))
    smallest = int(found.group(1)) if found else 1
    least = -(-smallest // multiple)
    sides = [(max(side // multiple, least), max(-(-side // multiple), least)) for side in size]
    near = {(rows * multiple, columns * multiple) for rows in sides[0] for columns in sides[1]} - {size}
    if size[0] == size[1]:
        near = {each for each in near if each[0] == each[1]}
    fitting: list[str] = []
    for tried in sorted(near, key=lambda each: (abs(each[0] - size[0]) + abs(each[1] - size[1]), each)):
        if len(fitting) < 2 and _feature_map_sizes(pipeline, message, tried) is not None:
            fitting.append(f"{tried[0]}x{tried[1]}")
    if not fitting:
        return f"{_cause(error)}; use the size that the checkpoint was trained with"
    needs = [f"at least {smallest}"] if found else []
    if multiple > 1:
        needs.append(f"a multiple of {multiple}, for the levels of its feature pyramid")
    return (
        f"each side must be {' and '.join(needs)}; the nearest sizes that work: {' and '.join(fitting)}; "
        "change model.ssd.image_resizer (or --input-size)"
    )


def _multiple(extractor: Any) -> int:
    """The number of which the sides of the network input must be multiples, because a pyramid adds its
    levels.

    The pyramids of the SSD FPN models end at level 5. Convolutions, which accept any size, make the levels
    above.
    """
    if "bifpn" in extractor.type:
        return 2**extractor.bifpn.max_level
    return 2 ** min(extractor.fpn.max_level, 5) if "fpn" in extractor.type else 1


def _feature_map_sizes(pipeline: Path, message: Any, size: tuple[int, int]) -> list[tuple[int, int]] | None:
    """The sizes of the feature maps for a network input of ``size``; None if the network refuses it."""
    tf = tensorflow()
    extractor = build_model(pipeline, message).feature_extractor
    image = tf.TensorSpec([1, *size, 3], tf.float32)
    try:
        maps = tf.function(extractor, autograph=False).get_concrete_function(image).structured_outputs
    except (*_CALL_ERRORS, tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
        return None
    return [(each.shape[1], each.shape[2]) for each in maps]


def _cause(error: BaseException) -> str:
    """The innermost sentence of an error that TensorFlow and Keras wrapped in call stacks."""
    text = str(error).split("Call arguments received")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = re.sub(r"^(\w+Error: )|\{\{.*?\}\} *", "", lines[-1]) if lines else type(error).__name__
    return last[:200]


def _build_and_call(pipeline: Path, is_training: bool) -> tuple[Any, Any]:
    """The model of a config, called once so that it has variables, and its inputs in that call."""
    message = _read_config(pipeline)
    model, images = _build(pipeline, message, is_training)
    with call_errors(pipeline, message, tuple(images.shape[1:3])):
        model.predict(images, None)
    return model, images


def _read_config(pipeline: Path) -> Any:
    prepare()
    message = parse_pipeline(pipeline)
    architecture = message.model.WhichOneof("model")
    if architecture != "ssd":
        raise UnsupportedError(f"{pipeline}: model.{architecture or '(empty)'}: expected model.ssd")
    return message


def _build(pipeline: Path, message: Any, is_training: bool) -> tuple[Any, Any]:
    """The model, and four network inputs, float32: noise, a smooth image, patches, black."""
    tf = tensorflow()
    resizer = message.model.ssd.image_resizer
    fixed, side = resizer.fixed_shape_resizer, resizer.keep_aspect_ratio_resizer.max_dimension
    is_fixed = resizer.HasField("fixed_shape_resizer")
    size = (fixed.height, fixed.width) if is_fixed else (side, side)
    if min(size) < 1:
        raise InputError(f"{pipeline}: model.ssd.image_resizer gives no size; expected at least 1x1")
    noise = tf.random.stateless_uniform([1, *size, 3], [0, 0], 0.0, 255.0)
    smooth = tf.image.resize(noise[:, :8, :8], size)
    board = tf.image.resize(noise[:, :16, :16], size, "nearest")
    model = build_model(pipeline, message, is_training=is_training)
    inputs, _ = model.preprocess(tf.concat([noise, smooth, board, tf.zeros_like(noise)], 0))
    return model, inputs


def version() -> str:
    """The installed version of the OD API package, e.g. ``2.8.0.post1``."""
    return importlib.metadata.version("tf-models-research-object-detection")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _stand_in(name: str) -> types.ModuleType:
    return sys.modules.setdefault(name, types.ModuleType(name))


def _proto_modules() -> list[Path]:
    package = importlib.util.find_spec("object_detection")
    if package is None or not package.submodule_search_locations:
        raise MissingDependencyError(
            f"the Object Detection API (object_detection) is not installed: {_INSTALL}"
        )
    return sorted((Path(package.submodule_search_locations[0]) / "protos").glob("*_pb2.py"))


def _serialized_descriptor(path: Path) -> bytes:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb":
            return ast.literal_eval(node.value)
    raise MissingDependencyError(f"{path}: no serialized descriptor found: {_INSTALL} afresh")


def _modern_module(name: str, serialized: bytes) -> str:
    from google.protobuf import descriptor_pb2

    descriptor = descriptor_pb2.FileDescriptorProto.FromString(serialized)
    imports = "".join(
        f"import {dependency[: -len('.proto')].replace('/', '.')}_pb2\n"
        for dependency in descriptor.dependency
    )
    return f"""# Rewritten by odtrt_lib.export.odapi from the descriptor that the original module carried.
from google.protobuf import descriptor_pool
from google.protobuf.internal import builder

{imports}
DESCRIPTOR = descriptor_pool.Default().AddSerializedFile({serialized!r})
builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, globals())
builder.BuildTopDescriptorsAndMessages(DESCRIPTOR, "object_detection.protos.{name}", globals())
"""


if __name__ == "__main__":
    print(f"{regenerate_protos()} protobuf modules of the OD API rewritten")
