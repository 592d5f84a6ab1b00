"""Label maps: the names of a detector's classes, read and checked as the OD API's ``label_map_util`` does.

A label map is a ``StringIntLabelMap`` in text format: ``item { id: 1 name: "bolt" }`` for each class. A file
that is called ``.txt`` may hold the names alone instead, one a line.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PureWindowsPath
from typing import Any, Dict, List, Optional, Sequence, Tuple

from odtrt_lib.errors import InputError
from odtrt_lib.export import prototext

_EXPECTED = 'a label map: `item { id: 1 name: "bolt" }` for each class, or a .txt file with one name a line'
_BESIDE = "label_map.pbtxt"
_BACKGROUND = ("???", "background")
_MAX_SHOWN = 80
_BRACKET = re.compile(r"[{}<>]")
_YAML_LINE = re.compile(r"---$|- |[\w./' \"-]+:( |$)")


def find(config: Path, named: Sequence[str]) -> Tuple[Optional[Path], str]:
    """The label map that belongs to a pipeline.config; and, if another one was passed over, the reason.

    named: the paths that the config names. Each is looked for relative to the config's folder, then by its
    file name beside the config. Last, ``label_map.pbtxt`` beside the config is tried. The config may come
    from a stranger, so nothing outside of its folder is read, not even through links.
    """
    root = config.parent.resolve()
    passed_over = ""
    for name in filter(None, (*named, _BESIDE)):
        for candidate in (config.parent / name, config.parent / PureWindowsPath(name).name):
            if not _is_file(candidate):
                continue
            if root in candidate.resolve().parents:
                return candidate, ""
            passed_over = passed_over or (
                f"{name[:_MAX_SHOWN]!r} was not read, because it leads out of the folder of {config.name}"
            )
    return None, passed_over


def read(path: Path, num_classes: int) -> Dict[int, str]:
    """Class id -> name, with ids from 1 to ``num_classes``. A class without a name is left out.

    As in the OD API, the first of equal ids counts, ``display_name`` takes precedence over ``name``, and id 0
    is the background's. In a ``.txt`` file of names, the first line may be ``???`` or ``background``.

    Raises InputError if the file has another format (the message says which), an id that the OD API refuses,
    or another number of classes; MissingDependencyError without the OD API.
    """
    text = prototext.read_text(path, _EXPECTED)
    if path.suffix.lower() == ".txt" and not _BRACKET.search(text):
        return _names_of_lines(path, text, num_classes)
    return _names_of_items(path, _parse(path, text), num_classes)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or the folder may not be read
        return False


def _names_of_lines(path: Path, text: str, num_classes: int) -> Dict[int, str]:
    other = _other_format(text)
    if other:
        raise InputError(f"{path}: {other}; expected {_EXPECTED}")
    names = [line.strip() for line in re.split(r"\r\n|\r|\n", text.strip())]
    if names[0] in _BACKGROUND:
        names = names[1:]
    if len(names) != num_classes:
        raise InputError(
            f"{path}: {len(names)} names, one a line, but model.ssd.num_classes says {num_classes} classes; "
            "use the label map that the model was trained with"
        )
    return {i: name for i, name in enumerate(names, 1) if name}


def _parse(path: Path, text: str) -> Any:
    message = prototext.messages("string_int_label_map_pb2").StringIntLabelMap()
    problem = prototext.merge(text, message)
    if problem:
        found = _other_format(text) or f"not a valid label map ({problem})"
        is_list = found.startswith("not") and not _BRACKET.search(text)
        advice = f": if it is a list of names, call it {path.stem}.txt" if is_list else ""
        raise InputError(f"{path}: {found}; expected {_EXPECTED}{advice}")
    if not message.item:
        raise InputError(f"{path}: has no `item`; expected {_EXPECTED}")
    return message


def _names_of_items(path: Path, message: Any, num_classes: int) -> Dict[int, str]:
    names: Dict[int, str] = {}
    for number, item in enumerate(message.item, 1):
        if item.id < 0 or (item.id == 0 and "background" not in (item.name, item.display_name)):
            found = f"id {item.id}" if item.HasField("id") else "no id"
            raise InputError(
                f"{path}: item {number}, {item.name[:_MAX_SHOWN]!r}, has {found}; expected ids from 1, and 0 "
                "for the background alone: write those that the model was trained with"
            )
        names.setdefault(item.id, item.display_name if item.HasField("display_name") else item.name)
    if max(names) > num_classes:
        raise InputError(
            f"{path}: names a class with id {max(names)}, but model.ssd.num_classes says {num_classes} "
            "classes; use the label map that the model was trained with"
        )
    return {i: name for i, name in names.items() if i > 0 and name}


def _other_format(text: str) -> str:
    """The format of a file that was mistaken for a label map, in words; empty if it is not known."""
    if re.match(r"\s*<(!doctype html|html|head|body)\b", text, re.IGNORECASE):
        return "an HTML page (download the file itself, not the page that shows it)"
    if re.match(r"\s*<", text):
        return "an XML file"
    if _is_json(text):
        return "a JSON file"
    if re.search(r"^\s*model\s*:?\s*\{", text, re.MULTILINE):
        return "a pipeline.config"
    lines = _lines_without_comments(text)
    if not lines:
        return "nothing but comments"
    if not _BRACKET.search(text) and all(_YAML_LINE.match(line) for line in lines):
        return "a YAML file"
    return ""


def _lines_without_comments(text: str) -> List[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False
