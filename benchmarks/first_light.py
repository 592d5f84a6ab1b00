"""Clones the project into an empty folder and measures what the README's two commands cost.

    python benchmarks/first_light.py       writes results/first_light.cpu.json

Wall time includes every download; disk is what the clone's folder holds afterwards. The package cache
is a fresh one, so that nothing installed earlier helps.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

from odtrt_lib.results import write_results

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as work:
        clone = Path(work) / "odtrt"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {**os.environ, "UV_CACHE_DIR": str(Path(work) / "cache"), "PIP_NO_CACHE_DIR": "1"}
        for command in (["make", "run"], ["make", "test"]):
            started = time.perf_counter()
            subprocess.run(command, cwd=clone, env=environment, check=True)
            rows.append(
                {
                    "command": " ".join(command),
                    "wall_seconds": round(time.perf_counter() - started, 1),
                    "disk_mb": disk_megabytes(Path(work)),
                }
            )
    write_results(
        ROOT / "results" / "first_light.cpu.json", "first_light", "python benchmarks/first_light.py", rows
    )


def disk_megabytes(folder: Path) -> int:
    return int(subprocess.check_output(["du", "-sm", str(folder)], text=True).split()[0])


if __name__ == "__main__":
    main()
