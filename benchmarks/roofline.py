"""The least time that a network can take on each Jetson, held against what others have measured there.

    python benchmarks/roofline.py [FOLDER...]

writes results/roofline.cpu.json. FOLDER: a model folder after `odtrt convert`; default: all in ``out/``. It
only counts and divides: no network runs. Every figure whose name begins with ``bound`` is a bound from below,
no measurement; see :mod:`odtrt_lib.latency.roofline`.

* ``row`` = ``network``: its operations. ``tensorflow_gmac``: of the same frozen graph by TensorFlow's own
  profiler, an independent count.
* ``kind``: the same by kind of layer, and their part of the bound on one board.
* ``bound``: a network on a board, batch 1.
* ``published``: what somebody measured (``published_ms``), and the bound for it. ``times_bound``: how many
  times as long it took. Below 1, the bound would be refuted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odtrt_lib import boards
from odtrt_lib.folder import check_seal
from odtrt_lib.latency import roofline
from odtrt_lib.latency.roofline import Group
from odtrt_lib.results import write_results

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "fp16", "int8")
BOARD_OF_KINDS = "Orin NX 16 GB"


@dataclass(frozen=True)
class Published:
    """A latency at batch 1 that somebody measured on a board.

    network: with gflop and million_weights, as its authors state them (a multiplication and an addition each
    one operation); without, the name of a model folder.
    """

    module: str
    network: str
    precision: str
    ms: float
    source: str
    gflop: float | None = None
    million_weights: float | None = None


ULTRALYTICS = "Ultralytics, docs/en/guides/nvidia-jetson.md"
NOBUO = "NobuoTsukamoto/benchmarks, tensorrt/jetson/detection: JetPack 4.6.1, host latency"
IDEIN = "Idein/aicast_jetson_benchmark"
HOKWANG = "hokwangchoi/jetson-orin-nano-benchmarks: JetPack 6.2, CUDA events"
THE0807 = "the0807/YOLOv8-ONNX-TensorRT"

# GFLOP and million weights, as the authors' model tables state them.
YOLO = {
    "YOLO26n": (5.4, 2.4),
    "YOLO26s": (20.7, 9.5),
    "YOLO26m": (68.2, 20.4),
    "YOLO26l": (86.4, 24.8),
    "YOLO26x": (193.9, 55.7),
    "YOLO11n": (6.5, 2.6),
    "YOLO11x": (194.9, 56.9),
    "YOLOv8n": (8.7, 3.2),
    "YOLOv8s": (28.6, 11.2),
    "YOLOv8m": (78.9, 25.9),
    "YOLOX-S": (26.8, 9.0),
}


def by_yolo(module: str, network: str, precision: str, ms: float, source: str) -> Published:
    return Published(module, network, precision, ms, source, *YOLO[network])


PUBLISHED = (
    Published("Nano", "zoo_ssd_mobilenet_v2_fpnlite_320", "fp16", 37.99, NOBUO),
    Published("Nano", "zoo_efficientdet_d0", "fp16", 118.46, NOBUO),
    Published("Nano", "ft_effd1_carparts18", "fp16", 251.24, f"{NOBUO}; there with 90 classes"),
    Published("Nano", "ft_effd1_carparts18", "fp32", 294.00, f"{NOBUO}; there with 90 classes"),
    by_yolo("Nano", "YOLOX-S", "fp32", 153.3, IDEIN),
    by_yolo("Nano", "YOLOX-S", "fp16", 93.7, IDEIN),
    by_yolo("Orin Nano 8 GB", "YOLOX-S", "fp16", 10.7, IDEIN),
    by_yolo("Orin Nano 8 GB", "YOLOX-S", "int8", 8.6, IDEIN),
    by_yolo("Orin Nano 8 GB", "YOLOv8n", "fp16", 7.3, THE0807),
    by_yolo("Orin Nano 8 GB", "YOLOv8m", "fp16", 23.6, THE0807),
    by_yolo("Orin Nano 8 GB", "YOLOv8m", "int8", 17.1, THE0807),
    by_yolo("Orin Nano 8 GB Super", "YOLOv8n", "fp32", 8.37, HOKWANG),
    by_yolo("Orin Nano 8 GB Super", "YOLOv8n", "fp16", 4.43, HOKWANG),
    by_yolo("Orin Nano 8 GB Super", "YOLOv8n", "int8", 3.49, HOKWANG),
    by_yolo("Orin Nano 8 GB Super", "YOLO26n", "fp16", 4.57, ULTRALYTICS),
    by_yolo("Orin Nano 8 GB Super", "YOLO26x", "fp16", 32.60, ULTRALYTICS),
    by_yolo("Orin Nano 8 GB Super", "YOLO26x", "int8", 19.99, ULTRALYTICS),
    by_yolo("Orin Nano 8 GB Super", "YOLO11x", "fp16", 32.94, ULTRALYTICS),
    by_yolo("Orin NX 16 GB", "YOLO26n", "fp16", 4.13, ULTRALYTICS),
    by_yolo("Orin NX 16 GB", "YOLO26x", "fp16", 26.76, ULTRALYTICS),
    by_yolo("Orin NX 16 GB", "YOLO26x", "int8", 17.32, ULTRALYTICS),
    by_yolo("AGX Orin 64 GB", "YOLO26n", "fp16", 2.62, ULTRALYTICS),
    by_yolo("AGX Orin 64 GB", "YOLO26x", "fp16", 13.50, ULTRALYTICS),
    by_yolo("AGX Orin 64 GB", "YOLO26x", "int8", 9.33, ULTRALYTICS),
    by_yolo("AGX Thor T5000", "YOLO26n", "fp16", 1.39, ULTRALYTICS),
    by_yolo("AGX Thor T5000", "YOLO26x", "fp16", 5.16, ULTRALYTICS),
    by_yolo("AGX Thor T5000", "YOLO26x", "int8", 4.72, ULTRALYTICS),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", type=Path)
    folders = parser.parse_args().folders or sorted(one.parent for one in ROOT.glob("out/*/heads.onnx"))
    if not folders:
        sys.exit("no model folder in out/: run `odtrt run models/parts`")
    networks = {folder.name: groups_of(folder) for folder in folders}
    rows = [network_row(folder, networks[folder.name]) for folder in folders]
    for name, groups in networks.items():
        rows += kind_rows(name, groups)
    for name, groups in networks.items():
        rows += bound_rows(name, groups)
    rows += published_rows(networks)
    write_results(
        ROOT / "results" / "roofline.cpu.json", "roofline", "python benchmarks/roofline.py [FOLDER...]", rows
    )
    refuted = [row for row in rows if row["row"] == "published" and row["times_bound"] < 1]
    differing = [row for row in rows if row.get("tensorflow_gmac", row.get("gmac")) != row.get("gmac")]
    for row in (*refuted, *differing):
        print(f"a bound or a count that cannot be right: {row}")
    return 1 if refuted or differing else 0


def groups_of(folder: Path) -> list[Group]:
    check_seal(folder, "heads.onnx")
    return roofline.read_groups(folder / "heads.onnx")


def network_row(folder: Path, groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "row": "network",
        "model": folder.name,
        "groups": len(groups),
        "gmac": round(sum(group.macs for group in groups) / 1e9, 6),
        "tensorflow_gmac": tensorflow_gmac(folder / "frozen.pb"),
        "gflop": round(sum(group.operations for group in groups) / 1e9, 6),
        "bound_gflop": round(sum(group.fewest_operations for group in groups) / 1e9, 6),
        "million_weights": round(sum(group.weights for group in groups) / 1e6, 4),
        "ideal_fp16_mb": round(sum(group.ideal_bytes("fp16") for group in groups) / 1e6, 3),
        "bound_fp16_mb": round(sum(group.bytes("fp16", None) for group in groups) / 1e6, 3),
    }


def tensorflow_gmac(frozen: Path) -> float:
    """Multiply-adds of the convolutions and matrix products in a frozen graph, by TensorFlow's profiler."""
    from odtrt_lib.export import odapi

    odapi.prepare()
    import tensorflow as tf

    graph_def = tf.compat.v1.GraphDef()
    graph_def.ParseFromString(frozen.read_bytes())
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
        options["output"] = "none"
        found = tf.compat.v1.profiler.profile(graph, cmd="op", options=options)
    operations, node = 0, found
    while node is not None:  # each operator is the child of the one before it
        operations += node.float_ops if node.name in ("Conv2D", "DepthwiseConv2dNative", "MatMul") else 0
        node = node.children[0] if node.children else None
    return round(operations / 2e9, 6)


def kind_rows(name: str, groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    gpu = boards.gpu(BOARD_OF_KINDS)
    whole = roofline.bound(groups, gpu, "fp16")
    for kind in sorted({group.kind for group in groups}):
        own = [group for group in groups if group.kind == kind]
        part = roofline.bound(own, gpu, "fp16")
        assert whole is not None and part is not None
        yield {
            "row": "kind",
            "model": name,
            "kind": kind,
            "groups": len(own),
            "gflop": round(sum(group.operations for group in own) / 1e9, 6),
            "million_weights": round(sum(group.weights for group in own) / 1e6, 4),
            "ideal_fp16_mb": round(sum(group.ideal_bytes("fp16") for group in own) / 1e6, 3),
            "board": BOARD_OF_KINDS,
            "bound_fp16_share": round(part.us / whole.us, 4),
        }


def bound_rows(name: str, groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    for gpu in boards.GPUS:
        for precision in PRECISIONS:
            found = roofline.bound(groups, gpu, precision)
            if found is not None:
                yield {
                    "row": "bound",
                    "model": name,
                    "board": gpu.module,
                    "precision": precision,
                    "bound_us": digits(found.us),
                    "bound_floor_us": digits(found.floor_us),
                    "bound_compute_us": digits(found.compute_us),
                    "bound_memory_us": digits(found.memory_us),
                    "memory_share": round(found.memory_bound, 3),
                    "bound_fps": digits(found.max_fps),
                }


def published_rows(networks: dict[str, list[Group]]) -> Iterator[dict[str, Any]]:
    for one in PUBLISHED:
        bound_us = bound_of(one, networks)
        if bound_us is not None:
            yield {
                "row": "published",
                "board": one.module,
                "network": one.network,
                "precision": one.precision,
                "published_ms": one.ms,
                "bound_ms": digits(bound_us / 1e3),
                "times_bound": round(1e3 * one.ms / bound_us, 2),
                "source": one.source,
            }


def bound_of(one: Published, networks: dict[str, list[Group]]) -> float | None:
    """Microseconds; None if the network is none of those that were read."""
    gpu = boards.gpu(one.module)
    if one.gflop is not None and one.million_weights is not None:
        return roofline.floor_us(1e9 * one.gflop, 1e6 * one.million_weights, gpu, one.precision)
    found = roofline.bound(networks.get(one.network, []), gpu, one.precision)
    return found.us if found is not None and found.us else None


def digits(figure: float) -> float:
    return float(f"{figure:.4g}")


if __name__ == "__main__":
    sys.exit(main())
