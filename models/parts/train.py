"""Trains a detector of the parts on a belt. From the repository's root:

    python models/parts/train.py --minutes 68           from scratch, then measure (2 CPU cores suffice)
    python models/parts/train.py --warm-start models/parts/checkpoint/ckpt-0 --minutes 25 --batch 64
    python models/parts/train.py --model models/parts_d0 --minutes 25 --batch 32

Training renders scenes of ``TRAIN_SEEDS`` and resizes them by the Object Detection API's own rule
(TF1 bilinear, corners not aligned, half_pixel_centers false), then loops: provide_groundtruth, preprocess,
predict, loss, Adam. The learning rate follows the share of the time budget that is used up, so the
schedule always ends. What is saved are the weights' moving averages. Measuring is a process of its own,
``benchmarks/parts.py``, which restores the checkpoint into a fresh model.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from odtrt_lib.export import odapi  # noqa: E402
from odtrt_lib.scenes import PARTS_CLASSES, TRAIN_SEEDS, render_scene  # noqa: E402

MAXIMUM_BOXES = 20


@dataclass(frozen=True)
class TrainingSet:
    """images: uint8 [count, size, size, 3]. boxes: normalised float32 [count, 20, 4]. classes: 0-based
    int64 [count, 20]. counts: int64 [count], the number of real boxes of each image."""

    images: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    counts: np.ndarray


# ---------------------------------------------------------------------------------------- data


def resize_tf1(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """ResizeBilinear(align_corners=False, half_pixel_centers=False); uint8 HWC -> float32 HWC."""
    rows = np.arange(height, dtype=np.float32) * np.float32(image.shape[0] / height)
    columns = np.arange(width, dtype=np.float32) * np.float32(image.shape[1] / width)
    top, left = rows.astype(np.int64), columns.astype(np.int64)
    below = np.minimum(top + 1, image.shape[0] - 1)
    right = np.minimum(left + 1, image.shape[1] - 1)
    across, down = (columns - left)[None, :, None], (rows - top)[:, None, None]
    source = image.astype(np.float32)
    upper, lower = source[top], source[below]
    upper = upper[:, left] + (upper[:, right] - upper[:, left]) * across
    lower = lower[:, left] + (lower[:, right] - lower[:, left]) * across
    return upper + (lower - upper) * down


def _render_resized(seed: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cv2.setNumThreads(1)
    scene = render_scene(seed)
    height, width = scene.image.shape[:2]
    image = np.round(resize_tf1(scene.image, size, size)).astype(np.uint8)
    return image, scene.boxes / np.float32([height, width, height, width]), scene.class_ids - 1


def rendered_training_set(count: int, size: int) -> TrainingSet:
    """Renders the first ``count`` training scenes on all cores; kept in the temporary folder."""
    looks = b"".join(render_scene(seed).image.tobytes() for seed in TRAIN_SEEDS[:3])
    look = hashlib.sha256(looks).hexdigest()[:12]
    cache = Path(tempfile.gettempdir()) / f"odtrt-parts-{count}-{size}-{look}.npz"
    if not cache.exists():
        images = np.zeros((count, size, size, 3), np.uint8)
        boxes = np.zeros((count, MAXIMUM_BOXES, 4), np.float32)
        classes = np.zeros((count, MAXIMUM_BOXES), np.int64)
        counts = np.zeros(count, np.int64)
        spawn = multiprocessing.get_context("spawn")  # OpenCV's threads do not survive a fork
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
            seeds = TRAIN_SEEDS[:count]
            drawn = pool.map(_render_resized, seeds, itertools.repeat(size), chunksize=20)
            for number, (image, box, label) in enumerate(drawn):
                kept = min(len(label), MAXIMUM_BOXES)
                images[number], counts[number] = image, kept
                boxes[number, :kept], classes[number, :kept] = box[:kept], label[:kept]
                if (number + 1) % 500 == 0:
                    print(f"rendered {number + 1} of {count} training scenes", flush=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, images=images, boxes=boxes, classes=classes, counts=counts)
        os.replace(partial, cache)
    stored = np.load(cache)
    return TrainingSet(stored["images"], stored["boxes"], stored["classes"], stored["counts"])


def augmented(
    rng: np.random.Generator, image: np.ndarray, boxes: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One random variant: zoom and shift, flips, brightness, contrast, colour, noise.

    Takes and returns uint8 [H, W, 3] -> float32 [H, W, 3]; boxes normalised float32 [K, 4]; classes [K].
    """
    height, width = image.shape[:2]
    if rng.random() < 0.6:
        zoom = math.exp(rng.uniform(-0.22, 0.30))
        ratio = math.exp(rng.normal(0.0, 0.04))
        zoom_x, zoom_y = zoom * ratio, zoom / ratio
        shift_x = rng.uniform(min(0.0, 1 - zoom_x), max(0.0, 1 - zoom_x))
        shift_y = rng.uniform(min(0.0, 1 - zoom_y), max(0.0, 1 - zoom_y))
        matrix = np.float32(
            [
                [zoom_x, 0, shift_x * width + 0.5 * (zoom_x - 1)],
                [0, zoom_y, shift_y * height + 0.5 * (zoom_y - 1)],
            ]
        )
        fill = tuple(float(value) for value in image.mean(axis=(0, 1)))
        image = cv2.warpAffine(
            image, matrix, (width, height), borderMode=cv2.BORDER_CONSTANT, borderValue=fill
        )
        moved = boxes * np.float32([zoom_y, zoom_x] * 2) + np.float32([shift_y, shift_x] * 2)
        clipped = np.clip(moved, 0.0, 1.0)
        share = _area(clipped) / np.maximum(_area(moved), 1e-9)
        boxes, classes = clipped[share >= 0.35], classes[share >= 0.35]
    if rng.random() < 0.5:
        image = image[:, ::-1]
        boxes = np.stack([boxes[:, 0], 1 - boxes[:, 3], boxes[:, 2], 1 - boxes[:, 1]], axis=1)
    if rng.random() < 0.5:
        image = image[::-1]
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    image = image.astype(np.float32)
    image *= np.float32(math.exp(rng.normal(0.0, 0.15))) * np.exp(rng.normal(0.0, 0.03, 3)).astype(np.float32)
    image += np.float32(rng.normal(0.0, 8.0))
    if rng.random() < 0.15:
        image[:] = image.mean(axis=2, keepdims=True)
    return np.clip(image, 0.0, 255.0), boxes, classes


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def batches(data: TrainingSet, size: int, seed: int) -> queue.Queue:
    """A thread that fills a queue with (images, boxes, one-hot classes, weights), all padded float32."""
    ready: queue.Queue = queue.Queue(maxsize=4)

    def fill() -> None:
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(data.images))
            for start in range(0, len(order) - size + 1, size):
                images = np.zeros((size, *data.images.shape[1:]), np.float32)
                boxes = np.zeros((size, MAXIMUM_BOXES, 4), np.float32)
                one_hot = np.zeros((size, MAXIMUM_BOXES, len(PARTS_CLASSES)), np.float32)
                weights = np.zeros((size, MAXIMUM_BOXES), np.float32)
                for row, index in enumerate(order[start : start + size]):
                    count = data.counts[index]
                    images[row], box, label = augmented(
                        rng, data.images[index], data.boxes[index, :count], data.classes[index, :count]
                    )
                    boxes[row, : len(label)], weights[row, : len(label)] = box, 1.0
                    one_hot[row, np.arange(len(label)), label] = 1.0
                ready.put((images, boxes, one_hot, weights))

    threading.Thread(target=fill, daemon=True).start()
    return ready


# ---------------------------------------------------------------------------------------- model


def read_config(folder: Path):
    """folder/pipeline.config."""
    from google.protobuf import text_format
    from object_detection.protos import pipeline_pb2

    text = (folder / "pipeline.config").read_text()
    return text_format.Parse(text, pipeline_pb2.TrainEvalPipelineConfig())


def build_detector(config):
    """The detection model of a pipeline.config with its variables created."""
    import tensorflow as tf
    from object_detection.builders import model_builder

    tf.keras.backend.set_learning_phase(True)
    model = model_builder.build(config.model, is_training=True)
    size = config.model.ssd.image_resizer.fixed_shape_resizer.height
    model.predict(*model.preprocess(tf.zeros([1, size, size, 3])))
    return model


def train(options: argparse.Namespace) -> None:
    """Trains for ``options.minutes`` and leaves the averaged weights in the model's ``checkpoint/``."""
    odapi.prepare()
    config = read_config(options.model)
    data = rendered_training_set(
        options.train_scenes, config.model.ssd.image_resizer.fixed_shape_resizer.height
    )
    import tensorflow as tf

    tf.keras.utils.set_random_seed(1)
    model = build_detector(config)
    if options.warm_start:
        tf.train.Checkpoint(model=model).read(str(options.warm_start)).assert_existing_objects_matched()
    trainable = model.trainable_variables
    everything = _tracked_variables(model)
    averages = [tf.Variable(variable, trainable=False) for variable in everything]
    optimizer = tf.keras.optimizers.legacy.Adam(options.learning_rate, epsilon=1e-7)
    decay = tf.Variable(0.0, trainable=False)
    parameters = int(sum(np.prod(variable.shape) for variable in everything))
    print(f"{len(trainable)} trainable of {len(everything)} variables, {parameters:,} parameters", flush=True)

    step = _training_step(
        tf, model, options.batch, optimizer, list(zip(averages, everything, strict=True)), decay
    )
    ready = batches(data, options.batch, seed=2)
    step(*(tf.constant(array) for array in ready.get()))
    started = time.monotonic()
    saved, steps, recent = started, 1, []
    while (share := (time.monotonic() - started) / (60.0 * options.minutes)) < 1.0:
        warm = min(1.0, (steps + 1) / 150)
        falling = 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * share))
        optimizer.learning_rate.assign(options.learning_rate * warm * falling)
        decay.assign(min(0.997, (1.0 + steps) / (10.0 + steps)))
        recent.append([float(part) for part in step(*(tf.constant(array) for array in ready.get()))])
        steps += 1
        now = time.monotonic()
        if steps % 50 == 0:
            box, label = np.mean(recent, axis=0)
            print(
                f"{(now - started) / 60:6.1f} min  step {steps:6d}  {(now - started) / steps:.3f} s/step  "
                f"box {box:.4f}  class {label:.4f}  queue {ready.qsize()}",
                flush=True,
            )
            recent = []
        if now - saved > 180.0:
            _save_averages(tf, model, everything, averages, steps, now - started, options)
            saved = now
    _save_averages(tf, model, everything, averages, steps, time.monotonic() - started, options)


def _training_step(tf, model, batch: int, optimizer, averages, decay):
    """One step, as a TensorFlow function. averages: pairs of a moving average and its variable."""
    trainable = model.trainable_variables

    @tf.function
    def step(images, boxes, one_hot, weights):
        model.provide_groundtruth(
            groundtruth_boxes_list=tf.unstack(boxes, batch),
            groundtruth_classes_list=tf.unstack(one_hot, batch),
            groundtruth_weights_list=tf.unstack(weights, batch),
        )
        with tf.GradientTape() as tape:
            inputs, shapes = model.preprocess(images)
            losses = model.loss(model.predict(inputs, shapes), shapes)
            box, label = losses["Loss/localization_loss"], losses["Loss/classification_loss"]
            total = box + label + tf.add_n(model.regularization_losses())
        gradients, _ = tf.clip_by_global_norm(tape.gradient(total, trainable), 10.0)
        optimizer.apply_gradients(zip(gradients, trainable, strict=True))
        for average, variable in averages:
            average.assign_sub((1.0 - decay) * (average - variable))
        return box, label

    return step


def _tracked_variables(model) -> list:
    """Every variable that tf.train.Checkpoint(model=model) saves, each once."""
    found = {id(v): v for v in model.trainable_variables}
    for module in (model._feature_extractor, model._box_predictor):
        for variable in module.variables:
            found.setdefault(id(variable), variable)
    return list(found.values())


def _save_averages(tf, model, variables, averages, steps, seconds, options) -> None:
    """Writes checkpoint/ckpt-0 from the moving averages; training goes on with the plain weights."""
    plain = [variable.numpy() for variable in variables]
    for variable, average in zip(variables, averages, strict=True):
        variable.assign(average)
    target = options.model / "checkpoint"
    target.mkdir(exist_ok=True)
    checkpoint = tf.train.Checkpoint(model=model)
    checkpoint.save_counter.assign(1)
    checkpoint.write(str(target / "next"))
    for variable, value in zip(variables, plain, strict=True):
        variable.assign(value)
    for suffix in ("data-00000-of-00001", "index"):
        os.replace(target / f"next.{suffix}", target / f"ckpt-0.{suffix}")
    (target / "checkpoint").write_text(
        'model_checkpoint_path: "ckpt-0"\nall_model_checkpoint_paths: "ckpt-0"\n'
    )
    record = {
        "steps": steps,
        "seconds": round(seconds),
        "train_scenes": options.train_scenes,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "command": shlex.join(["python", "models/parts/train.py", *sys.argv[1:]]),
    }
    (options.model / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"saved {target / 'ckpt-0'} at step {steps}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE, help="folder of pipeline.config and checkpoint/")
    parser.add_argument("--warm-start", type=Path, help="a checkpoint to begin with, as FOLDER/ckpt-0")
    parser.add_argument("--minutes", type=float, default=68.0, help="time for the training loop")
    parser.add_argument("--train-scenes", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    options = parser.parse_args()
    train(options)
    measure = [sys.executable, str(ROOT / "benchmarks" / "parts.py"), "--model", str(options.model)]
    sys.exit(subprocess.run(measure, check=False).returncode)


if __name__ == "__main__":
    main()
