"""anchors.npy: what was written is read to the bit, and everything else is an InputError."""

from __future__ import annotations

import dataclasses
import io
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spec_cases import SPEC

from odtrt_lib.anchors import anchor_problem, load_anchors
from odtrt_lib.errors import InputError

ANCHORS = np.random.default_rng(0).uniform(0.1, 1, (SPEC.heads.num_anchors, 4)).astype(np.float32)


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), **options)
    return file.getvalue()


def with_header(text):
    """A file of the right size whose header is ``text``."""
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin-1") + ANCHORS.tobytes()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def read(path, content):
    path.write_bytes(content)
    return load_anchors(path, SPEC)


def refused(path, content, *words):
    with pytest.raises(InputError) as caught:
        read(path, content)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.fixture
def path(tmp_path):
    return tmp_path / "anchors.npy"


def test_what_numpy_writes_is_read_to_the_bit(path):
    found = read(path, npy(ANCHORS))
    assert found.tobytes() == ANCHORS.tobytes() and found.dtype == np.float32 and found.shape == ANCHORS.shape
    assert found.flags.c_contiguous and found.flags.writeable


SHAPE = f"({len(ANCHORS)}, 4)"
NOT_ANCHORS = {
    "npz": (npz(anchors=ANCHORS), "an npz archive"),
    "damaged npz": (b"PK\x03\x04" + bytes(60), "an npz archive"),
    "pickle": (pickle.dumps(ANCHORS), "not a numpy array"),
    "objects": (
        npy(np.array([[None] * 4] * 5), allow_pickle=True),
        "object [5, 4]",
        "expected float32 [5, 4]",
    ),
    "nothing": (b"", "not a numpy array"),
    "magic only": (b"\x93NUMPY", "not a numpy array"),
    "text": (b"0.5 0.5 1 1\n" * 5, "not a numpy array"),
    "doubles": (npy(ANCHORS.astype(np.float64)), "float64 [5, 4], expected float32 [5, 4] as spec.json says"),
    "halves": (npy(ANCHORS.astype(np.float16)), "float16 [5, 4]"),
    "big-endian": (npy(ANCHORS.astype(">f4")), "'>f4' [5, 4], expected float32 [5, 4]"),
    "Fortran order": (npy(np.asfortranarray(ANCHORS)), "in Fortran order"),
    "fewer": (npy(ANCHORS[:-1]), "float32 [4, 4], expected float32 [5, 4]"),
    "flat": (npy(ANCHORS.ravel()), "float32 [20]"),
    "version 2": (npy(ANCHORS, version=(2, 0)), "not a numpy array"),
    "truth for a size": (
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4), }"),
        "not a numpy",
    ),
    "huge": (
        with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**15}, 4), }}"),
        f"[{10**15}, 4]",
    ),
    "a call": (with_header(f"__import__('os').abort() or {{'shape': {SHAPE}}}"), "not a numpy array"),
    "deep": (with_header("(" * 110), "not a numpy array"),
    "no such type": (
        with_header(f"{{'descr': 'q77', 'fortran_order': False, 'shape': {SHAPE}, }}"),
        "q77 [5, 4]",
    ),
    "cut off": (npy(ANCHORS)[:-1], "79 bytes of anchors, expected 80"),
    "something appended": (npy(ANCHORS) + b"\0", "81 bytes of anchors, expected 80"),
}


@pytest.mark.parametrize("name", NOT_ANCHORS)
def test_other_files_are_named_as_what_they_are(path, name):
    content, *words = NOT_ANCHORS[name]
    refused(path, content, *words)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *((c, v) for c in range(4) for v in (np.nan, np.inf, -np.inf)),
        *((c, v) for c in (2, 3) for v in (0, -0.1)),
    ],
)
def test_values_that_are_no_anchors(path, column, value):
    anchors = ANCHORS.copy()
    anchors[3, column] = value
    refused(path, npy(anchors), "anchor 3 is", "expected finite")


def test_an_absent_file(path):
    with pytest.raises(InputError, match=r"anchors\.npy: cannot be read .*odtrt export"):
        load_anchors(path, SPEC)


def test_a_spec_of_many_anchors_takes_no_memory(path):
    path.write_bytes(with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**31 - 1}, 4), }}"))
    spec = dataclasses.replace(SPEC, heads=dataclasses.replace(SPEC.heads, num_anchors=2**31 - 1))
    with pytest.raises(InputError, match=r"80 bytes.* 34359738352"):
        load_anchors(path, spec)


def test_every_flipped_bit_and_every_cut_is_refused_or_read_as_numpy_reads_it(path):
    content = npy(ANCHORS)
    num_read = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = read(path, flipped)
        except InputError:
            continue
        assert found.tobytes() == np.load(path).tobytes() == flipped[-ANCHORS.nbytes :]
        assert bit >= 8 * (len(content) - ANCHORS.nbytes) and anchor_problem(found) == ""
        num_read += 1
    assert num_read > 4 * ANCHORS.nbytes  # most of the values are anchors still; only hashes tell
    for size in range(len(content)):
        refused(path, content[:size])


@settings(
    derandomize=True,
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    content=st.binary(max_size=300)
    | st.builds(with_header, st.text(st.characters(max_codepoint=255), max_size=117))
    | st.builds(lambda data: npy(ANCHORS)[: -ANCHORS.nbytes] + data, st.binary(min_size=80, max_size=80))
)
def test_any_bytes(path, content):
    try:
        found = read(path, content)
    except InputError:
        return
    assert found.tobytes() == np.load(path).tobytes()
