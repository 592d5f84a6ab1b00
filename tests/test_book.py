"""The book: every page in the table of contents, tables current, the built site complete and self-contained.

The tests of the built site need ``make book`` to have run; without ``_build/html`` they are skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
sys.path.insert(0, str(ROOT / "scripts"))

import book_grid  # noqa: E402
import book_plots  # noqa: E402
import book_tables  # noqa: E402

from odtrt_lib import portability  # noqa: E402

# What makes a browser load something; a link that a reader may follow is not among them.
REQUEST = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=["'](?P<src>[^"']+)"""
    r"""|<link\b(?=[^>]*\brel=["'](?:stylesheet|icon|preload|prefetch|modulepreload|preconnect|manifest))"""
    r"""[^>]*?\bhref=["'](?P<href>[^"']+)"""
    r"""|@import\s+(?:url\()?["']?(?P<style>[^"')]+)""",
    re.IGNORECASE,
)


def entries(toc: dict) -> list[str]:
    """The files of a jb-book table of contents, in reading order."""
    found = [toc["root"]] if "root" in toc else []
    for part in ("parts", "chapters", "sections"):
        for item in toc.get(part, []):
            found += [item["file"]] if "file" in item else []
            found += entries({key: item[key] for key in ("chapters", "sections") if key in item})
    return found


def listed() -> list[str]:
    return entries(yaml.safe_load((ROOT / "_toc.yml").read_text()))


def pages(root: Path) -> set[str]:
    """The pages in the repository, as the table of contents names them."""
    found = [*(root / "book").glob("*.md"), *(root / "notebooks").glob("*.ipynb")]
    return {str(path.relative_to(root).with_suffix("")) for path in found}


def external_requests(html: str) -> list[str]:
    """Addresses of other hosts that a browser loads by itself when it shows the page."""
    found = [next(filter(None, match.groups())) for match in REQUEST.finditer(html)]
    return [address for address in found if re.match(r"(https?:)?//", address)]


def title(path: Path) -> str | None:
    found = re.search(r"^# +(\S.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None


def test_every_page_is_in_the_table_of_contents_once_and_exists():
    assert sorted(listed()) == sorted(pages(ROOT))


def test_a_page_that_is_missing_from_the_table_is_caught(tmp_path: Path):
    for name in ("book", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "book" / "orphan.md").write_text("# Orphan\n")
    assert pages(tmp_path) - set(listed()) == {"book/orphan"}


@pytest.mark.parametrize("path", sorted((ROOT / "book").glob("*.md")), ids=lambda path: path.stem)
def test_page_has_one_title(path: Path):
    without_code = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^# +\S", without_code, re.MULTILINE)) == 1


def test_a_page_without_a_title_is_caught(tmp_path: Path):
    (tmp_path / "page.md").write_text("Only text.\n\n## A section\n")
    assert title(tmp_path / "page.md") is None


def unknown_messages(page: str, library: str) -> list[str]:
    """The messages of odtrt that a page quotes in its tables' first column, but the library does not have.

    A message of another program is followed by that program's name in parentheses; ``...`` stands for what
    varies.
    """
    library = re.sub(r'"\s*\n\s*f?"', "", library)
    quoted = re.findall(r"^\| `([^`|]+)`(?: `([^`|]+)`)? *\|", page, re.MULTILINE)
    fragments = [part.strip(" :;") for pair in quoted for text in pair for part in text.split("...")]
    return [fragment for fragment in fragments if len(fragment) > 6 and fragment not in library]


def library_text() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "odtrt_lib").rglob("*.py"))


def test_the_messages_on_the_troubleshooting_page_are_those_of_the_library():
    page = (ROOT / "book" / "troubleshooting.md").read_text()
    assert page.count("\n| `") > 20
    assert unknown_messages(page, library_text()) == []


def test_a_message_that_the_library_does_not_have_is_caught():
    rows = ("`the checkpoint lacks ...`", "`the checkpoint is unhappy`", "`No!` (another program)")
    page = "\n".join(f"| {row} | why | cure |" for row in rows)
    assert unknown_messages(page, library_text()) == ["the checkpoint is unhappy"]


DECISION_PAGES = (
    *("ch01_export", "ch02_convert", "ch03_engine", "ch04_nms", "ch05_portability", "ch06_int8"),
    "ch07_latency",
)
MOST_WORDS = 1200


def words(page: Path) -> int:
    """How many words a reader of the page meets: prose and tables, those that are included too.

    A word begins with a letter or a digit and ends at white space or at a table's line. Front matter, code
    blocks and directives such as figures do not count; the text of a role and of a link does, its target does
    not.
    """
    include = re.compile(r"^```\{include\} (\S+\.md)\n```$", re.MULTILINE)
    text = include.sub(lambda found: (page.parent / found.group(1)).read_text(), page.read_text())
    text = re.sub(r"\A---\n.*?^---\n", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(`{3,}|:{3,}).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\([\w-]+\)=$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\{[\w:]+\}(?=`)|\s<[^<>\n]+>(?=`)", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return len(re.findall(r"\w[^\s|]*", text))


@pytest.mark.parametrize("name", DECISION_PAGES)
def test_a_decision_page_is_read_in_five_minutes(name: str):
    assert words(ROOT / "book" / f"{name}.md") <= MOST_WORDS


def test_words_of_prose_and_tables_count_and_those_of_code_do_not(tmp_path: Path):
    (tmp_path / "table.md").write_text("| one | two |\n| --- | --- |\n| 3.5 | – |\n")
    page = tmp_path / "page.md"
    page.write_text(
        "---\ntitle: no\n---\n(a-label)=\n# Four\n\nA five-word sentence: {doc}`chapter 4 <ch04_nms>`.\n\n"
        "```bash\nnot these words\n```\n\n```{raw} html\n:file: none.svg\n```\n\n"
        "[linked](https://example.org/not-this)\n\n```{include} table.md\n```\n"
    )
    assert words(page) == 1 + 5 + 1 + 3
    page.write_text(page.read_text() + "\nmore\n" * MOST_WORDS)
    assert words(page) > MOST_WORDS


@pytest.mark.parametrize("name", DECISION_PAGES)
def test_every_decision_states_choice_cost_change_and_evidence(name: str):
    text = (ROOT / "book" / f"{name}.md").read_text()
    decisions = re.split(r"^## Decision \d+: ", text, flags=re.MULTILINE)[1:]
    assert len(decisions) >= 3
    parts = ("**Choice:**", "**Cost of being wrong:**", "**How to change it:**", "**Evidence:**")
    assert [part for decision in decisions for part in parts if part not in decision] == []


def test_the_generated_tables_are_current():
    assert book_tables.stale(ROOT) == []


def test_every_generated_table_is_used_by_a_page():
    text = "".join(path.read_text() for path in (ROOT / "book").glob("*.md"))
    unused = [name for name in book_tables.generated(ROOT) if f"_generated/{name}" not in text]
    assert unused == []


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A repository with one measurement and its tables."""
    for name in ("results", "notebooks"):
        (tmp_path / name).mkdir()
    results = {
        "date": "2026-01-02T03:04:05+00:00",
        "command": "python measure.py",
        "device": {"cores": 2},
        "versions": {"onnxruntime": "1.0"},
        "rows": [{"images": 5, "objects": 40, "map": 0.5, "ap50": 0.75, "ap75": 0.6}],
    }
    (tmp_path / "results" / "parts.json").write_text(json.dumps(results))
    book_tables.write(tmp_path)
    return tmp_path


def test_a_table_shows_the_figures_and_their_source(measured: Path):
    text = (measured / "book" / "_generated" / "parts.md").read_text()
    assert "| 5 | 40 | 0.500 | 0.750 | 0.600 |" in text
    assert "2026-01-02" in text and "`results/parts.json`, written by `python measure.py`" in text


def test_a_new_measurement_makes_the_table_stale(measured: Path):
    assert book_tables.stale(measured) == []
    path = measured / "results" / "parts.json"
    path.write_text(path.read_text().replace("0.75", "0.76"))
    assert book_tables.stale(measured) == ["parts.md"]


def test_a_figure_typed_into_a_table_is_caught(measured: Path):
    path = measured / "book" / "_generated" / "parts.md"
    path.write_text(path.read_text().replace("0.750", "0.990"))
    assert book_tables.stale(measured) == ["parts.md"]


def test_the_readme_repeats_what_was_measured(measured: Path):
    shutil.copy(ROOT / "README.md", measured)
    assert book_tables.stale(measured) == ["README.md"]
    book_tables.write(measured)
    assert book_tables.stale(measured) == []
    text = (measured / "README.md").read_text()
    assert "Not measured yet: `results/first_light.cpu.json`" in text
    assert (
        text.split(book_tables.README_MARKS[0])[0]
        == (ROOT / "README.md").read_text().split(book_tables.README_MARKS[0])[0]
    )


def test_a_missing_measurement_is_said_not_hidden(tmp_path: Path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    book_tables.write(tmp_path)
    assert "Not measured yet" in (tmp_path / "book" / "_generated" / "parts.md").read_text()


GPU_ROW = {
    "model": "8 objects",
    "what": "postprocess",
    "source": "drawn",
    "dtype": "float32",
    "batch": 1,
    "score_threshold": 0.3,
}


@pytest.fixture
def gpu_results(tmp_path: Path) -> Path:
    """A results folder with GPU times of two sizes: the kernels on both, PyTorch on one."""
    kernels = {**GPU_ROW, "implementation": "odtrt", "p50_us": 30.0, "floor_us": 2.0}
    results = {
        "date": "2026-01-02T03:04:05+00:00",
        "command": "python measure.py",
        "device": {"cores": 2, "gpu": "NVIDIA Example", "driver": "1.2"},
        "versions": {},
        "rows": [
            {**kernels, "anchors": 1917, "graph_p50_us": 10.0},
            {**kernels, "anchors": 12804, "graph_p50_us": 20.0},
            {**GPU_ROW, "anchors": 1917, "implementation": "PyTorch", "p50_us": 2000.0},
            {**kernels, "anchors": 12804, "graph_p50_us": 999.0, "batch": 8},
            {**kernels, "anchors": 12804, "graph_p50_us": 40.0, "implementation": "odtrt, five kernels"},
        ],
    }
    (tmp_path / "nms.h200.json").write_text(json.dumps(results))
    return tmp_path


def test_the_gpu_figure_draws_every_time_of_one_image_in_order(gpu_results: Path):
    figure = book_plots.nms_gpu(gpu_results)
    assert re.findall(r"<title>(.*?)</title>", figure) == [
        "floor: 2 us",
        "above 0.3: 10 us",
        "PyTorch, above 0.3: 2000 us",
        "floor: 2 us",
        "above 0.3: 20 us",
    ]
    assert "NVIDIA Example" in figure
    dots = [
        float(x) for x in re.findall(r'<circle class="dot a" cx="([\d.]+)" cy="\d+" r="6"><title>', figure)
    ]
    assert dots == sorted(dots) and len(dots) == 2


def test_a_table_of_gpu_times_names_the_gpu_and_only_its_own_rows(gpu_results: Path):
    columns = (book_grid.Column("anchors", "anchors"), book_grid.Column("graph", "graph_p50_us", ".1f"))
    table = book_tables.Table("nms.h200.json", columns, only={"implementation": ("odtrt",), "batch": (1,)})
    text = book_tables.markdown(table, gpu_results)
    assert "| 12804 | 20.0 |" in text and "999" not in text
    assert "on one NVIDIA Example, driver 1.2" in text and "processor" not in text


def test_the_tree_of_questions_has_every_rule_that_says_no():
    verdicts = {rule.name: rule.action.value for rule in portability.POLICY}
    asked = [rule for _, rules in book_plots.QUESTIONS for rule in rules]
    assert sorted(asked) == sorted(rule for rule, verdict in verdicts.items() if verdict != "ok")
    assert [book_plots.answer(rules, verdicts) for _, rules in book_plots.QUESTIONS] == sorted(
        (book_plots.answer(rules, verdicts) for _, rules in book_plots.QUESTIONS), reverse=True
    ), "what is refused is asked before what is built again"
    with pytest.raises(ValueError):
        book_plots.passport_tree({**verdicts, "plan damaged": "rebuild"})


def test_the_memory_figure_draws_each_attempt_under_its_limit(tmp_path: Path):
    steps = [("as asked", "out of memory", 320), ("frugal heap", "built", 290)]
    case = {"case": "d0 less 4%", "model": "d0"}
    rows = [
        {**case, "kind": "fallback", "number": i, "step": step, "outcome": outcome, "peak_rss_mb": peak}
        for i, (step, outcome, peak) in enumerate(steps, 1)
    ]
    rows += [
        {**case, "kind": "sample", "number": i, "seconds": seconds, "rss_mb": seconds * 100.0}
        for i in (1, 2)
        for seconds in (0, 1, 2)
    ]
    for row in rows:
        row["limit_mb"] = 310
    (tmp_path / "engine.cpu.json").write_text(json.dumps({"rows": rows}))
    drawn = book_plots.engine_memory(tmp_path)
    assert re.findall(r"<title>(.*?)</title>", drawn) == [
        "as asked: out of memory, peak 320 MiB",
        "frugal heap: built, peak 290 MiB",
    ]
    lines = [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'points="([^"]+)"', drawn)
    ]
    assert lines[0][-1][0] < lines[1][0][0], "one attempt after the other"
    (limit,) = re.findall(r'class="limit" d="M\d+ ([\d.]+)', drawn)
    assert all(y > float(limit) for line in lines for _, y in line), "200 MB lie below a limit of 310"
    peaks = [float(y) for y in re.findall(r'<circle class="peak \w+" cx="[\d.]+" cy="([\d.]+)"', drawn)]
    assert peaks[0] < float(limit) < peaks[1], "a peak of 320 lies above the limit, one of 290 below"


PLAN_ROW = {"model": "d0", "p50_us": 2000.0, "load_warm_seconds": 0.5, "load_cold_seconds": 5.0}


@pytest.fixture
def engine_results(tmp_path: Path) -> Path:
    """Two models built on a CPU; on the GPU one was measured in FP32 and TF32, and failed in FP16."""
    rows = [{**PLAN_ROW, "arithmetic": "FP32", "p50_us": 20000.0}, {**PLAN_ROW, "arithmetic": "TF32"}]
    rows.append({"model": "d0", "arithmetic": "FP16", "error": "no memory"})
    built = [{"kind": "build", "model": name, "precision": "fp32"} for name in ("d0", "d1")]
    measured = {"device": {"gpu": "NVIDIA Example"}, "rows": rows}
    (tmp_path / "engine.h200.json").write_text(json.dumps(measured))
    (tmp_path / "engine.cpu.json").write_text(json.dumps({"rows": built}))
    return tmp_path


def test_the_figure_of_plans_draws_each_row_and_names_what_is_missing(engine_results: Path):
    drawn = book_plots.engine_gpu(engine_results)
    assert re.findall(r"<title>(.*?)</title>", drawn) == [
        "d0, FP32: 20.00 ms",
        "d0, FP32: loaded first in 5.0 s, again in 0.5 s",
        "d0, TF32: 2.00 ms",
        "d0, TF32: loaded first in 5.0 s, again in 0.5 s",
    ]
    assert "NVIDIA Example" in drawn and drawn.count(">not measured<") == 1


def test_what_was_not_measured_on_the_gpu_is_named(engine_results: Path):
    assert "not measured in this way: d0 in FP16, d1." in book_tables.engine_gaps(engine_results)


def engine_table(name: str, results: Path) -> str:
    file, library, part = book_tables.GPU_TABLES[name]
    return book_grid.part_of(results / file, part, library).replace(book_grid.SLASH, " / ")


def test_a_plan_that_failed_has_dashes_in_the_tables(engine_results: Path):
    path = engine_results / "engine.h200.json"
    measured = json.loads(path.read_text())
    measured |= {"date": "2026-01-02T03:04:05", "command": "python measure.py", "versions": {}}
    measured["device"] |= {"driver": "1.2", "cores": 2}
    for row in measured["rows"]:
        row |= {"p99_us": 2 * row.get("p50_us", 0), "passed": False}
    path.write_text(json.dumps(measured))
    assert "| d0 | FP16 | – | – | – | no |" in engine_table("engine_gpu", engine_results)
    assert "| d0 | 20.00 / 40.00 | 2.00 / 4.00 | – |" in engine_table("engine_gpu_latency", engine_results)


def test_a_table_names_every_day_on_which_its_rows_were_measured(engine_results: Path):
    path = engine_results / "engine.h200.json"
    measured = json.loads(path.read_text())
    measured |= {"date": "2026-01-09T03:04:05", "command": "python measure.py", "versions": {}}
    measured["device"] |= {"driver": "1.2", "cores": 2}
    for row in measured["rows"]:
        row["p99_us"] = 1.0
    path.write_text(json.dumps(measured))
    assert "Measured on 2026-01-09 on" in engine_table("engine_gpu_latency", engine_results)
    for row, day in zip(measured["rows"], ("2026-01-09", "2026-01-02", "2026-01-09"), strict=True):
        row["date"] = day
    path.write_text(json.dumps(measured))
    assert "Measured on 2026-01-02, 2026-01-09 on" in engine_table("engine_gpu_latency", engine_results)


MATRIX_NAMES = ("version_summary", "version_matrix", "version_messages", "version_damage", "version_caches")
FALLBACK_NAMES = ("fallback_summary", "fallback_settings", "fallback_limits")
SIDE_NAMES = ("side_summary", "side_times", "side_found", "road", "road_failures")


def test_a_gpu_table_without_its_file_says_so(tmp_path: Path):
    for name in (*MATRIX_NAMES, *FALLBACK_NAMES, *SIDE_NAMES, "device_memory"):
        assert engine_table(name, tmp_path).startswith("*Not measured yet: `results/"), name


def gpu_file(path: Path, rows: list[dict]) -> None:
    device = {"gpu": "NVIDIA Example", "driver": "1.2", "cores": 2}
    about = {"date": "2026-01-09T03:04:05", "command": "python measure.py", "device": device}
    path.write_text(json.dumps({**about, "rows": rows}))


def test_the_version_matrix_counts_what_loads_and_what_agrees(tmp_path: Path):
    plan = {"kind": "plan", "built_by": "8.5.2", "case": "", "precision": "fp16", "safe": True}
    same = {**plan, "loaded_in": "8.5.2", "verdict": "ok", "loads": True, "message": "", "agree": True}
    other = {**plan, "loaded_in": "8.5.3", "verdict": "rebuild", "loads": False, "agree": True}
    other["message"] = "Version tag | does not match"
    damaged = {**other, "kind": "damage", "loaded_in": "8.5.2", "case": "last byte", "verdict": "refuse"}
    unseen = {**damaged, "loads": True, "message": "", "agree": False}
    cache = {**same, "kind": "timing cache", "loaded_in": "8.5.3", "verdict": "apart", "agree": False}
    failed = {**plan, "loaded_in": "lean", "error": "no verdict", "safe": False}
    rows = [{**same, "form": "split"}, {**same, "form": "fused"}, other, damaged, unseen, cache, failed]
    gpu_file(tmp_path / "version_matrix.h200.json", rows)
    matrix, messages, damage, caches = (engine_table(name, tmp_path) for name in MATRIX_NAMES[1:])
    assert "| 8.5.2 | 8.5.2 | 2 | ok | yes | yes |" in matrix
    assert "| 8.5.2 | 8.5.3 | 1 | rebuild | no | yes |" in matrix and "lean" not in matrix
    assert "| Version tag \\| does not match | 8.5.3, 8.5.2 | 2 |" in messages
    assert "| last byte | 2 | refuse | 1 of 2 |" in damage
    assert "| 8.5.2 | 8.5.3 | apart | yes |" in caches
    summary = engine_table("version_summary", tmp_path)
    assert (
        "3 times a plan was given to a TensorRT; 2 times it loaded, and 3 times odtrt had said so." in summary
    )
    assert "refuses in 0 of 6 cases" in summary and "on one Example" in summary


def test_the_tables_of_the_fallback_have_each_step_and_count_the_plans(tmp_path: Path):
    peaks = {"seconds": 12.4, "peak_rss_mb": 2300.2, "peak_gpu_mb": 1500.0}
    setting = {"model": "d0", "kind": "setting", "case": "as asked", "limit_mb": None, "step": "as asked"}
    rows = [{**setting, **peaks, "outcome": "built", "built": True}]
    host = {"model": "d0", "kind": "host", "case": "60%", "limit_mb": 1380, "built": False}
    rows += [{**host, **peaks, "step": "as asked", "outcome": "out of memory", "peak_rss_mb": 1400}]
    rows += [{**host, "kind": "device", "case": "800 MiB", "limit_mb": 800, "step": "", "outcome": "a | b"}]
    rows += [
        {**host, **peaks, "case": "90%", "limit_mb": 2070, "built": True, "step": "x", "outcome": "built"}
    ]
    gpu_file(tmp_path / "fallback.h200.json", rows)
    summary, settings, limits = (engine_table(name, tmp_path) for name in FALLBACK_NAMES)
    assert "1 of 3 builds under a limit" in summary
    assert "| d0 | as asked | 12 | 2,300 | 1,500 |" in settings and "1,400" not in settings
    assert "| d0 | 1,380 MiB, host | as asked | out of memory | 1,400 / 1,500 |" in limits
    assert "| d0 | 800 MiB, device | – | a \\| b | – |" in limits


PEER = {
    "source": "drawn",
    "heads": "8 objects",
    "classes": 90,
    "score_threshold": 1e-8,
    "threshold_used": 1e-8,
}


def test_other_programs_nms_stands_beside_ours_with_what_it_loses(tmp_path: Path):
    ours = {**PEER, "implementation": "OdtrtDetect", "anchors": 1917, "p50_us": 20.0, "missing": 0}
    theirs = {**ours, "implementation": "EfficientNMS_TRT", "p50_us": 1078.0, "missing": 47}
    refused = {**ours, "implementation": "BatchedNMSDynamic_TRT", "error": "not built"}
    gpu_file(tmp_path / "nms_peers.h200.json", [ours, {**theirs, "threshold_used": 0.01}, refused])
    table = engine_table("nms_peers", tmp_path)
    assert f"| 1,917 | 1e{book_grid.NO_BREAK_HYPHEN}08 | 20.0 | 1,078\\* (47) | – |" in table
    summary = engine_table("nms_peers_summary", tmp_path)
    assert "takes 53.9 to 54 times" in summary and "EfficientNMS_TRT in 1 of 1" in summary


def test_the_wall_clock_of_the_nms_layer_is_said(tmp_path: Path):
    ours = {**PEER, "implementation": "OdtrtDetect", "anchors": 1917, "p50_us": 20.0, "missing": 0}
    layer = {**ours, "implementation": "NMS layer", "p50_us": 333.4, "missing": 2, "timed_by": "wall clock"}
    gpu_file(tmp_path / "nms_peers.h200.json", [ours, layer])
    table = engine_table("nms_peers_layer", tmp_path)
    assert "| 20.0 | 333 (2) |" in table and "wall clock" in table
    assert "wall clock" not in engine_table("nms_peers", tmp_path)


def test_nvidias_sample_stands_beside_ours_and_what_fails_is_apart(tmp_path: Path):
    road = {"kind": "road", "model": "d0", "environment": "Python 9", "way": "nvidia", "step": "create_onnx"}
    rows = [{**road, "cpu_seconds": 60.4, "peak_rss_mb": 1000}]
    rows += [{**rows[0], "step": "exporter_main_v2", "cpu_seconds": 80.4, "peak_rss_mb": 1200}]
    rows += [{**rows[0], "way": "odtrt", "step": "export"}]
    rows += [{**road, "step": "exporter_main_v2, as it is", "error": "a | b"}]
    plan = {"kind": "detector", "model": "d0_at_0.3", "precision": "FP16", "weights": "trained"}
    found = {"references": 9, "pictures": 3, "matched": 4, "missing": 1, "extra": 2, "wrong_class": 1}
    theirs = {**plan, **found, "way": "nvidia", "device_graph_p50_us": 979.7, "found": 8}
    rows += [theirs, {**theirs, "way": "odtrt", "device_graph_p50_us": 465.6, "matched": 9}]
    rows += [{**plan, "model": "d1", "way": "nvidia", "error": "not built"}]
    rows += [{**theirs, "model": "random", "weights": "random"}]
    gpu_file(tmp_path / "peers.h200.json", rows)
    summary, times, agreement, way, failures = (engine_table(name, tmp_path) for name in SIDE_NAMES)
    assert "takes 0.98 ms and gives 4 of 9" in summary and "takes 0.47 ms and gives 9 of 9" in summary
    assert "| d0 above 0.3 | FP16 | NVIDIA's sample | 0.98 | – |" in times and "| random |" in times
    assert "| 9 | 4 | 1 / 2 | 8 | 1 |" in agreement.replace(book_grid.SLASH, " / ")
    assert "in 3 pictures" in agreement and "random" not in agreement and "d1" not in times
    assert "| d0 | 80 + 60 = 141 | 1,200 | – | – |" in way and "as it is" not in way
    assert "| d0 | exporter_main_v2, as it is | a \\| b | – |" in failures and "H200" not in failures


def test_the_growth_of_all_stacks_stands_beside_what_stays(tmp_path: Path):
    row = {"model": "d0", "arithmetic": "FP32", "device_memory_mb": 30.0, "left_mb": 25.0}
    row |= {
        "stack_bytes": 1024,
        "stack_bytes_after": 3072,
        "threads": 10240,
        "left_after_stack_reset_mb": 5.0,
    }
    gpu_file(tmp_path / "device_memory.h200.json", [row, {**row, "error": "killed"}])
    table = engine_table("device_memory", tmp_path).replace(book_grid.SLASH, " / ")
    assert table.count("| d0 |") == 1 and "| d0 | FP32 | 30 | 25 | 1,024 / 3,072 | 20 | 5 |" in table


def test_the_tables_of_arm64_count_values_and_say_what_the_registry_did():
    path = ROOT / "results" / book_tables.ARM64
    rows = json.loads(path.read_text())["rows"]
    table = book_grid.part_of(path, book_tables.arm64)
    compared = [row for row in rows if row["check"] in ("bits", "heads")]
    assert [row["compared"] in table for row in compared] == [True] * len(compared)
    for row in rows:
        if row["check"] == "registry":
            row["plugin_made"] = False
    measured = {**json.loads(path.read_text()), "rows": rows, "file": path.name}
    assert "does not: makes a plugin" in book_tables.arm64_libraries(measured)


def test_an_optional_column_appears_with_its_first_figure(gpu_results: Path):
    columns = (book_grid.Column("anchors", "anchors"), book_grid.Column("at", "at", is_optional=True))
    table = book_tables.Table("nms.h200.json", columns)
    assert "| at |" not in book_tables.markdown(table, gpu_results)
    path = gpu_results / "nms.h200.json"
    path.write_text(path.read_text().replace('"p50_us": 2000.0', '"p50_us": 2000.0, "at": "noon, sharp"'))
    text = book_tables.markdown(table, gpu_results)
    assert "| at |" in text and "| 1917 | noon, sharp |" in text and "| 12804 | – |" in text
    assert book_grid.cell({"at": "noon, sharp"}, book_grid.Column("at", "at", until=",")) == "noon"


def test_a_figure_that_a_row_lacks_is_an_error_unless_it_is_optional(gpu_results: Path):
    column = book_grid.Column("graph", "graph_p50_us", ".1f")
    row = {"implementation": "PyTorch"}
    with pytest.raises(KeyError):
        book_grid.cell(row, column)
    assert book_grid.cell(row, book_grid.Column("graph", "graph_p50_us", is_optional=True)) == "–"


def test_a_line_does_not_break_within_a_figure():
    text = book_grid.cell({"x": 1.2e-6}, book_grid.Column("x", "x", ".1e"))
    assert text == f"1.2e{book_grid.NO_BREAK_HYPHEN}06" and "-" not in text


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example.org/x.js"></script>',
        '<script async data-x="1" src="//cdn.example.org/x.js"></script>',
        '<link rel="stylesheet" type="text/css" href="https://fonts.example.org/x.css">',
        '<link href="https://fonts.example.org/x.css" rel="stylesheet">',
        '<img alt="badge" src="https://img.example.org/badge.svg">',
        "<style>@import url('https://example.org/x.css');</style>",
    ],
)
def test_a_request_to_another_host_is_caught(html: str):
    assert len(external_requests(html)) == 1


def test_a_link_to_another_host_is_no_request():
    assert external_requests('<a href="https://example.org">x</a><img src="../_static/x.svg">') == []


needs_site = pytest.mark.skipif(not SITE.is_dir(), reason="no built site; run `make book`")


@needs_site
def test_the_site_has_a_page_for_every_entry():
    assert [name for name in listed() if not (SITE / f"{name}.html").is_file()] == []
    assert (SITE / "index.html").is_file()


@needs_site
def test_the_site_asks_no_other_host_for_anything():
    found = {
        str(path.relative_to(SITE)): external_requests(path.read_text(encoding="utf-8"))
        for path in (*SITE.rglob("*.html"), *SITE.glob("_static/*.css"))
    }
    assert {name: addresses for name, addresses in found.items() if addresses} == {}


@needs_site
def test_the_site_has_its_own_mathjax():
    assert (SITE / "_static" / "mathjax" / "tex-mml-chtml.js").is_file()


@needs_site
def test_every_picture_of_the_site_has_a_text():
    no_text = r"""<img\b(?![^>]*\balt="[^"]{3,}")[^>]*>"""
    file_name_as_text = r"""<img\b[^>]*\balt="[^"]*[0-9a-f]{64}[^"]*"[^>]*>"""
    nameless = re.compile(f"{no_text}|{file_name_as_text}")
    found = {
        str(path.relative_to(SITE)): nameless.findall(path.read_text(encoding="utf-8"))
        for folder in ("book", "notebooks")
        for path in (SITE / folder).glob("*.html")
    }
    assert {name: pictures for name, pictures in found.items() if pictures} == {}
