"""The reader of COCO annotations: which file is which image, and what a malformed file is told."""

import json

import pytest

from odtrt_lib.coco import load_coco, read_instances
from odtrt_lib.errors import InputError

ANNOTATION = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
GOOD = {
    "images": [{"id": 1, "file_name": "a.jpg"}],
    "categories": [{"id": 1, "name": "bolt"}],
    "annotations": [ANNOTATION],
}


def with_annotation(**changes):
    return json.dumps({**GOOD, "annotations": [{**ANNOTATION, **changes}]})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "damaged JSON"),
        ("\x00\xff", "damaged JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "expected an object"),
        ("{}", "has no list `images`"),
        (json.dumps({**GOOD, "images": None}), "has no list `images`"),
        (json.dumps({**GOOD, "categories": [7]}), "categories[0]: 7, expected an object"),
        (json.dumps({**GOOD, "categories": [{"id": 1}]}), "categories[0]: has no 'name'"),
        (json.dumps({**GOOD, "categories": [{"id": "bolt", "name": "bolt"}]}), 'categories[0]: id "bolt"'),
        (
            json.dumps({**GOOD, "categories": [*GOOD["categories"], {"id": 1, "name": "nut"}]}),
            'categories[1]: id 1 is that of "bolt" and of "nut"',
        ),
        (
            json.dumps({**GOOD, "images": [*GOOD["images"], {"id": "1", "file_name": "b.jpg"}]}),
            'images[1]: id 1 is that of "a.jpg" and of "b.jpg"',
        ),
        (json.dumps({**GOOD, "images": [{"id": 1, "file_name": 7}]}), "file_name 7"),
        (json.dumps({**GOOD, "images": [{"id": None, "file_name": "a.jpg"}]}), "images[0]: id null"),
        (json.dumps({**GOOD, "images": [{"id": 1}]}), "image 1 has no 'file_name'"),
        (json.dumps({**GOOD, "annotations": [{"image_id": 1, "category_id": 1}]}), "has no 'bbox'"),
        (with_annotation(bbox=[1, 2, 3]), "annotations[0]: bbox [1, 2, 3]"),
        (with_annotation(bbox="abcd"), "annotations[0]: bbox"),
        (with_annotation(bbox=[1, 2, -3, 4]), "height"),
        (with_annotation(bbox=[1, float("nan"), 3, 4]), "NaN, expected a finite"),
        (with_annotation(bbox=[1, 10**400, 3, 4]), "expected a finite"),
        (with_annotation(bbox=[1, True, 3, 4]), "true, expected a finite"),
        (with_annotation(category_id=9), "category_id 9, which no entry"),
        (with_annotation(image_id=9), "image_id 9, which no entry"),
        (with_annotation(image_id=True), "id true"),
        (with_annotation(image_id=1.5), "id 1.5"),
        (with_annotation(area=-1), "area -1"),
        (with_annotation(area=1e11), "area 1e+11"),
        (with_annotation(area="large"), '"large", expected a finite'),
        (with_annotation(iscrowd=2), "iscrowd 2, expected 0 or 1"),
        (json.dumps(GOOD), "a.jpg"),
    ],
)
def test_a_bad_annotation_file_is_named_on_one_line(tmp_path, content, says):
    path = tmp_path / "instances.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_coco(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_exporters_write_differently_is_read():
    odd = {"area": None, "iscrowd": None, "image_id": "1", "bbox": ["1", "2", 3.0, 4], "id": "a-1"}
    (one,) = read_instances(json.loads(with_annotation(**odd))).objects
    assert (one.image_id, one.bbox, one.area, one.is_crowd) == (1, (1, 2, 3, 4), 12, False)
    (one,) = read_instances(json.loads(with_annotation(area="2500", iscrowd="0"))).objects
    assert (one.area, one.is_crowd) == (2500, False)
    twice = {**GOOD, "images": GOOD["images"] * 2, "categories": GOOD["categories"] * 2}
    assert read_instances(twice).files == {1: "a.jpg"}


def written(tmp_path, *names):
    """An instances file of these file names; its images have the ids 1, 2, ..."""
    path = tmp_path / "instances.json"
    images = [{"id": i, "file_name": name} for i, name in enumerate(names, 1)]
    path.write_text(json.dumps({**GOOD, "images": images, "annotations": []}))
    return path


@pytest.fixture
def cameras(tmp_path):
    """Two pictures of the same name in two folders, and one whose name is there once."""
    for name in ("cam1/0001.png", "cam2/0001.png", "cam2/last.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


@pytest.mark.parametrize("root", ["images", "."], ids=["the right root", "one folder too high"])
@pytest.mark.parametrize(
    "names",
    [
        ("cam1/0001.png", "cam2/0001.png", "cam2/last.png"),
        ("./cam1/0001.png", "cam2//0001.png", "last.png"),
        ("cam1\\0001.png", "cam2\\0001.png", "cam2\\last.png"),
    ],
)
def test_each_image_is_its_own_file(tmp_path, cameras, root, names):
    found = load_coco(written(tmp_path, *names), tmp_path / root).paths
    assert [path.relative_to(cameras).as_posix() for path in found] == [
        "cam1/0001.png",
        "cam2/0001.png",
        "cam2/last.png",
    ]


@pytest.mark.parametrize("prefix", ["/content/images/", "C:\\data\\images\\"])
def test_paths_of_another_machine_are_taken_by_their_end(tmp_path, cameras, prefix):
    names = [prefix + name for name in ("cam1/0001.png", "cam2/0001.png")]
    for root in (cameras, tmp_path):
        found = load_coco(written(tmp_path, *names), root).paths
        assert found == (cameras / "cam1/0001.png", cameras / "cam2/0001.png")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["0001.png"], "could be"),
        (["cam1/0001.png", "cam1/0001.png"], "images 1 and 2 are both"),
        (["cam1/0001.png", "./cam1/0001.png"], "images 1 and 2 are both"),
        (["cam3/0001.png"], "the first is cam3/0001.png"),
        (["cam1/0001.png", "/other/last.png"], "the first is /other/last.png"),
        (["../secret.png"], "the first is ../secret.png"),
        (["cam1/../../secret.png"], "the first is"),
        (["x" * 5000], "the first is"),
        (["\x00"], "the first is"),
        (["/"], "the first is"),
        ([".."], "the first is"),
    ],
)
def test_a_file_that_may_be_another_image_is_refused(tmp_path, cameras, names, says):
    (tmp_path / "secret.png").touch()
    with pytest.raises(InputError, match="instances") as caught:
        load_coco(written(tmp_path, *names), cameras)
    assert says in str(caught.value)


def test_the_root_to_name_is_named(tmp_path, cameras):
    names = ("/content/cam1/0001.png", "/content/cam2/0001.png")
    with pytest.raises(InputError) as caught:
        load_coco(written(tmp_path, *names), tmp_path)
    advised = str(caught.value).split("such as ")[1]
    assert load_coco(written(tmp_path, *names), advised).paths == tuple(
        cameras / camera / "0001.png" for camera in ("cam1", "cam2")
    )


def test_an_absolute_name_counts_only_below_the_root(tmp_path, cameras):
    outside = tmp_path / "secret.png"
    outside.touch()
    with pytest.raises(InputError, match="not below"):
        load_coco(written(tmp_path, str(outside)), cameras)
    own = cameras / "cam1" / "0001.png"
    assert load_coco(written(tmp_path, str(own)), cameras).paths == (own,)
