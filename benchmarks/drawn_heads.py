"""Drawn heads of a detector that sees some objects: what a benchmark needs where nothing was recorded.

The anchors that lie on one regress to it and score by how well they lie, in its class and, less,
in a few related ones; everything else scores low. Scores at the head of the order are as dense as a real
detector's, which random numbers are not.
"""

from __future__ import annotations

import numpy as np


def grid_anchors(count: int) -> np.ndarray:
    """float32 [count, 4], ``(ycenter, xcenter, height, width)``: levels of a pyramid, finest first."""
    rows = []
    left, size = count, 0.04
    while left > 0:
        at_level = left if left < 64 else int(left * 0.75)
        side = max(1, int(np.ceil(np.sqrt(at_level / 9))))
        centres = (
            np.stack(np.meshgrid(range(side), range(side), indexing="ij"), -1).reshape(-1, 2) + 0.5
        ) / side
        centres = np.repeat(centres, 9, axis=0)[:at_level]
        aspects = np.tile(np.sqrt([0.5, 1.0, 2.0] * 3), side * side)[:at_level]
        scales = np.tile(np.repeat([1.0, 1.26, 1.59], 3), side * side)[:at_level] * size
        rows.append(np.column_stack([centres, scales * aspects, scales / aspects]))
        left, size = left - len(rows[-1]), size * 2
    return np.concatenate(rows)[:count].astype(np.float32)


def draw(
    seed: int, objects: int, anchors: np.ndarray, num_classes: int, scales: tuple[float, float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Encodings float32 [N, 4] and class logits float32 [N, num_classes] of one image."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(0.04), np.log(0.4), objects))[:, None] * np.exp(
        rng.normal(0, 0.2, (objects, 2))
    )
    middles = rng.uniform(0.35, 0.65, (3, 2))[rng.integers(0, 3, objects)] + rng.normal(0, 0.15, (objects, 2))
    classes = rng.integers(0, max(1, num_classes // 8), objects)
    low = np.maximum(anchors[:, None, :2] - anchors[:, None, 2:] / 2, middles - sizes / 2)
    high = np.minimum(anchors[:, None, :2] + anchors[:, None, 2:] / 2, middles + sizes / 2)
    shared = np.prod(np.clip(high - low, 0, None), -1)
    iou = shared / (np.prod(anchors[:, 2:], -1)[:, None] + np.prod(sizes, -1) - shared)
    best = iou.argmax(1)
    fit = iou[np.arange(len(anchors)), best]
    on_object = fit > 0.2
    logits = rng.normal(-8.5, 0.8, (len(anchors), num_classes)).astype(np.float32)
    rows = np.flatnonzero(on_object)
    logits[rows, classes[best[rows]]] = 7 * fit[rows] - 5 + rng.normal(0, 0.7, len(rows))
    for step in (1, 2, 3):
        related = (classes[best[rows]] + step) % num_classes
        logits[rows, related] = np.maximum(
            logits[rows, related], 4 * fit[rows] - 6.5 + rng.normal(0, 1, len(rows))
        )
    wanted = np.concatenate([middles, sizes], 1)[best]
    encodings = rng.normal(0, 0.1, (len(anchors), 4))
    jitter = rng.normal(0, 0.06, (len(rows), 4))
    encodings[rows, :2] = (wanted[rows, :2] - anchors[rows, :2]) / anchors[rows, 2:] + jitter[:, :2]
    encodings[rows, 2:] = np.log(wanted[rows, 2:] / anchors[rows, 2:]) + jitter[:, 2:]
    return (encodings * np.array(scales)).astype(np.float32), logits
