"""The book's notebooks: their form, whether their recorded outputs are current, and whether they run.

Each rule of form is a function that returns what is wrong. Next to each stands a defect; the tests run
every rule over every notebook, and every defect through its rule.
"""

from __future__ import annotations

import ast
import copy
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import record_notebooks  # noqa: E402

PATHS = record_notebooks.notebooks(ROOT)
CHAPTER_HEADINGS = [
    "Why this stage kills projects",
    "What you will be able to do",
    "Before you start",
    "Predict",
    "Do it",
    "Look inside",
    "Check it",
    "What the article said, what we measured",
    "What can go wrong",
    "Decide",
    "Exercises",
    "Summary and next",
]
TOUR_HEADINGS = [
    "What you will see",
    "Before you start",
    "Take a picture",
    "Export",
    "Convert",
    "Build",
    "Detect",
    "Check it",
    "Where to go next",
]
MOST_LINES_A_CELL = 11
LONGEST_LINE = 100
MOST_LINES_A_FUNCTION = 10
MOST_BYTES = 1_000_000

Notebook = Any
Rule = Callable[[Notebook], list[str]]
Defect = Callable[[Notebook], None]


def read(path: Path) -> Notebook:
    return nbformat.read(path, as_version=4)


def markdown(notebook: Notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def code_cells(notebook: Notebook) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: Notebook) -> str:
    """The Markdown without fenced code and without code spans."""
    text = re.sub(r"^```.*?^```", "", markdown(notebook), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


def section(notebook: Notebook, heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", markdown(notebook), re.M | re.S)
    return found.group(1) if found else ""


def solutions(notebook: Notebook) -> list[str]:
    """The code of each folded solution, in order."""
    folded = re.findall(
        r"<summary>Solution of exercise \d+</summary>(.*?)</details>", markdown(notebook), re.S
    )
    return ["\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)) for text in folded]


def is_chapter(notebook: Notebook) -> bool:
    return "## What you will be able to do" in markdown(notebook)


# ---- the rules of form, each with a defect that it must find --------------------------------------------


def headings(notebook: Notebook) -> list[str]:
    expected = CHAPTER_HEADINGS if is_chapter(notebook) else TOUR_HEADINGS
    found = re.findall(r"^## (.+)$", prose(notebook), re.M)
    return [] if found == expected else [f"sections are {found}"]


def one_title(notebook: Notebook) -> list[str]:
    titles = re.findall(r"^# .+$", prose(notebook), re.M)
    is_first = notebook.cells[0].source.startswith("# ")
    return [] if len(titles) == 1 and is_first else [f"titles: {titles}"]


def levels(notebook: Notebook) -> list[str]:
    found = [len(marks) for marks in re.findall(r"^(#+) ", prose(notebook), re.M)]
    return [f"level {b} after {a}" for a, b in itertools.pairwise(found) if b > a + 1]


def prose_between_code(notebook: Notebook) -> list[str]:
    kinds = [cell.cell_type for cell in notebook.cells]
    pairs = enumerate(itertools.pairwise(kinds))
    return [f"cells {i} and {i + 1} are both code" for i, pair in pairs if pair == ("code", "code")]


def short_cells(notebook: Notebook) -> list[str]:
    found = []
    for cell in code_cells(notebook):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        lines = [line for line in lines if not re.match(r"(from|import|%)\b|%", line)]
        if len(lines) > MOST_LINES_A_CELL:
            found.append(f"cell {cell.id} has {len(lines)} lines of code")
    return found


def narrow_code(notebook: Notebook) -> list[str]:
    """Lines that a reader sees whole, beside the site's two side bars."""
    cells = code_cells(notebook)
    lines = [line for cell in cells for line in cell.source.splitlines() if len(line) > LONGEST_LINE]
    return [f"{len(line)} characters: {line}" for line in lines]


def short_functions(notebook: Notebook) -> list[str]:
    found = []
    for cell in code_cells(notebook):
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MOST_LINES_A_FUNCTION or isinstance(node, ast.ClassDef):
                    found.append(f"{node.name} in cell {cell.id} has {length} lines: move it to odtrt_lib")
    return found


def no_shell(notebook: Notebook) -> list[str]:
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines()]
    magic = re.compile(r"\s*(!|%%|%(?!matplotlib inline$|config ))")
    return [f"a shell or notebook command: {line}" for line in lines if magic.match(line)]


def no_corpus(notebook: Notebook) -> list[str]:
    text = json.dumps([cell.source for cell in notebook.cells])
    words = ("corpus", "urlopen", "requests.get", "wget", "shared/")
    return [f"mentions {word}" for word in words if word in text]


def portable_markdown(notebook: Notebook) -> list[str]:
    text = prose(notebook)
    fenced = re.findall(r"^```\{.*$", markdown(notebook), re.M)
    found = re.findall(r"^:::.*$|\{[a-z:]+\}`|^\(.*\)=$|^\+\+\+$", text, re.M)
    roles = re.findall(r"\{[a-z:]+\}`[^`]*`", markdown(notebook))
    return [f"only MyST understands {item!r}" for item in (*fenced, *found, *roles)]


def no_latin(notebook: Notebook) -> list[str]:
    return [
        f"{word!r}: write English"
        for word in re.findall(r"\b(?:e\.g\.|i\.e\.|etc\.|cf\.|viz\.)", prose(notebook))
    ]


def objectives(notebook: Notebook) -> list[str]:
    if not is_chapter(notebook):
        return []
    stated = re.findall(r"^- \*\*(O\d)\*\* ", section(notebook, "What you will be able to do"), re.M)
    used = set(re.findall(r"\bO\d\b", section(notebook, "Check it") + section(notebook, "Exercises")))
    found = [] if 3 <= len(stated) <= 5 else [f"{len(stated)} objectives"]
    return found + [f"no check or exercise refers to {name}" for name in stated if name not in used]


def preparation(notebook: Notebook) -> list[str]:
    rows = re.findall(r"^\| *([A-Z].*?) *\| *(.*?) *\|$", section(notebook, "Before you start"), re.M)
    wanted = {"You bring", "You leave with", "Hardware", "Time"}
    missing = sorted(wanted - {name for name, text in rows if text})
    return [f"'Before you start' lacks {name}" for name in missing]


def predictions(notebook: Notebook) -> list[str]:
    """At least two, each answered in a folded text after a later code cell."""
    if not is_chapter(notebook):
        return []
    asked: dict[str, int] = {}
    answered: dict[str, int] = {}
    cells = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cells += 1
            continue
        asked.update(dict.fromkeys(re.findall(r"\*\*Predict (\d)\.\*\*", cell.source), cells))
        answers = re.findall(r"<details>\s*<summary>Answer to prediction (\d)</summary>", cell.source)
        answered.update(dict.fromkeys(answers, cells))
    found = [] if len(asked) >= 2 else [f"{len(asked)} predictions"]
    found += [f"answer {n} has no prediction" for n in answered if n not in asked]
    return found + [f"prediction {n} is not answered" for n in asked if answered.get(n, -1) <= asked[n]]


def exercises(notebook: Notebook) -> list[str]:
    if not is_chapter(notebook):
        return []
    count = len(re.findall(r"\*\*Exercise \d", section(notebook, "Exercises")))
    code = solutions(notebook)
    found = [] if count >= 2 else [f"{count} exercises"]
    found += [] if len(code) == count else [f"{count} exercises, {len(code)} folded solutions"]
    return found + [f"solution {i} asserts nothing" for i, text in enumerate(code, 1) if "assert" not in text]


def failing_gate(notebook: Notebook) -> list[str]:
    """The section 'Check it' shows a check that failed: in code, and in the recorded outputs."""
    inside, shown = False, ""
    for cell in notebook.cells:
        for heading in re.findall(r"^## (.+)$", cell.source, re.M) if cell.cell_type == "markdown" else ():
            inside = heading == "Check it"
        if inside and cell.cell_type == "code":
            shown += "".join(record_notebooks._text(output) for output in cell.outputs)
    return [] if re.search(r"Error|fails|agrees: False", shown) else ["no check is shown failing"]


def messages(notebook: Notebook) -> list[str]:
    if not is_chapter(notebook):
        return []
    count = len(re.findall(r"^\| `", section(notebook, "What can go wrong"), re.M))
    return [] if count >= 3 else [f"{count} messages"]


def described_pictures(notebook: Notebook) -> list[str]:
    found = []
    for cell in code_cells(notebook):
        if not any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {})):
            continue
        metadata = cell.metadata.get("mystnb", {})
        if len(metadata.get("image", {}).get("alt", "").split()) < 5:
            found.append(f"cell {cell.id}: a picture without a text of five words or more")
        if not {"caption", "name"} <= set(metadata.get("figure", {})):
            found.append(f"cell {cell.id}: a picture without caption or name")
    return found


def stable_ids(notebook: Notebook) -> list[str]:
    ids = [cell.id for cell in notebook.cells]
    generated = [name for name in ids if re.fullmatch(r"[0-9a-f]{8}(-.*)?", name)]
    return [f"generated cell id {name}" for name in generated] + (
        ["ids repeat"] if len(set(ids)) < len(ids) else []
    )


def no_leaks(notebook: Notebook) -> list[str]:
    return record_notebooks.leaks(notebook)


def outputs_present(notebook: Notebook) -> list[str]:
    shown = sum(bool(cell.outputs) for cell in code_cells(notebook))
    times = [cell.id for cell in notebook.cells if "execution" in cell.metadata]
    found = [] if 2 * shown > len(code_cells(notebook)) else [f"only {shown} cells have outputs"]
    return found + [f"cell {name} carries clock times" for name in times]


def size(notebook: Notebook) -> list[str]:
    count = len(nbformat.writes(notebook).encode())
    return [] if count < MOST_BYTES else [f"{count} bytes"]


def next_link(notebook: Notebook) -> list[str]:
    return [] if re.search(r"\]\(.*\)", notebook.cells[-1].source) else ["the last cell links nowhere"]


def links(notebook: Notebook) -> list[str]:
    """Every relative link leads to a file of this repository, and to a heading there if it names one."""
    targets = [
        target
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for target in LINK.findall(cell.source)
    ]
    return [problem for target in targets for problem in dead_link(ROOT / "notebooks", target)]


LINK = re.compile(r"\]\(([^)\s]+)")


def dead_link(folder: Path, target: str) -> list[str]:
    """Why a link from a file in ``folder`` leads nowhere; empty for one to another host."""
    if re.match(r"[a-z]+:", target):
        return []
    name, _, anchor = target.partition("#")
    path = (folder / name).resolve()
    if not path.is_relative_to(ROOT) or not path.exists():
        return [f"{target}: no such file"]
    return [] if not anchor or anchor in anchors(path) else [f"{target}: no such heading"]


def anchors(path: Path) -> set[str]:
    """The addresses of a page's headings, as JupyterLab, GitHub and this site make them, and its labels."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "plugins/README.md", "models/parts/README.md"])
def test_links_of_a_readme_lead_to_files(name: str):
    path = ROOT / name
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    assert [problem for target in targets for problem in dead_link(path.parent, target)] == []


def set_source(cell_id: str, change: Callable[[str], str]) -> Defect:
    def defect(notebook: Notebook) -> None:
        cell = next(cell for cell in notebook.cells if cell.id == cell_id)
        cell.source = change(cell.source)

    return defect


def append(cell_id: str, text: str) -> Defect:
    return set_source(cell_id, lambda source: f"{source}\n{text}")


def replace(cell_id: str, old: str, new: str) -> Defect:
    def change(source: str) -> str:
        assert old in source, f"{old!r} is not in cell {cell_id}"
        return source.replace(old, new)

    return set_source(cell_id, change)


def on_cell(cell_id: str, change: Callable[[Any], object]) -> Defect:
    return lambda notebook: change(next(cell for cell in notebook.cells if cell.id == cell_id)) and None


def without_prose(notebook: Notebook) -> None:
    notebook.cells = [cell for cell in notebook.cells if cell.id != "doit2"]


def with_stderr(cell: Any) -> None:
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="Warning: deprecated\n"))


def with_path(cell: Any) -> None:
    cell.outputs.append(nbformat.v4.new_output("stream", name="stdout", text="wrote /home/somebody/x.onnx\n"))


def with_large_output(cell: Any) -> None:
    cell.outputs.append(nbformat.v4.new_output("stream", name="stdout", text="x" * MOST_BYTES))


def no_outputs(notebook: Notebook) -> None:
    for cell in code_cells(notebook):
        cell.outputs = []


DEFECTS: dict[Rule, list[Defect]] = {
    headings: [replace("decide", "## Decide", "## Decisions"), set_source("look", lambda _: "## Do it")],
    one_title: [append("why", "# Another title"), replace("title", "# ", "## ")],
    levels: [append("why", "#### Deep")],
    prose_between_code: [without_prose],
    short_cells: [append("checks", "\n".join(f"x{i} = {i}" for i in range(MOST_LINES_A_CELL)))],
    narrow_code: [append("checks", f"x = '{'x' * LONGEST_LINE}'")],
    short_functions: [
        append("checks", "def f():\n" + "    pass\n" * 10),
        append("checks", "class A:\n    pass"),
    ],
    no_shell: [append("checks", "!pip install x"), append("checks", "%pip install x")],
    no_corpus: [append("checks", "open('../shared/x')")],
    portable_markdown: [
        append("why", "{ref}`x`"),
        append("why", ":::{note}\nx\n:::"),
        append("why", "```{figure} x.png\n```"),
    ],
    no_latin: [append("why", "Tools, e.g. this one.")],
    objectives: [
        replace("objectives", "**O2**", "**O9**"),
        set_source("objectives", lambda s: s.split("- **O3")[0]),
    ],
    preparation: [replace("before", "| Time |", "| Duration |")],
    predictions: [replace("answer1", "<details>", "<div>"), replace("predict", "**Predict 2.**", "Predict")],
    exercises: [
        replace("exercises", "**Exercise 2", "**Task 2"),
        replace("exercises", "assert", "# assert".upper()),
    ],
    failing_gate: [no_outputs],
    messages: [set_source("wrong", lambda source: source.split("| `")[0])],
    described_pictures: [
        on_cell("draw_anchors", lambda cell: cell.metadata["mystnb"]["image"].update(alt="anchors")),
        on_cell("draw_anchors", lambda cell: cell.metadata["mystnb"].pop("figure")),
    ],
    stable_ids: [on_cell("why", lambda cell: cell.update(id="afaa63d2"))],
    no_leaks: [on_cell("checks", with_stderr), on_cell("checks", with_path)],
    outputs_present: [no_outputs, on_cell("checks", lambda cell: cell.metadata.update(execution={"x": 1}))],
    size: [on_cell("checks", with_large_output)],
    next_link: [set_source("next", lambda _: "The end.")],
    links: [
        append("why", "[a page](../book/ch10_absent.md)"),
        append("why", "[a page from the root](/book/claims.md)"),
        append("why", "[a page](../book/claims.md#no-such-heading)"),
        append("why", "[outside](../../README.md)"),
    ],
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", DEFECTS, ids=lambda rule: rule.__name__)
def test_notebook_keeps_the_rule(rule: Rule, path: Path):
    assert rule(read(path)) == []


def seeded() -> Iterator[Any]:
    for rule, defects in DEFECTS.items():
        for number, defect in enumerate(defects):
            yield pytest.param(rule, defect, id=f"{rule.__name__}-{number}")


@pytest.mark.parametrize(("rule", "defect"), seeded())
def test_a_notebook_that_breaks_the_rule_is_caught(rule: Rule, defect: Defect):
    notebook = read(ROOT / "notebooks" / "01_export.ipynb")
    defect(notebook)
    assert rule(notebook) != []


def test_notebooks_are_numbered_as_their_chapters():
    numbers = [path.name[:2] for path in PATHS]
    pages = {path.name[2:4] for path in (ROOT / "book").glob("ch[0-9][0-9]_*.md")}
    assert len(set(numbers)) == len(numbers) and set(numbers) <= {"00", *pages}
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} == {path.name for path in PATHS}


# ---- recorded outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_recorded_outputs_are_current(path: Path):
    assert record_notebooks.problems(path, ROOT) == []


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of what the stamps depend on, with chapter 2's notebook stamped for it."""
    shutil.copytree(ROOT / "odtrt_lib", tmp_path / "odtrt_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "models" / "parts", tmp_path / "models" / "parts")
    path = tmp_path / "notebooks" / "02_convert.ipynb"
    notebook = read(path)
    notebook.metadata["odtrt"] = {"date": "2026-01-01", **record_notebooks.hashes(notebook, tmp_path)}
    nbformat.write(notebook, path)
    assert record_notebooks.problems(path, tmp_path) == []
    return path


def edit(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


@pytest.mark.parametrize("module", ["convert/stage", "errors", "preprocess"])
def test_an_edit_of_a_module_that_the_notebook_uses_makes_it_stale(copied: Path, module: str):
    edit(copied.parents[1] / "odtrt_lib" / f"{module}.py", lambda text: text + "\nADDED = 1\n")
    (problem,) = record_notebooks.problems(copied, copied.parents[1])
    assert "02_convert.ipynb" in problem and "odtrt_lib" in problem


@pytest.mark.parametrize("module", ["app/cli", "report", "zoo"])
def test_an_edit_of_another_module_leaves_it_fresh(copied: Path, module: str):
    edit(copied.parents[1] / "odtrt_lib" / f"{module}.py", lambda text: text + "\nADDED = 1\n")
    assert record_notebooks.problems(copied, copied.parents[1]) == []


def test_comments_docstrings_and_blank_lines_leave_it_fresh(copied: Path):
    module = copied.parents[1] / "odtrt_lib" / "errors.py"
    edit(module, lambda text: '"""Another docstring."""\n\n\n# A comment.\n' + text.split('"""', 2)[2])
    assert record_notebooks.problems(copied, copied.parents[1]) == []


def test_a_changed_string_that_is_no_docstring_makes_it_stale(copied: Path):
    edit(
        copied.parents[1] / "odtrt_lib" / "convert" / "stage.py",
        lambda text: text.replace('"heads.onnx"', '"other.onnx"'),
    )
    assert record_notebooks.problems(copied, copied.parents[1]) != []


def test_an_edited_code_cell_makes_it_stale_and_edited_prose_does_not(copied: Path):
    notebook = read(copied)
    notebook.cells[2].source += " More prose."
    nbformat.write(notebook, copied)
    assert record_notebooks.problems(copied, copied.parents[1]) == []
    code_cells(notebook)[1].source += "\nprint(1)"
    nbformat.write(notebook, copied)
    assert "code cell" in record_notebooks.problems(copied, copied.parents[1])[0]


def test_another_model_makes_it_stale(copied: Path):
    edit(copied.parents[1] / "models" / "parts" / "pipeline.config", lambda text: text + "# changed\n")
    assert "model" in record_notebooks.problems(copied, copied.parents[1])[0]


def test_another_measurement_makes_a_notebook_stale_that_shows_it(tmp_path: Path):
    path = small_notebook(tmp_path, "import odtrt_lib\nprint(open('../results/x.cpu.json').read())")
    (tmp_path / "results").mkdir()
    for name in ("x", "y"):
        (tmp_path / "results" / f"{name}.cpu.json").write_text("1")
    record_notebooks.record(path, tmp_path)
    assert read(path).cells[0].outputs[0].text == "1\n"
    (tmp_path / "results" / "y.cpu.json").write_text("2")
    assert record_notebooks.problems(path, tmp_path) == []
    (tmp_path / "results" / "x.cpu.json").write_text("2")
    assert "measurement" in record_notebooks.problems(path, tmp_path)[0]


def test_a_notebook_that_was_never_recorded_is_stale(copied: Path):
    notebook = read(copied)
    del notebook.metadata["odtrt"]
    nbformat.write(notebook, copied)
    assert record_notebooks.problems(copied, copied.parents[1]) == ["02_convert.ipynb: never recorded"]


def small_notebook(folder: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path = folder / "notebooks" / "00_small.ipynb"
    path.parent.mkdir(parents=True)
    for name in ("odtrt_lib", "models"):
        (folder / name).mkdir()
    (folder / "odtrt_lib" / "__init__.py").write_text("")
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_recording_keeps_outputs_and_stamps_them(tmp_path: Path):
    path = small_notebook(tmp_path, "import odtrt_lib\nprint(6 * 7)")
    record_notebooks.record(path, tmp_path)
    notebook = read(path)
    assert notebook.cells[0].outputs[0].text == "42\n"
    assert notebook.metadata["odtrt"]["modules"] == ["odtrt_lib/__init__.py"]
    assert notebook.metadata["odtrt"]["device"].startswith("CPU, ")
    assert record_notebooks.problems(path, tmp_path) == []


@pytest.mark.parametrize(
    "source", ["import os\nprint(os.getcwd())", "import sys\nprint('oh', file=sys.stderr)", "1 / 0"]
)
def test_nothing_is_recorded_where_a_cell_fails_or_leaks(tmp_path: Path, source: str):
    path = small_notebook(tmp_path, source)
    before = path.read_bytes()
    with pytest.raises((SystemExit, Exception)):
        record_notebooks.record(path, tmp_path)
    assert path.read_bytes() == before


# ---- they run --------------------------------------------------------------------------------------------


def with_solutions(notebook: Notebook) -> Notebook:
    """The notebook with the code of its folded solutions as cells at the end."""
    longer = copy.deepcopy(notebook)
    longer.cells += [nbformat.v4.new_code_cell(source) for source in solutions(notebook)]
    return longer


def test_a_solution_that_fails_is_caught(tmp_path: Path):
    from nbclient.exceptions import CellExecutionError

    text = (
        "<details>\n<summary>Solution of exercise 1</summary>\n\n```python\nassert x == 2\n```\n\n</details>"
    )
    path = small_notebook(tmp_path, "x = 1")
    notebook = read(path)
    notebook.cells.append(nbformat.v4.new_markdown_cell(text))
    with pytest.raises(CellExecutionError):
        record_notebooks.run(with_solutions(notebook), tmp_path)


@pytest.mark.notebook
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_and_solutions_run(path: Path):
    before = path.read_bytes()
    record_notebooks.run(with_solutions(read(path)), ROOT)
    assert path.read_bytes() == before
