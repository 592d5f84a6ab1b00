"""What a bundle brings so that the book's notebooks run on a device."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Dict, List, Union

import numpy as np

from odtrt_lib import IMPORT_PATH
from odtrt_lib.bundle.serving import require_source
from odtrt_lib.errors import InputError
from odtrt_lib.notebooks import SCENES, TRUTH, picture_of, unseen_scene
from odtrt_lib.spec import DetectorSpec

ON_A_DEVICE = ("03_engine", "04_nms", "05_portability")


def files_to_bring(spec: DetectorSpec) -> Dict[str, Union[Path, bytes]]:
    """Path in the bundle -> file or content: what the notebooks of :data:`ON_A_DEVICE` need on a device.

    Those are the notebooks, the measurements that they show, the first :data:`SCENES` test scenes and the
    truth about them, and what opens JupyterLab. Raises InputError if a file is missing, or if ``spec`` is of
    a detector that knows nothing of the objects in the scenes.
    """
    checkout = Path(IMPORT_PATH)
    names = [*map(_notebook, ON_A_DEVICE), "notebooks/requirements.txt", "notebooks/lab.sh"]
    names += sorted({result for name in ON_A_DEVICE for result in _results_of(checkout, name)})
    files: Dict[str, Union[Path, bytes]] = {name: require_source(checkout / name) for name in names}
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


def _results_of(checkout: Path, name: str) -> List[str]:
    """The measurements that a notebook's code cells name."""
    notebook = json.loads(require_source(checkout / _notebook(name)).read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return re.findall(r"results/[\w.-]+\.json", "\n".join(code))


def _notebook(name: str) -> str:
    return f"notebooks/{name}.ipynb"


def _as_png(image: np.ndarray) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()
