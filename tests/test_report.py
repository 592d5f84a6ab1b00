"""report.html: parsed by Python's own HTML parser, not by the code that wrote it."""

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import spec_cases
from PIL import Image

from odtrt_lib import report, spec
from odtrt_lib.errors import InputError
from odtrt_lib.folder import sha256, write_record

EVIL = '<script>alert("&")</script>'
VOID = {"meta", "img", "path"}

SPEC = spec_cases.example(
    spec_cases.ssd(12804, 2, True),
    spec.NmsSpec(1e-8, 0.6, 100, 100, False, True),
    spec_cases.network_input(320, 320, scale=1 / 127.5, offset=-1.0, batch=None),
    name="my model",
    labels=spec_cases.named("bolt", EVIL),
)


class Page(HTMLParser):
    """The page's tags with their attributes, its texts, and whether tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data + " "

    def attributes(self, tag, name):
        return [attributes[name] for found, attributes in self.tags if found == tag and name in attributes]


def record(folder, stage, outputs, **changes):
    values = {
        "inputs": {"pipeline.config": "ab" * 32},
        "settings": {"batch": 1},
        "versions": {"tensorflow": "2.20.0"},
        "seconds": 12.5,
        "peak_rss_mb": 1536.0,
        "checks": {"frozen_vs_eager_max_abs_err": 3.21e-6, "variables_restored": 1412},
    }
    for name in outputs:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)
    return write_record(folder, stage, outputs=outputs, **{**values, **changes})


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "spec.json").write_text(SPEC.to_json())
    record(folder, "export", ["frozen.pb"])
    record(folder, "convert", ["heads.onnx"], inputs={"frozen.pb": sha256(folder / "frozen.pb")})
    for precision in ("fp32", "fp16"):
        record(folder, "engine", [f"plans/{precision}.plan"], settings={"precision": precision})
    record(folder, "detect", ["detections.json"], checks={"loaded_on_a_gpu": None})
    return folder


def page_of(folder, *arguments, **options):
    path = report.write_report(folder, *arguments, **options)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def detections(*found):
    return SimpleNamespace(names=tuple(name for name, _ in found), scores=np.array([s for _, s in found]))


def test_names_that_act_or_are_no_text_are_shown(folder):
    name = "a\x1b]0;x\x07\u202e\udce8\ud800"
    image = np.zeros((8, 8, 3), np.uint8)
    page = page_of(folder, [(name, image)], detections=[detections((name, 0.5))])
    assert r"a\x1b]0;x\x07\u202e\xe8\ud800" in page.text
    assert not {"\x1b", "\x07", "\u202e"} & set(page.text)


def test_every_stage_is_there_with_what_went_in_and_came_out(folder):
    page = page_of(folder)
    for stage in ("Export", "Convert", "Engine", "Detect"):
        assert stage in page.text
    assert page.text.count("Went in") == 5, "two engines"
    for name in ("frozen.pb", "heads.onnx", "plans/fp32.plan", "plans/fp16.plan", "detections.json"):
        assert name in page.text
        assert sha256(folder / name)[:12] in page.text
        assert f"SHA-256 {sha256(folder / name)}" in page.attributes("code", "title")
    assert "10.0 KB" in page.text, "1000 times `heads.onnx`"
    assert "frozen vs eager largest absolute error" in page.text
    assert "3.21 × 10⁻⁶" in page.text
    assert "1,412" in page.text
    assert "1.5 GB" in page.text
    assert "loaded on a GPU not tried" in " ".join(page.text.split())
    assert "320 × 320, batch dynamic" in page.text


def test_a_stage_has_the_number_of_its_chapter(folder):
    """Export 1, convert 2, two engines 3, a skipped fusion 4; detection belongs to no chapter."""
    path = report.write_report(folder, skipped={"fuse": "not asked for"})
    numbers = re.findall(r'<span class="number" aria-hidden="true">(.*?)</span>', path.read_text("utf-8"))
    assert numbers == ["1", "2", "3", "3", "4", "•"]


def test_a_gate_that_could_see_nothing_is_not_said_to_have_held(folder):
    assert "every check held" in page_of(folder).text
    for seen, words in ((1.0, "a wrong kernel would not be seen"), (0.031, "by less than 0.031")):
        parity = {"class_logits": {"times_noise": 0.7}, "is_decisive": False, "sees_kernel_change": seen}
        record(folder, "convert", ["heads.onnx"], checks={"resizes_agree": True, "parity": parity})
        text = " ".join(page_of(folder).text.split())
        assert "not decisive: Convert" in text and "every check held" not in text
        assert "Parity is not decisive: " in text and words in text


def test_nothing_is_loaded_from_anywhere(folder):
    picture = np.zeros((20, 30, 3), np.uint8)
    page = page_of(folder, [("a picture", picture)])
    assert [
        tag for tag, _ in page.tags if tag in ("link", "script", "iframe", "object", "embed", "base")
    ] == []
    for name in ("src", "href", "srcset", "poster", "action", "data"):
        for tag, attributes in page.tags:
            assert attributes.get(name, "data:").startswith("data:"), tag
    text = (folder / "report.html").read_text()
    assert re.findall(r"https?://|@import|url\(", text) == []
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_light_and_dark_and_small_screens(folder):
    text = report.write_report(folder).read_text()
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text


def test_whatever_the_files_say_is_text(folder):
    record(
        folder,
        EVIL,
        [],
        inputs={EVIL: EVIL},
        settings={EVIL: EVIL, "precision": EVIL},
        versions={EVIL: EVIL},
        checks={EVIL: {EVIL: [EVIL]}},
    )
    picture = (f"{EVIL}.jpg", np.zeros((8, 8, 3), np.uint8))
    page = page_of(folder, [picture], detections=[detections((EVIL, 0.9))], skipped={f"x{EVIL}": EVIL})
    assert [tag for tag, _ in page.tags if tag == "script"] == []
    assert page.text.count("alert(") >= 10
    assert f"{EVIL}.jpg: {EVIL} 0.90" in page.attributes("img", "alt")


def test_pictures_are_inside_with_their_findings(folder):
    scene = np.zeros((40, 60, 3), np.uint8)
    scene[:, :30] = (200, 30, 30)
    png = io.BytesIO()
    Image.fromarray(scene).save(png, "PNG")
    found = [detections(("bolt", 0.914), ("nut", 0.5)), detections()]
    page = page_of(folder, [("scene 1", scene), ("scene 2", png.getvalue())], detections=found)
    assert page.attributes("img", "alt") == ["scene 1: bolt 0.91, nut 0.50", "scene 2: nothing found"]
    for source in page.attributes("img", "src"):
        kind, data = source.split(",", 1)
        assert kind == "data:image/jpeg;base64"
        shown = np.array(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        assert np.abs(shown - scene).mean() < 4


def test_a_large_picture_is_scaled_down(folder):
    page = page_of(folder, [("large", np.zeros((300, 4000, 3), np.uint8))])
    data = page.attributes("img", "src")[0].split(",", 1)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (1280, 96)


def test_only_the_newest_record_of_the_same_files_is_shown(folder):
    record(folder, "export", ["frozen.pb"], seconds=77)
    page = page_of(folder)
    assert page.text.count("Went in") == 5
    assert "1 min 17 s" in page.text


def test_a_stage_whose_input_changed_is_marked(folder):
    (folder / "frozen.pb").write_bytes(b"another export")
    page = page_of(folder)
    assert "Outdated: frozen.pb " in page.text
    assert "changed since" in page.text, "and so is the file where it came out"


def test_a_file_that_is_gone_is_marked(folder):
    (folder / "plans" / "fp16.plan").unlink()
    assert "removed since" in page_of(folder).text


def test_a_skipped_stage_says_why(folder):
    page = page_of(folder, skipped={"int8": "no calibration pictures"})
    assert "no calibration pictures" in page.text
    assert "Int8 skipped" in page.text


def test_a_stage_that_was_run_is_not_called_skipped(folder):
    assert "skipped" not in page_of(folder, skipped={"engine": "no TensorRT"}).text


def test_no_stage_finished(tmp_path):
    with pytest.raises(InputError, match=r"no finished stage .*`odtrt run`"):
        report.write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "picture",
    [
        b"not a picture",
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
    ],
)
def test_a_picture_of_another_form_is_named(folder, picture):
    with pytest.raises(InputError, match="picture 'odd': "):
        report.write_report(folder, [("odd", picture)])
    assert not (folder / "report.html").exists()


def test_detections_for_another_number_of_pictures(folder):
    with pytest.raises(InputError, match=r"1 pictures, .* 2"):
        report.write_report(
            folder, [("a", np.zeros((4, 4, 3), np.uint8))], detections=[detections(), detections()]
        )
