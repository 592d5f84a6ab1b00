"""Which TensorRT a Jetson has, and what that TensorRT offers: facts for chapters 3 to 6, as data.

A Jetson's TensorRT comes with its JetPack and cannot be replaced alone. So the JetPack release determines the
plugin interface, the way to half precision and the way to INT8. odtrt has run nothing on a board: the rows of
:data:`JETPACKS` name their sources, and ``tests/test_boards.py`` compares :data:`TENSORRT` with the names in
NVIDIA's own Python bindings (``results/tensorrt_names.json``).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Dict, Optional, Tuple


@dataclasses.dataclass(frozen=True)
class JetPack:
    """A JetPack release.

    l4t: its releases of Jetson Linux, as ``/etc/nv_tegra_release`` names them. python: the system's version.
    is_vendor_stated: whether NVIDIA's own pages state the TensorRT version; otherwise only third parties do.
    """

    release: str
    l4t: Tuple[str, ...]
    boards: str
    tensorrt: str
    cuda: str
    python: str
    is_vendor_stated: bool
    source: str


@dataclasses.dataclass(frozen=True)
class TensorRTLine:
    """What one line of TensorRT releases offers to odtrt.

    since: the first release of the line. plugin: the interface that ``OdtrtDetect`` uses there.
    half_precision, int8: how a plan gets them. is_supported: whether odtrt builds engines with it.
    """

    name: str
    since: Tuple[int, int]
    plugin: str
    half_precision: str
    int8: str
    has_version_compatible: bool
    has_hardware_compatible: bool
    has_progress: bool
    is_supported: bool


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of board that a workstation can compile for.

    board: its name in :attr:`JetPack.boards`. gpu: its compute capability without the point.
    """

    board: str
    gpu: str
    architecture: str = "aarch64"


TARGETS: Dict[str, Target] = {
    "jetson-xavier": Target("Xavier", "72"),
    "jetson-orin": Target("Orin", "87"),
    "jetson-thor": Target("Thor", "110"),
}
"""What `make plugin TARGET=` and `odtrt pack --target` know."""

JETPACKS: Tuple[JetPack, ...] = (
    JetPack("4.6", ("R32.6.1",), "Nano, TX1, TX2, Xavier", "8.0.1", "10.2", "3.6", True, "JetPack archive"),
    JetPack(
        "4.6.1 to 4.6.6",
        ("R32.7.1", "R32.7.2", "R32.7.3", "R32.7.4", "R32.7.5", "R32.7.6"),
        "Nano, TX1, TX2, Xavier",
        "8.2.1",
        "10.2",
        "3.6",
        True,
        "JetPack archive",
    ),
    JetPack("5.0.2", ("R35.1.0",), "Xavier, Orin", "8.4.1", "11.4", "3.8", True, "JetPack archive"),
    JetPack(
        "5.1 to 5.1.5",
        ("R35.2.1", "R35.3.1", "R35.4.1", "R35.5.0", "R35.6.0", "R35.6.1"),
        "Xavier, Orin",
        "8.5.2",
        "11.4",
        "3.8",
        True,
        "JetPack archive",
    ),
    JetPack(
        "6.0", ("R36.3.0",), "Orin", "8.6.2", "12.2", "3.10", False, "package names in jetson-containers"
    ),
    JetPack("6.1", ("R36.4.0",), "Orin", "10.3", "12.6", "3.10", True, "Torch-TensorRT's page on JetPack"),
    JetPack(
        "6.2, 6.2.1",
        ("R36.4.3", "R36.4.4"),
        "Orin",
        "10.3",
        "12.6",
        "3.10",
        True,
        "Torch-TensorRT's page on JetPack",
    ),
    JetPack(
        "7.0, 7.1",
        ("R38.2.0", "R38.2.1", "R38.4.0"),
        "Thor",
        "10.13",
        "13.0",
        "3.12",
        False,
        "not seen on a page of NVIDIA's",
    ),
    JetPack("7.2", ("R39.2.0",), "Orin, Thor", "10.16", "13.2", "3.12", False, "public build logs"),
)
"""JetPack releases, oldest first. A release that is not here may exist: ask the board, not this table."""

TENSORRT: Tuple[TensorRTLine, ...] = (
    TensorRTLine("8.0 to 8.4", (8, 0), "none", "none", "none", False, False, False, False),
    TensorRTLine(
        "8.5", (8, 5), "IPluginV2DynamicExt", "builder flag", "calibrator or Q/DQ", False, False, False, True
    ),
    TensorRTLine(
        "8.6", (8, 6), "IPluginV2DynamicExt", "builder flag", "calibrator or Q/DQ", True, True, False, True
    ),
    # No JetPack contains it, and no package index has its bindings.
    TensorRTLine(
        "9",
        (9, 0),
        "IPluginV2DynamicExt",
        "builder flag or ONNX",
        "calibrator or Q/DQ",
        True,
        True,
        False,
        False,
    ),
    TensorRTLine(
        "10", (10, 0), "IPluginV3", "builder flag or ONNX", "calibrator or Q/DQ", True, True, True, True
    ),
    TensorRTLine("11", (11, 0), "IPluginV3", "ONNX", "Q/DQ", True, True, True, True),
)
"""Lines of TensorRT releases, oldest first, as far as they differ for odtrt."""


def jetpack(l4t: str) -> Optional[JetPack]:
    """The JetPack of a Jetson Linux release such as ``R36.4.3``; None if :data:`JETPACKS` lacks it.

    If only the last number of a release is newer than that of a listed one, as in ``R36.4.7``, it counts as
    an update of the listed one.
    """
    family = l4t.rpartition(".")[0]
    older = [
        (_numbers(release), one)
        for one in JETPACKS
        for release in one.l4t
        if release.rpartition(".")[0] == family and _numbers(release) <= _numbers(l4t)
    ]
    return max(older, key=lambda found: found[0])[1] if older else None


def _numbers(l4t: str) -> Tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", l4t))


def tensorrt_line(version: str) -> TensorRTLine:
    """The line to which a TensorRT version such as ``10.3.0`` belongs.

    Raises ValueError if ``version`` is no version, or is older than the oldest line.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    lines = [line for line in TENSORRT if found and line.since <= (int(found[1]), int(found[2]))]
    if not lines:
        raise ValueError(f"{version!r}: expected a TensorRT version from {TENSORRT[0].name} on")
    return lines[-1]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The GPU of a Jetson module at the highest clock of its fastest power mode.

    module: its name at NVIDIA. board: in :attr:`JetPack.boards`. sms: streaming multiprocessors. max_mhz:
    the GPU's clock. bandwidth_gbs: the memory's peak, in 10^9 bytes a second. l2_kib: the L2 cache, None if
    no source is known. source: of the figures. DLAs are not part of it.
    """

    module: str
    board: str
    compute_capability: str
    sms: int
    max_mhz: float
    bandwidth_gbs: float
    l2_kib: Optional[int]
    source: str

    def peak(self, precision: str) -> Optional[float]:
        """Dense operations a second at most, a multiplication and an addition each one; None if the GPU has
        no such arithmetic. precision: ``fp32`` (TF32 counts, where there is it), ``fp16`` or ``int8``."""
        operations = OPERATIONS_PER_CLOCK[self.compute_capability].get(precision)
        return None if operations is None else operations * self.sms * self.max_mhz * 1e6


OPERATIONS_PER_CLOCK: Dict[str, Dict[str, int]] = {
    "5.3": {"fp32": 256, "fp16": 512},
    "6.2": {"fp32": 256, "fp16": 512},
    "7.2": {"fp32": 128, "fp16": 1024, "int8": 2048},
    "8.7": {"fp32": 1024, "fp16": 2048, "int8": 4096},
    "11.0": {"fp32": 4096, "fp16": 8192, "int8": 16384},
}
"""Dense operations of one streaming multiprocessor in a clock: compute capability -> precision -> number.

From the architectures' white papers: Maxwell and Pascal by half2, the others by tensor cores, fp32 from 8.7
on in TF32. Those of 11.0 follow from the 2,070 sparse FP4 TFLOPS that NVIDIA states for the T5000.
"""

_SHEET = "data sheet of the module"
_MODULES = "data sheet of the module; L2 by deviceQuery"

GPUS: Tuple[Gpu, ...] = (
    Gpu("Nano", "Nano", "5.3", 1, 921.6, 25.6, 256, _MODULES),
    Gpu("TX2", "TX2", "6.2", 2, 1300, 59.7, 512, _MODULES),
    Gpu("Xavier NX", "Xavier", "7.2", 6, 1100, 59.7, 512, _MODULES),
    Gpu("AGX Xavier", "Xavier", "7.2", 8, 1377, 136.5, 512, _MODULES),
    Gpu("Orin Nano 4 GB", "Orin", "8.7", 4, 625, 34, None, _SHEET),
    Gpu("Orin Nano 8 GB", "Orin", "8.7", 8, 625, 68, None, _SHEET),
    Gpu("Orin Nano 8 GB Super", "Orin", "8.7", 8, 1020, 102, None, _SHEET),
    Gpu("Orin NX 8 GB", "Orin", "8.7", 8, 765, 102.4, 2048, _MODULES),
    Gpu("Orin NX 16 GB", "Orin", "8.7", 8, 918, 102.4, 2048, _MODULES),
    Gpu("Orin NX 16 GB Super", "Orin", "8.7", 8, 1173, 102.4, 2048, _MODULES),
    Gpu("AGX Orin 32 GB", "Orin", "8.7", 14, 930, 204.8, 4096, _MODULES),
    Gpu("AGX Orin 64 GB", "Orin", "8.7", 16, 1300, 204.8, 4096, _MODULES),
    Gpu("AGX Thor T5000", "Thor", "11.0", 20, 1575, 273, 32768, _MODULES),
)
"""Jetson modules, for bounds. NVIDIA's "TOPS" are not here: they count zeros (sparsity) and the DLAs."""


def gpu(module: str) -> Gpu:
    """The row of :data:`GPUS` with this name. Raises ValueError if there is none."""
    for one in GPUS:
        if one.module == module:
            return one
    raise ValueError(f"{module!r}: expected one of {', '.join(one.module for one in GPUS)}")
