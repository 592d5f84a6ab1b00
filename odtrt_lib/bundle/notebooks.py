"""What a bundle brings so that the book's notebooks run on a device."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Union

import numpy as np

from odtrt_lib import IMPORT_PATH
from odtrt_lib.bundle.serving import require_source
from odtrt_lib.errors import InputError
from odtrt_lib.notebooks import RECORDS, SCENES, TRUTH, picture_of, stage_records, unseen_scene
from odtrt_lib.spec import DetectorSpec

ON_A_DEVICE = ("00_tour", "03_engine", "04_nms", "05_portability")
WORKSTATION_CELL = "workstation"


def files_to_bring(folder: Path, spec: DetectorSpec) -> Dict[str, Union[Path, bytes]]:
    """Path in the bundle -> file or content: what the notebooks of :data:`ON_A_DEVICE` need on a device.

    Those are the notebooks without the cells that are tagged :data:`WORKSTATION_CELL`, the measurements that
    they show, the records of the stages that made ``folder``, the first test scenes with the truth about
    them, and what opens JupyterLab. Raises InputError if a file or a record is missing, or if ``spec`` is
    of a detector that knows nothing of the objects in the scenes.
    """
    checkout = Path(IMPORT_PATH)
    names = {"notebooks/requirements.txt", "notebooks/lab.sh"}
    files: Dict[str, Union[Path, bytes]] = {
        RECORDS: (json.dumps(stage_records(folder), indent=1) + "\n").encode()
    }
    for path in (f"notebooks/{name}.ipynb" for name in ON_A_DEVICE):
        notebook = json.loads(require_source(checkout / path).read_text(encoding="utf-8"))
        notebook["cells"] = [cell for cell in notebook["cells"] if _runs_on_a_device(cell)]
        names.update(_results_of(notebook["cells"]))
        files[path] = (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()
    files.update((name, require_source(checkout / name)) for name in names)
    truth = []
    for number in range(SCENES):
        scene = unseen_scene(number)
        unknown = set(scene.names) - {label.name for label in spec.labels}
        if unknown:
            raise InputError(f"{spec.name}: has no class {min(unknown)}; the notebooks are of models/parts")
        files[picture_of(number)] = _as_png(scene.image)
        boxes, class_ids = scene.boxes.tolist(), scene.class_ids.tolist()
        truth.append({"boxes": boxes, "class_ids": class_ids, "names": list(scene.names)})
    files[TRUTH] = (json.dumps(truth) + "\n").encode()
    return files


def _runs_on_a_device(cell: Mapping[str, Any]) -> bool:
    return WORKSTATION_CELL not in cell["metadata"].get("tags", [])


def _results_of(cells: Sequence[Mapping[str, Any]]) -> List[str]:
    """The measurements that code cells name."""
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return re.findall(r"results/[\w.-]+\.json", "\n".join(code))


def _as_png(image: np.ndarray) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()
