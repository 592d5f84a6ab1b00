"""Reads annotations in COCO's form, strictly, for the metrics and to find the images.

A file is checked before any picture is opened. Common deviations are accepted: ``area`` or ``iscrowd`` absent
or null, numbers as text, ids that are words, annotation ids (which nobody needs) that repeat, start at 0 or
are absent. Anything that could change a metric is refused.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from odtrt_lib.errors import InputError, one_line

Identity = Union[int, str]

_EXPECTED = "a COCO instances file with images, annotations and categories"
# pycocotools ignores larger objects.
_MAX_AREA = 1e10


@dataclass(frozen=True)
class Annotation:
    """One object. bbox: ``(x, y, width, height)`` in pixels. area: in square pixels."""

    image_id: Identity
    category_id: int
    bbox: Tuple[float, float, float, float]
    area: float
    is_crowd: bool


@dataclass(frozen=True)
class Instances:
    """The content of an instances file. source: its name, for messages.

    files: image id -> ``file_name``, None if the entry has none. class_names: category id -> name.
    objects: in the file's order.
    """

    source: str
    files: Dict[Identity, Optional[str]]
    class_names: Dict[int, str]
    objects: Tuple[Annotation, ...]


@dataclass(frozen=True)
class CocoFolder:
    """The images and the ground truth of one COCO instances file.

    paths: the image files, in the order of ``image_ids``.
    image_ids: the ids in the annotation file.
    boxes: for each image float32 [K, 4], ``[ymin, xmin, ymax, xmax]`` in pixels.
    class_ids: for each image int64 [K], the category ids of the file.
    crowd: for each image bool [K]; True marks a region that is ignored in evaluation.
    class_names: category id -> name.
    instances: the content of the file.
    """

    annotations: Path
    paths: Tuple[Path, ...]
    image_ids: Tuple[Identity, ...]
    boxes: Tuple[np.ndarray, ...]
    class_ids: Tuple[np.ndarray, ...]
    crowd: Tuple[np.ndarray, ...]
    class_names: Dict[int, str]
    instances: Instances


def load_coco(annotations: Union[str, Path], images_root: Union[str, Path, None] = None) -> CocoFolder:
    """Reads a COCO instances file and finds its images, without opening them.

    An image is ``images_root / file_name``; by default the root is the folder of the annotations. If that
    file does not exist, the image is the one file below the root whose path ends with ``file_name``, or whose
    path is the end of ``file_name``. So a root that is one folder too high works, and so does another
    machine's absolute path. No file outside of the root is used.

    Raises InputError, naming the file and the entry, if the file is damaged or malformed, if an image is
    missing, if several files could be one image, or if two images are one file.
    """
    path = Path(annotations)
    root = Path(images_root) if images_root is not None else path.parent
    instances = read_instances(path)
    paths = _locate_images(instances, root)
    objects: Dict[Identity, List[Annotation]] = {image_id: [] for image_id in instances.files}
    for one in instances.objects:
        objects[one.image_id].append(one)
    return CocoFolder(
        annotations=path,
        paths=paths,
        image_ids=tuple(objects),
        boxes=tuple(_corners([one.bbox for one in own]) for own in objects.values()),
        class_ids=tuple(np.array([one.category_id for one in own], np.int64) for own in objects.values()),
        crowd=tuple(np.array([one.is_crowd for one in own], np.bool_) for own in objects.values()),
        class_names=instances.class_names,
        instances=instances,
    )


def read_instances(annotations: Union[str, Path, Dict[str, Any]]) -> Instances:
    """Reads a COCO instances file, or its content. Raises InputError, naming the file and the entry."""
    source = "annotations" if isinstance(annotations, dict) else str(annotations)
    data = annotations if isinstance(annotations, dict) else read_json(annotations, _EXPECTED)
    if not isinstance(data, dict):
        raise InputError(f"{source}: a JSON {type(data).__name__}, expected an object: {_EXPECTED}")
    for part in ("images", "annotations", "categories"):
        if not isinstance(data.get(part), list):
            raise InputError(f"{source}: has no list `{part}`; expected {_EXPECTED}")
    place = ""
    try:
        class_names: Dict[int, str] = {}
        for i, entry in enumerate(data["categories"]):
            place = f"categories[{i}]"
            category_id = identity(_field(entry, "id"))
            if not isinstance(category_id, int):
                raise ValueError(f"id {_shown(category_id)}, expected a whole number")
            _add(class_names, category_id, _name(entry))
        files: Dict[Identity, Optional[str]] = {}
        for i, entry in enumerate(data["images"]):
            place = f"images[{i}]"
            _add(files, identity(_field(entry, "id")), _file_name(entry))
        objects = []
        for i, entry in enumerate(data["annotations"]):
            place = f"annotations[{i}]"
            objects.append(_annotation(entry, files, class_names))
    except ValueError as error:
        raise InputError(f"{source}: {place}: {one_line(error)}; mend or leave out this entry") from error
    return Instances(source, files, class_names, tuple(objects))


def read_json(path: Union[str, Path], expected: str) -> Any:
    """The content of a JSON file. Raises InputError if it is absent, damaged or nested too deep."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged JSON ({one_line(error)}); expected {expected}") from error
    except (RecursionError, MemoryError) as error:
        what = "too large for the memory" if isinstance(error, MemoryError) else "nested too deep"
        raise InputError(f"{path}: {what}; expected {expected}") from None


def identity(value: Any) -> Identity:
    """An id in the form for comparisons: 7, 7.0 and "7" are the same. Raises ValueError if it is no id."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value:
        is_number = value.isascii() and value.isdigit() and len(value) < 20 and str(int(value)) == value
        return int(value) if is_number else value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise ValueError(f"id {_shown(value)}, expected a whole number or a word")


def number(value: Any) -> float:
    """A finite number, from a number or a text. Raises ValueError for anything else."""
    try:
        is_one = isinstance(value, (int, float, str, np.number)) and not isinstance(value, bool)
        found = float(value) if is_one else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{_shown(value)}, expected a finite number")
    return found


def _annotation(entry: Any, files: Dict[Identity, Optional[str]], class_names: Dict[int, str]) -> Annotation:
    image_id, category_id = identity(_field(entry, "image_id")), identity(_field(entry, "category_id"))
    bbox = _field(entry, "bbox")
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4:
        raise ValueError(f"bbox {_shown(bbox)}, expected [x, y, width, height]")
    x, y, width, height = map(number, bbox)
    if min(width, height) < 0:
        raise ValueError(f"bbox {_shown(bbox)}, expected a width and a height of at least 0")
    if image_id not in files:
        raise ValueError(f"image_id {_shown(image_id)}, which no entry of `images` has")
    if category_id not in class_names:
        raise ValueError(f"category_id {_shown(category_id)}, which no entry of `categories` has")
    area = width * height if entry.get("area") is None else number(entry["area"])
    if not 0 <= area <= _MAX_AREA:
        raise ValueError(f"area {area:g}, expected 0 to {_MAX_AREA:g} square pixels")
    crowd = entry.get("iscrowd")
    is_crowd = float(crowd) if isinstance(crowd, bool) else 0.0 if crowd is None else number(crowd)
    if is_crowd not in (0.0, 1.0):
        raise ValueError(f"iscrowd {_shown(crowd)}, expected 0 or 1")
    return Annotation(image_id, int(category_id), (x, y, width, height), area, bool(is_crowd))


def _field(entry: Any, name: str) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"{_shown(entry)}, expected an object")
    if name not in entry:
        raise ValueError(f"has no '{name}'")
    return entry[name]


def _name(entry: Dict[str, Any]) -> str:
    name = _field(entry, "name")
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise ValueError(f"name {_shown(name)}, expected text")
    return str(name)


def _file_name(entry: Dict[str, Any]) -> Optional[str]:
    name = entry.get("file_name")
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"file_name {_shown(name)}, expected the image's path")
    return name


def _add(known: Dict[Any, Any], key: Identity, value: Any) -> None:
    """Adds an entry. An equal entry with the same id is ignored, and a different one is an error."""
    if known.setdefault(key, value) != value:
        raise ValueError(f"id {_shown(key)} is that of {_shown(known[key])} and of {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _corners(boxes: Sequence[Tuple[float, float, float, float]]) -> np.ndarray:
    return np.array([[y, x, y + h, x + w] for x, y, w, h in boxes], np.float32).reshape(-1, 4)


def _locate_images(instances: Instances, root: Path) -> Tuple[Path, ...]:
    for image_id, name in instances.files.items():
        if name is None:
            raise InputError(f"{instances.source}: image {_shown(image_id)} has no 'file_name'")
    names = {image_id: _parts(name or "") for image_id, name in instances.files.items()}
    found = {image_id: _below(root, parts) for image_id, parts in names.items()}
    by_name: Dict[str, List[Path]] = {}
    if not all(found.values()):
        by_name = _files_by_name(root)
        for image_id, parts in names.items():
            if found[image_id] is None:
                found[image_id] = _agreeing(instances, image_id, parts, root, by_name)
    missing = [image_id for image_id, path in found.items() if path is None]
    if missing:
        raise InputError(
            f"{instances.source}: {len(missing)} of its {len(names)} images are not below {root}, the first "
            f"is {instances.files[missing[0]]}: name with --images the folder that the file names start from"
            f"{_advice(names[missing[0]], by_name)}"
        )
    first: Dict[Path, Identity] = {}
    for image_id, path in found.items():
        assert path is not None
        if first.setdefault(path, image_id) != image_id:
            raise InputError(
                f"{instances.source}: images {_shown(first[path])} and {_shown(image_id)} are both {path}; "
                "expected one file for each image"
            )
    return tuple(path for path in found.values() if path is not None)


def _advice(parts: Tuple[str, ...], by_name: Dict[str, List[Path]]) -> str:
    """Advice that names the root with which the most similar file would be found."""

    def agreement(path: Path) -> int:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path.parts[::-1], parts[::-1]))
        return sum(1 for _ in same)

    alike = by_name.get(parts[-1], []) if parts else []
    if not alike:
        return ""
    nearest = max(alike, key=agreement)
    return f", such as {nearest.parents[agreement(nearest) - 1]}"


def _parts(name: str) -> Tuple[str, ...]:
    """The folders and the name in a ``file_name`` of any operating system, without its root."""
    path = name if "\\" not in name else name.replace("\\", "/")
    return tuple(part for part in PurePosixPath(path).parts if part != "/")


def _below(root: Path, parts: Tuple[str, ...]) -> Optional[Path]:
    if not parts or ".." in parts:
        return None
    path = root.joinpath(*parts)
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):  # no file can have this name
        return None


def _files_by_name(root: Path) -> Dict[str, List[Path]]:
    files: Dict[str, List[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            files.setdefault(path.name, []).append(path)
    return files


def _agreeing(
    instances: Instances,
    image_id: Identity,
    parts: Tuple[str, ...],
    root: Path,
    by_name: Dict[str, List[Path]],
) -> Optional[Path]:
    """The one file whose path below the root agrees with ``parts``; None if there is none."""
    agreeing = []
    for path in by_name.get(parts[-1] if parts else "", []):
        own = path.relative_to(root).parts
        count = min(len(own), len(parts))
        if own[-count:] == parts[-count:] and ".." not in parts[-count:]:
            agreeing.append(path)
    if len(agreeing) > 1:
        raise InputError(
            f"{instances.source}: image {_shown(image_id)}, {instances.files[image_id]}, could be "
            f"{agreeing[0]} or {agreeing[1]}; write the folder into its file_name, or name with --images the "
            "folder that the file names start from"
        )
    return agreeing[0] if agreeing else None
