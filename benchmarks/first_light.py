"""Clones the project into an empty folder and measures what the README's commands cost there, in turn.

    python benchmarks/first_light.py       writes results/first_light.cpu.json

Wall time includes every download; disk is what the clone and the package cache hold afterwards. The cache
is a fresh one, so that nothing installed earlier helps. `make lab` is measured until its server answers.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from odtrt_lib.results import write_results

ROOT = Path(__file__).resolve().parent.parent
LONGEST_START = 3600.0


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as work:
        clone = Path(work) / "odtrt"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        elsewhere = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS")  # they lead out of the clone
        inherited = {name: value for name, value in os.environ.items() if name not in elsewhere}
        environment = {**inherited, "UV_CACHE_DIR": str(Path(work) / "cache"), "PIP_NO_CACHE_DIR": "1"}
        for name in ("run", "test", "book", "lab"):
            action = start_lab if name == "lab" else partial(make, name)
            wall, cpu = costs(partial(action, clone, environment))
            rows.append(
                {
                    "command": f"make {name}",
                    "wall_seconds": round(wall, 1),
                    "cpu_seconds": round(cpu, 1),
                    "disk_mb": disk_megabytes(Path(work)),
                }
            )
            print(rows[-1], flush=True)
    write_results(
        ROOT / "results" / "first_light.cpu.json", "first_light", "python benchmarks/first_light.py", rows
    )


def costs(action: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall time, and of processor time of all processes that ended in it."""
    started, used = time.perf_counter(), processor_seconds()
    action()
    return time.perf_counter() - started, processor_seconds() - used


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make(target: str, clone: Path, environment: Mapping[str, str]) -> None:
    subprocess.run(["make", target], cwd=clone, env=environment, check=True)


def start_lab(clone: Path, environment: Mapping[str, str]) -> None:
    """Starts `make lab` on a free port, waits until the server answers, and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"LAB=--no-browser --ServerApp.port={port} --ServerApp.port_retries=0"
    server = subprocess.Popen(["make", "lab", options], cwd=clone, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + LONGEST_START
        while not answers(f"http://127.0.0.1:{port}/api"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"make lab: no answer on port {port}")
            time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def disk_megabytes(folder: Path) -> int:
    return int(subprocess.check_output(["du", "-sm", str(folder)], text=True).split()[0])


if __name__ == "__main__":
    main()
