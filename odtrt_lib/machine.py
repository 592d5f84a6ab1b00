"""Facts about this machine: GPU, driver, memory, a Jetson's release; and the memory that is free.

They come from the driver's libraries and from ``/proc``. No program is started, and no CUDA context is
created.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
import re
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

MIB = 1 << 20

_DRIVER_FILES = ("/sys/module/nvidia/version", "/proc/driver/nvidia/version")
_L4T_FILE = "/etc/nv_tegra_release"


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a plan can depend on besides the library. A field is None if it is unknown or there is no GPU.

    gpu_memory_mb: MiB of the device, or of the MIG slice. cuda: the newest CUDA that the driver supports.
    l4t: the Jetson's Linux for Tegra release, e.g. ``R36.4.3``.
    """

    system: str
    architecture: str
    gpu: Optional[str] = None
    compute_capability: Optional[str] = None
    sm_count: Optional[int] = None
    gpu_memory_mb: Optional[int] = None
    driver: Optional[str] = None
    cuda: Optional[str] = None
    l4t: Optional[str] = None


def this_machine() -> Machine:
    """This machine, with the first GPU that is visible to this process (``CUDA_VISIBLE_DEVICES`` applies).

    Uses the CUDA driver library. Starts no program, creates no CUDA context and never raises.
    """
    gpu = _gpu()
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        driver=_driver_version() if gpu else None,
        l4t=_l4t(),
        **gpu,
    )


def _gpu() -> Dict[str, Any]:
    """Name, compute capability, SM count, memory and CUDA version of GPU 0; empty if there is none."""
    # Values of CUdevice_attribute in cuda.h, which never change.
    multiprocessors, major, minor = 16, 75, 76
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        number, count, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()

        def succeeds(function: str, *arguments: Any) -> bool:
            return getattr(cuda, function)(*arguments) == 0

        def attribute(which: int) -> Optional[int]:
            value = ctypes.c_int()
            asked = (ctypes.byref(value), ctypes.c_int(which), device)
            return value.value if succeeds("cuDeviceGetAttribute", *asked) else None

        if not (
            succeeds("cuInit", ctypes.c_uint(0))
            and succeeds("cuDeviceGetCount", ctypes.byref(count))
            and count.value > 0
            and succeeds("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
            and succeeds("cuDeviceGetName", name, ctypes.c_int(len(name)), device)
        ):
            return {}
        capability = (attribute(major), attribute(minor))
        has_memory = succeeds("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        has_version = succeeds("cuDriverGetVersion", ctypes.byref(number))
        return {
            "gpu": name.value.decode("utf-8", "replace"),
            "compute_capability": None if None in capability else f"{capability[0]}.{capability[1]}",
            "sm_count": attribute(multiprocessors),
            "gpu_memory_mb": memory.value >> 20 if has_memory else None,
            "cuda": f"{number.value // 1000}.{number.value % 1000 // 10}" if has_version else None,
        }
    except (OSError, AttributeError):
        return {}


def _driver_version() -> Optional[str]:
    for path in _DRIVER_FILES:
        with contextlib.suppress(OSError):
            text = Path(path).read_text(encoding="utf-8", errors="replace")
            found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
            if found:
                return found.group()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        version = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0:
            answered = nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version))) == 0
            nvml.nvmlShutdown()
            return version.value.decode("utf-8", "replace") if answered else None
    except (OSError, AttributeError):
        pass
    return None


def _l4t() -> Optional[str]:
    """A Jetson's release, e.g. ``R36.4.3`` from ``# R36 (release), REVISION: 4.3, GCID: ...``; or None."""
    try:
        text = Path(_L4T_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"(R\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found.group(1)}.{found.group(2)}" if found else None


def free_memory() -> int:
    """Bytes of host memory that a new process can use: what is available, or less if its cgroup limits it."""
    known = meminfo()
    free = [known["MemAvailable"]] if "MemAvailable" in known else []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                names = ("memory.max", "memory.current")
                root = Path("/sys/fs/cgroup")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
                root = Path("/sys/fs/cgroup/memory")
            else:
                continue
            for place in (root / path.lstrip("/"), root):
                with contextlib.suppress(OSError, ValueError):
                    limit, used = (int((place / name).read_text()) for name in names)
                    free.append(max(0, limit - used))
    return min(free) if free else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def meminfo() -> Dict[str, int]:
    """The values of /proc/meminfo, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def device_memory_meter() -> Tuple[Callable[[], Optional[float]], bool]:
    """A function that returns the MiB in use on the first visible GPU, and whether the GPU uses host memory.

    A Jetson's GPU does; there the function returns MemTotal minus MemAvailable. Elsewhere it asks NVML, which
    needs no CUDA context. It returns None if there is no GPU.
    """
    if Path(_L4T_FILE).exists():
        return _used_host_mb, True
    try:
        nvml: Any = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return lambda: None, False

    class Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    device, memory = ctypes.c_void_p(), Memory()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    index = int(first) if first.isdigit() else 0
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return lambda: None, False

    def used_mb() -> Optional[float]:
        if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
            return None
        return float(memory.used) / MIB

    return used_mb, False


def _used_host_mb() -> Optional[float]:
    known = meminfo()
    if "MemAvailable" not in known:
        return None
    return (known["MemTotal"] - known["MemAvailable"]) / MIB


def rss_mb(process: int) -> Optional[float]:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / MIB, 1)


def state_and_ticks(process: int) -> Tuple[str, int]:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return "?", -1


def peak_rss_mb(process: Union[int, str]) -> Optional[float]:
    """The peak host memory of a process, in MiB; None if the process has ended.

    Read from /proc, not from getrusage: a child's ``ru_maxrss`` starts with its parent's, so a build that a
    large notebook started would seem to be large.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    return None
