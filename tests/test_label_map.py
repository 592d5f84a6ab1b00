"""Label maps, against the OD API's ``label_map_util``; foreign forms; paths out of a stranger's config."""

from __future__ import annotations

import contextlib
import os

import pytest
from conftest import TINY_CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odtrt_lib.errors import InputError
from odtrt_lib.export import label_map
from odtrt_lib.export.pipeline import read_pipeline
from odtrt_lib.folder import last_record

BOLTS = 'item { id: 1 name: "bolt" }\nitem { id: 2 name: "nut" }\nitem { id: 3 name: "gear" }\n'
MAX_CLASSES = 5
FUZZ = settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def oracle(odapi_modules):
    """Class id -> name as the OD API reads a label map, or the error that it raises."""
    util = odapi_modules("utils.label_map_util")

    def read(path):
        try:
            return {i: c["name"] for i, c in util.create_category_index_from_labelmap(str(path)).items()}
        except (ValueError, TypeError) as error:  # TypeError: it then takes the text for binary protobuf
            return error

    return read


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return label_map.read(path, MAX_CLASSES)


def refusal(path, content):
    with pytest.raises(InputError) as caught:
        read(path, content)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    return message


def assert_as_the_od_api(oracle, path, content):
    """The same names, but that a class with an empty one has none here; or both refuse."""
    with contextlib.suppress(InputError):
        found = read(path, content)
        assert found == {i: name for i, name in oracle(path).items() if name}
        return
    theirs = oracle(path)
    assert isinstance(theirs, Exception) or max(theirs, default=0) > MAX_CLASSES


@pytest.fixture
def path(tmp_path):
    return tmp_path / "label_map.pbtxt"


@pytest.mark.parametrize(
    "content",
    [
        BOLTS,
        BOLTS.replace("item {", "item: {"),
        BOLTS.replace("item {", "item {\n  # one\n"),
        BOLTS.replace("\n", "\r\n"),
        "item < id: 1 name: 'bolt' > item: < id: 2, name: 'nut'; >",
        "item: < id: 1 name: 'bolt' >",
        "item [{ id: 1 name: 'bolt' }, { id: 2 name: 'nut' }]",
        "  item {\nname:'bolt'\nid: 0x1 } # the first\n",
        "item { id: 2 name: 'nut' } item { id: 1 name: 'bolt' }",
        "item { id: 1 id: 2 name: 'bolt' name: 'nut' }",
        "item { id: 1 name: 'bolt' } item { id: 1 name: 'nut' } item { id: 2 name: 'gear' }",
        "item { id: 1 name: '/m/01g317' display_name: 'person' }",
        "item { id: 1 name: '/m/01g317' display_name: '' }",
        "item { id: 1 } item { id: 2 name: 'nut' }",
        "item { id: 1 name: 'hex ' 'head' } item { id: 2 name: 'Schl\\303\\274ssel' }",
        "item { id: 1 name: 'bolt' frequency: FREQUENT instance_count: 3 }",
        "item { id: 0 name: 'background' } item { id: 1 name: 'bolt' }",
        "item { id: 0 name: 'x' display_name: 'background' } item { id: 1 name: 'bolt' }",
        "item { name: 'background' } item { id: 1 name: 'bolt' }",
        "item { id: 0 name: 'bolt' } item { id: 1 name: 'nut' }",
        "item { name: 'bolt' } item { name: 'nut' }",
        "item { id: -1 name: 'bolt' } item { id: 1 name: 'nut' }",
        "item { id: 1 name: 'bolt' colour: 3 }",
        "item { id: 1.0 name: 'bolt' }",
        "item { id: 99999999999 name: 'bolt' }",
        "item { id: 1 name: 'bolt' ",
        "item { id: 1 name: 'caf\\351' }",
        "# nothing here yet\n",
        "bolt\nnut\n",
        "0: bolt\n1: nut\n",
    ],
)
def test_it_is_read_and_judged_as_the_od_api_does(oracle, path, content):
    assert_as_the_od_api(oracle, path, content)


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["item {", "item: {", "item<", "items {", "item {"]),
            st.sampled_from(["id: ", "id:", "id "]),
            st.none() | st.integers(-1, MAX_CLASSES + 1),
            st.lists(
                st.sampled_from(
                    [
                        'name: "nut"',
                        "name: 'bolt'",
                        "display_name: 'gear'",
                        "name: ''",
                        "name: 'background'",
                        "x: 1",
                        "#",
                    ]
                ),
                max_size=2,
            ),
            st.sampled_from(["}", "}\n", ">", " }, "]),
        ),
        max_size=4,
    )
)
def test_any_items(oracle, path, items):
    text = ""
    for head, id_name, number, names, tail in items:
        text += " ".join([head, "" if number is None else f"{id_name}{number}", *names, tail])
    assert_as_the_od_api(oracle, path, text)


@FUZZ
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode), st.sampled_from(["a.pbtxt", "a.txt"]))
def test_any_bytes_are_names_or_an_input_error(tmp_path, content, name):
    with contextlib.suppress(InputError):
        assert set(read(tmp_path / name, content)) <= set(range(1, MAX_CLASSES + 1))


class TestNames:
    @pytest.mark.parametrize(
        "text", ["bolt\nnut\ngear\n\n", "???\r\nbolt\r\nnut\r\ngear", "background\rbolt\rnut\rgear"]
    )
    def test_one_a_line_in_a_txt_file(self, tmp_path, text):
        (tmp_path / "labels.TXT").write_bytes(text.encode())
        assert label_map.read(tmp_path / "labels.TXT", 3) == {1: "bolt", 2: "nut", 3: "gear"}

    def test_a_txt_file_may_hold_items(self, tmp_path):
        assert read(tmp_path / "labels.txt", BOLTS) == {1: "bolt", 2: "nut", 3: "gear"}

    def test_there_is_one_for_each_class(self, tmp_path):
        expected = "2 names, one a line, but model.ssd.num_classes says 5 classes"
        assert expected in refusal(tmp_path / "labels.txt", "bolt\nnut\n")

    def test_elsewhere_they_are_refused_with_the_cure(self, path):
        message = refusal(path, "bolt\nnut\ngear\nwasher\nspring\n")
        assert "label map" in message and "call it label_map.txt" in message


FOREIGN = {
    "HTML": ("<!DOCTYPE html>\n<html><body>item { id: 1 }</body></html>\n", "an HTML page"),
    "XML": ("<annotation>\n<object>bolt</object>\n</annotation>\n", "an XML file"),
    "JSON": ('{"1": "bolt", "2": "nut", "3": "gear"}\n', "a JSON file"),
    "JSON list": ('["bolt", "nut", "gear"]\n', "a JSON file"),
    "YAML": ("1: bolt\n2: nut\n3: gear\n4: a\n5: b\n", "a YAML file"),
    "YAML list": ("# parts\n- bolt\n- nut\n- gear\n- a\n- b\n", "a YAML file"),
    "config": (TINY_CONFIG, "a pipeline.config"),
    "nothing": ("", "an empty file"),
    "spaces": (" \n\t\n", "an empty file"),
    "LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "binary": (b"\n\x08\x12\x04bolt\x01\x00\x00", "a binary file"),
    "UTF-16": (BOLTS.encode("utf-16"), "UTF-16 text (`iconv -f UTF-16 -t UTF-8"),
    "UTF-16 without a mark": (BOLTS.encode("utf-16-le"), "UTF-16LE text"),
    "UTF-16 the other way": (BOLTS.encode("utf-16-be"), "UTF-16BE text"),
    "UTF-32": (BOLTS.encode("utf-32"), "UTF-32 text"),
    "code page": (BOLTS.replace("gear", "Schlüssel").encode("cp1252"), "byte 0xfc in line 3 is not UTF-8"),
    "too large": (b"#" * (1 << 22) + b"\n", "larger than 4 MiB"),
}


@pytest.mark.parametrize("suffix", [".pbtxt", ".txt"])
@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_named_as_what_they_are(tmp_path, name, suffix):
    content, expected = FOREIGN[name]
    assert expected in refusal(tmp_path / f"labels{suffix}", content)


@pytest.mark.parametrize("name", ["UTF-16", "code page", "nothing", "binary", "LFS"])
def test_a_config_is_read_in_the_same_way(tmp_path, name):
    content, expected = FOREIGN[name]
    config = tmp_path / "pipeline.config"
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_pipeline(config)
    assert str(caught.value).startswith(f"{config}: {expected}")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    write_config(tmp_path, mark="\ufeff# größer\n")
    (tmp_path / "label_map.pbtxt").write_text("\ufeff" + BOLTS)
    assert names(tmp_path) == ["bolt", "nut", "gear"]
    (tmp_path / "labels.txt").write_text("\ufeffbolt\nnut\ngear\n")
    assert names(tmp_path, tmp_path / "labels.txt") == ["bolt", "nut", "gear"]


def write_config(folder, label_map_path="label_map.pbtxt", mark=""):
    folder.mkdir(parents=True, exist_ok=True)
    quoted = label_map_path.replace("\\", "\\\\")
    text = mark + TINY_CONFIG.replace('"label_map.pbtxt"', f'"{quoted}"')
    (folder / "pipeline.config").write_text(text, encoding="utf-8")


def names(folder, given=None):
    return [label.name for label in read_pipeline(folder / "pipeline.config", given).labels]


@pytest.mark.parametrize(
    "content", [text for text, _ in FOREIGN.values()] + ["item { id: 9 name: 'x' }", "item { id: 0 }"]
)
def test_one_rule_for_both_ways(tmp_path, content):
    write_config(tmp_path)
    path = tmp_path / "label_map.pbtxt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    messages = []
    for named in (None, path):
        with pytest.raises(InputError) as caught:
            names(tmp_path, named)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


class TestPlaces:
    """A config is a stranger's: it names files below its own folder only."""

    @pytest.fixture
    def model(self, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        (tmp_path / "secret.pbtxt").write_text("item { id: 1 name: 'secret' }")
        (tmp_path / "secret.txt").write_text("root:*:20228\nsecret\nkey\n")
        return folder

    @pytest.mark.parametrize(
        "named", ["../secret.pbtxt", "../secret.txt", "x/../../secret.pbtxt", "{outside}/secret.pbtxt"]
    )
    def test_what_lies_outside_is_not_read(self, model, named):
        (model / "x").mkdir()
        write_config(model, named.format(outside=model.parent))
        found = read_pipeline(model / "pipeline.config")
        assert [label.name for label in found.labels] == ["class 1", "class 2", "class 3"]
        assert found.label_map is None and "pipeline.config" in found.label_map_note

    @pytest.mark.parametrize("named", ["link.pbtxt", "label_map.pbtxt", "folder/secret.pbtxt", "link.txt"])
    def test_links_that_lead_outside_are_not_followed(self, model, named):
        (model / "link.txt").symlink_to("../secret.txt")
        (model / "folder").symlink_to("..")
        for link in ("link.pbtxt", "label_map.pbtxt"):
            (model / link).symlink_to(model.parent / "secret.pbtxt")
        write_config(model, named)
        assert names(model) == ["class 1", "class 2", "class 3"]

    @pytest.mark.parametrize(
        ("named", "file"),
        [
            ("annotations/map.pbtxt", "annotations/map.pbtxt"),
            ("/data/map.pbtxt", "map.pbtxt"),
            ("../secret.pbtxt", "secret.pbtxt"),
            ("C:\\train\\map.pbtxt", "map.pbtxt"),
            ("PATH_TO_BE_CONFIGURED", "label_map.pbtxt"),
            ("", "label_map.pbtxt"),
            ("/" + "x" * 5000, "label_map.pbtxt"),
            ("link.pbtxt", "link.pbtxt"),
        ],
    )
    def test_what_lies_below_is_found(self, model, named, file):
        (model / "annotations").mkdir()
        write_config(model, named)
        if file == "link.pbtxt":
            (model / file).symlink_to("annotations/map.pbtxt")
        (model / file).write_text(BOLTS)
        found = read_pipeline(model / "pipeline.config")
        assert [label.name for label in found.labels] == ["bolt", "nut", "gear"]
        assert found.label_map == model / file and found.label_map_note == ""

    def test_a_model_that_is_reached_through_a_link(self, model, tmp_path):
        write_config(model)
        (model / "label_map.pbtxt").write_text(BOLTS)
        (tmp_path / "link").symlink_to("model")
        assert names(tmp_path / "link") == ["bolt", "nut", "gear"]

    def test_what_is_no_file_is_passed_over(self, model):
        os.mkfifo(model / "map.pbtxt")
        (model / "label_map.pbtxt").mkdir()
        write_config(model, "map.pbtxt")
        assert names(model) == ["class 1", "class 2", "class 3"]

    def test_the_user_may_name_any_file(self, model):
        write_config(model)
        assert names(model, model.parent / "secret.txt")[1] == "secret"

    def test_one_that_the_user_names_must_be_there(self, model):
        write_config(model)
        with pytest.raises(InputError, match=r"missing\.pbtxt: cannot be read"):
            names(model, model / "missing.pbtxt")


def test_the_log_says_which_was_read(tiny_folder):
    assert last_record(tiny_folder, "export")["checks"]["label_map"] == "label_map.pbtxt"
