"""Executes the notebooks of an unpacked bundle on a machine with a GPU; writes results/notebooks.h200.json.

    odtrt pack out/parts --notebooks -o parts.odtrt.zip         (on the workstation)
    python3 benchmarks/device_notebooks_gpu.py parts.odtrt.zip --into DIR [NAME ...] [--out DIR]

Needs nbclient, ipykernel and what else notebooks/requirements.txt names; neither TensorFlow nor OpenCV. It
unpacks the bundle into DIR, unless that was done before, runs build_here.py there, and then each notebook,
cell by cell, on this machine's TensorRT. A cell that fails does not stop it. After each cell it writes what
there is by then: the executed notebooks, beside the results, and one row for each code cell: notebook, cell,
seconds, error, and the text that the cell printed. Rows of notebooks that are not named stay as an earlier
call wrote them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

NAMES = ("00_tour", "03_engine", "04_nms", "05_portability")
CELL_SECONDS = 400


def unpacked(archive: Path, folder: Path) -> Dict[str, Any]:
    """Unpacks the bundle and builds in it, unless that was done; returns the row that says so."""
    started, said = time.perf_counter(), ""
    if not (folder / "built.json").is_file():
        for command in ([archive.resolve(), folder.name], [folder / "build_here.py"]):
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                cwd=str(folder.parent),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            print(done.stdout, end="", flush=True)
            said += done.stdout
            if done.returncode:
                raise SystemExit(f"{command[0]}: exit status {done.returncode}")
    built = json.loads((folder / "built.json").read_text(encoding="utf-8"))
    return {
        "notebook": "build_here.py",
        "cell": "",
        "seconds": round(time.perf_counter() - started, 2),
        "error": None,
        "text": said,
        "plugin": built["plugin"],
        "backend": built["backend"],
    }


def text_of(outputs: List[Any]) -> str:
    """What a cell printed, without its pictures."""
    shown = []
    for output in outputs:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            shown.append(output["text"])
        elif "text/plain" in output.get("data", {}) and len(output["data"]) == 1:
            shown.append(output["data"]["text/plain"])
    return "".join(shown)


def run(folder: Path, name: str, out: Path) -> Iterator[Dict[str, Any]]:
    """Executes a notebook of the bundle; yields a row for each code cell. Writes the notebook after each."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(str(folder / "notebooks" / f"{name}.ipynb"), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": str(folder / "notebooks")}},
    )
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with client.setup_kernel(env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}):
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            started, error = time.perf_counter(), None
            try:
                client.execute_cell(cell, number)
            except CellExecutionError as failed:
                error = f"{failed.ename}: {failed.evalue}"[:500]
            except (CellTimeoutError, DeadKernelError) as failed:
                error = f"{type(failed).__name__}: {str(failed).splitlines()[0]}"
            seconds = time.perf_counter() - started
            cell.metadata.pop("execution", None)
            nbformat.write(notebook, str(out / f"{name}.ipynb"))
            print(f"{name} {cell.id} {seconds:.1f} s {error or ''}", flush=True)
            text = text_of(cell.outputs)
            yield {
                "notebook": name,
                "cell": cell.id,
                "seconds": round(seconds, 2),
                "error": error,
                "text": text,
            }
            if error is not None and error.startswith(("CellTimeoutError", "DeadKernelError")):
                return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument(
        "--into", type=Path, required=True, help="where to unpack; an absent folder, or an earlier one"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="for the results and the notebooks")
    options = parser.parse_args()
    folder = options.into.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "notebooks.h200.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    rows = [row for row in earlier if row["notebook"] not in options.names]
    if not rows or rows[0]["notebook"] != "build_here.py":
        rows.insert(0, unpacked(options.bundle, folder))
    sys.path.insert(0, str(folder))  # the bundle's odtrt_lib: there may be no other
    from odtrt_lib.engine import available_runtimes
    from odtrt_lib.results import write_results

    rows[0]["runtime_library"], rows[0]["runtime_version"] = available_runtimes()[0]
    command = "python3 benchmarks/device_notebooks_gpu.py parts.odtrt.zip --into DIR"
    for name in options.names:
        for row in run(folder, name, options.out):
            rows.append(row)
            write_results(path, "notebooks", command, rows)
    failed = [f"{row['notebook']} {row['cell']}: {row['error']}" for row in rows if row["error"]]
    print("\n".join(failed) or "every cell ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
