"""Memory, temperatures, clocks, power and throttling, as far as this machine tells them.

A figure that the machine does not tell is absent from the answers, never invented. The sources are ``/proc``,
``/sys`` (on a Jetson its thermal zones, devfreq nodes and INA3221 power monitors) and NVML by ctypes. Needs
the standard library only; no CUDA context is created, and nothing needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from odtrt_lib.machine import device_memory_meter, rss_mb, state_and_ticks

FIGURES = {
    "own_mb": "host memory of its own (anonymous, also swapped out), MB",
    "pss_mb": "host memory, proportional share (Pss), MB",
    "rss_mb": "host memory, resident (RSS), MB",
    "open_files": "open files",
    "threads": "threads",
    "gc_objects": "Python objects that the garbage collector knows",
    "device_memory_mb": "GPU memory in use on the device, MB",
    "system_memory_mb": "memory in use in the whole system, shared with the GPU, MB",
    "cpu_elsewhere": "CPU time that other programs take, share of the machine",
    "temperature_c": "hottest thermal zone, °C",
    "gpu_temperature_c": "GPU temperature, °C",
    "cpu_clock_mhz": "CPU clock, mean of the cores, MHz",
    "gpu_clock_mhz": "GPU clock, MHz",
    "power_w": "power, W",
    "throttled": "throttled, share of the samples",
}

# nvml.h: nvmlClocksEventReasonSwPowerCap, HwSlowdown, SwThermalSlowdown, HwThermalSlowdown,
# HwPowerBrakeSlowdown.
_THROTTLED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
_NVML_TEMPERATURE_GPU, _NVML_CLOCK_SM = 0, 1
_GPU_NODES = ("gpu", "gp10b", "gv11b", "ga10b", "gb10b")
_TOTAL_POWER = ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN", "VIN")
# PMIC's zone on a Jetson always says 100 degrees, and a zone that is off says -256.
_CONSTANT_ZONES = ("PMIC", "PMIC-Die")
_MIN_CELSIUS, _MAX_CELSIUS = -40.0, 150.0


def process_figures(process: int) -> Dict[str, float]:
    """Memory, open files and threads of a process; empty if it has ended.

    ``own_mb`` leaves out what files back, because other processes that come and go change the share of it.
    """
    folder = Path(f"/proc/{process}")
    found: Dict[str, Optional[float]] = {"rss_mb": rss_mb(process)}
    with contextlib.suppress(OSError, ValueError, KeyError):
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE))
        if sizes:
            found["pss_mb"] = int(sizes["Pss"]) / 1024
            found["own_mb"] = (int(sizes["Anonymous"]) + int(sizes["Swap"])) / 1024
    with contextlib.suppress(OSError):
        found["open_files"] = float(len(list((folder / "fd").iterdir())))
        found["threads"] = float(len(list((folder / "task").iterdir())))
    return {name: value for name, value in found.items() if value is not None}


class Elsewhere:
    """How busy the machine is with other programs than this process and its worker.

    processor_times: the content of ``/proc/stat``; ticks: CPU time of a process, as of
    :func:`odtrt_lib.machine.state_and_ticks`. Tests replace both.
    """

    def __init__(
        self,
        processor_times: Callable[[], str] = lambda: _text(Path("/proc/stat")),
        ticks: Callable[[int], int] = lambda process: state_and_ticks(process)[1],
    ) -> None:
        self._processor_times, self._ticks = processor_times, ticks
        self._before: Optional[Tuple[int, int, int, int]] = None

    def share(self, worker: int) -> Optional[float]:
        """The share of the CPU time since the last call, 0 to 1; None if it is not known.

        Time that a hypervisor gave to other machines counts as taken.
        """
        match = re.match(r"cpu +(\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", self._processor_times())
        if match is None:
            return None
        times = list(map(int, match.groups()))
        idle, total = times[3] + times[4], sum(times)
        own = self._ticks(worker) + self._ticks(os.getpid())
        before, self._before = self._before, (worker, idle, total, own)
        if before is None or before[0] != worker or total <= before[2]:
            return None
        passed = total - before[2]
        elsewhere = passed - (idle - before[1]) - (own - before[3])
        return min(max(elsewhere / passed, 0.0), 1.0)


class Sensors:
    """The sensors of this machine. root: where ``/sys`` and ``/proc`` are, for tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._sys = root / "sys"
        self._zones = [
            zone / "temp"
            for zone in sorted((self._sys / "devices/virtual/thermal").glob("thermal_zone*"))
            if _text(zone / "type") not in _CONSTANT_ZONES
        ]
        self._gpu_clock = self._devfreq()
        self._cpu_clocks = sorted((self._sys / "devices/system/cpu").glob("cpu*/cpufreq/scaling_cur_freq"))
        self._rails = self._power_rails()
        self._alarms = sorted(self._sys.glob("bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/curr*_crit_alarm"))
        self._nvml = _nvml() if root == Path("/") else {}
        self._used_mb, self._is_shared = device_memory_meter()

    def read(self) -> Dict[str, float]:
        """The figures that can be read now; see :data:`FIGURES` for names and units."""
        found: Dict[str, Optional[float]] = {name: read() for name, read in self._nvml.items()}
        zones = [value / 1e3 for value in map(_number, self._zones) if value is not None]
        zones = [value for value in zones if _MIN_CELSIUS < value < _MAX_CELSIUS]
        found["temperature_c"] = max(zones) if zones else None
        clocks = [value / 1e3 for value in map(_number, self._cpu_clocks) if value is not None]
        found["cpu_clock_mhz"] = sum(clocks) / len(clocks) if clocks else None
        if self._gpu_clock is not None:
            hertz = _number(self._gpu_clock)
            found["gpu_clock_mhz"] = None if hertz is None else hertz / 1e6
        watts = [_watts(folder, channel) for folder, channel in self._rails]
        if watts and None not in watts:
            found["power_w"] = sum(value for value in watts if value is not None)
        if self._alarms:
            found["throttled"] = float(any(_number(alarm) for alarm in self._alarms))
        found["system_memory_mb" if self._is_shared else "device_memory_mb"] = self._used_mb()
        return {name: value for name, value in found.items() if value is not None}

    def _devfreq(self) -> Optional[Path]:
        for node in sorted((self._sys / "class/devfreq").glob("*")):
            name = _text(node / "device/of_node/name") or node.name.rpartition(".")[2]
            if name in _GPU_NODES or node.name.startswith("gpu-gpc"):
                return node / "cur_freq"
        return None

    def _power_rails(self) -> List[Any]:
        """The channel of the whole board's power if there is one, otherwise every channel that has a name."""
        rails = {}
        for label in sorted(self._sys.glob("bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label")):
            name, channel = _text(label), label.name[len("in") : -len("_label")]
            if name not in ("", "NC", "sum of shunt voltages") and channel != "7":
                rails[name] = (label.parent, channel)
        total = [rails[name] for name in _TOTAL_POWER if name in rails]
        return total[:1] or list(rails.values())


def _watts(folder: Path, channel: str) -> Optional[float]:
    millivolts = _number(folder / f"in{channel}_input")
    milliamperes = _number(folder / f"curr{channel}_input")
    return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1e6


def _nvml() -> Dict[str, Callable[[], Optional[float]]]:
    """What NVML tells of the first visible GPU; only what it answers now. Empty without NVML."""
    try:
        nvml: Any = ctypes.CDLL("libnvidia-ml.so.1")
        device = ctypes.c_void_p()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        index = int(first) if first.isdigit() else 0
        if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
            return {}
    except (OSError, AttributeError):
        return {}

    def asking(names: List[str], kind: Any, *arguments: Any) -> Callable[[], Optional[float]]:
        function = next((getattr(nvml, name) for name in names if hasattr(nvml, name)), None)

        def ask() -> Optional[float]:
            value = kind()
            if function is None or function(device, *arguments, ctypes.byref(value)) != 0:
                return None
            return float(value.value)

        return ask

    milliwatts = asking(["nvmlDeviceGetPowerUsage"], ctypes.c_uint)
    reasons = asking(
        ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"],
        ctypes.c_ulonglong,
    )
    found: Dict[str, Callable[[], Optional[float]]] = {
        "gpu_temperature_c": asking(["nvmlDeviceGetTemperature"], ctypes.c_uint, _NVML_TEMPERATURE_GPU),
        "gpu_clock_mhz": asking(["nvmlDeviceGetClockInfo"], ctypes.c_uint, _NVML_CLOCK_SM),
        "power_w": lambda: _scaled(milliwatts(), 1e-3),
        "throttled": lambda: _is_throttled(reasons()),
    }
    return {name: read for name, read in found.items() if read() is not None}


def _scaled(value: Optional[float], factor: float) -> Optional[float]:
    return None if value is None else factor * value


def _is_throttled(reasons: Optional[float]) -> Optional[float]:
    return None if reasons is None else float(bool(int(reasons) & _THROTTLED))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _number(path: Path) -> Optional[float]:
    text = _text(path)
    return float(text) if re.fullmatch(r"-?\d+", text) else None
