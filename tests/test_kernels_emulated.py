"""The CUDA kernels without a GPU: compiled for the CPU and run in plugins/emulator, one fiber a thread.

Their answers are compared, bit for bit, with those of the CPU library, which test_nms.py, test_native.py and
test_preprocess.py compare with TensorFlow and numpy; some with the numpy reference itself. test_gpu.py does
the same on a GPU, of which much is not emulated: plugins/emulator/README.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import cuda_calls
import nms_cases
import numpy as np
import pytest
from kernels_build import build_emulated

from odtrt_lib import native, nms
from odtrt_lib.spec import InputSpec, NmsSpec, Resizer, ScoreSpec

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("cmake") is None or shutil.which("g++") is None,
    reason="the emulator needs cmake and g++ on x86-64",
)

AnyCase = nms_cases.Case | nms_cases.NmsCase
# Compute capability 9 and newer, in clusters of so many blocks at most; older GPUs have five kernels.
WAYS = {
    "clusters of 16": {"CLUSTER": 16},
    "clusters of 4": {"CLUSTER": 4},
    "one block": {"CLUSTER": 1},
    "five kernels": {"MAJOR": 8},
}
USUAL = NmsSpec(0.3, 0.5, 100, 100, False, True)
RACE, WRONG = "race in shared memory", " instead of "
BEHIND = 64  # bytes behind each buffer, which nobody may write

# Seeded defects: file, what is there, what is there instead while {it} holds, what finds it.
DEFECTS = {
    "a slot that one more row does not fit into is taken for all there is": (
        "postprocess_select.cuh",
        "slot.size > kSlotSize)",
        "slot.size > kSlotSize + ({it} ? 16u : 0u))",
        WRONG,
    ),
    "a block does not say from which score up its slot has all": (
        "postprocess_select.cuh",
        "space.slot_bounds[blockIdx.x] = bound;",
        "space.slot_bounds[blockIdx.x] = {it} ? 0 : bound;",
        WRONG,
    ),
    "keys are taken for logits": (
        "postprocess_select.cuh",
        "if (thread == 0) slot.are_keys = 1;\n      for",
        "if (thread == 0) slot.are_keys = {it} ? 0 : 1;\n      for",
        WRONG,
    ),
    "logits at the threshold are candidates": (
        "postprocess.cu",
        "std::nextafter(threshold, kInfinity)",
        "std::nextafter(threshold, {it} ? threshold : kInfinity)",
        WRONG,
    ),
    "no barrier before the best anchors are read": (
        "postprocess_select.cuh",
        "    __syncthreads();\n    const int count =",
        "    if (!{it}) __syncthreads();\n    const int count =",
        RACE,
    ),
    "no barrier before the rest is filtered": (
        "postprocess_cluster_per_class.cuh",
        "  __syncthreads();\n  own.found += ",
        "  if (!{it}) __syncthreads();\n  own.found += ",
        RACE,
    ),
    "what was kept suppresses nothing of the rest": (
        "postprocess_cluster_per_class.cuh",
        "&kept_of.x : &kept_of.y, 1u << lane);",
        "&kept_of.x : &kept_of.y, {it} ? 0u : 1u << lane);",
        WRONG,
    ),
    "no barrier before the mask of the sorted batch": (
        "postprocess_cluster_per_class.cuh",
        "= shared.unsorted_boxes[row];\n  }\n  __syncthreads();",
        "= shared.unsorted_boxes[row];\n  }\n  if (!{it}) __syncthreads();",
        RACE,
    ),
    "half of enough is enough": (
        "postprocess_cluster_per_class.cuh",
        "sum >= max_detections)",
        "sum >= ({it} ? max_detections / 2 : max_detections))",
        WRONG,
    ),
    "no barrier before the candidates go to their buckets": (
        "postprocess_sm75.cuh",
        "__syncthreads();  // counts[b] is now where bucket b ends",
        "if (!{it}) __syncthreads();",
        RACE,
    ),
    "one more than a class may hold, on older GPUs": (
        "postprocess_sm75.cuh",
        "popc(peers & ((1u << lane) - 1)) < static_cast<uint32_t>(call.cap);",
        "popc(peers & ((1u << lane) - 1)) < static_cast<uint32_t>(call.cap) + {it};",
        WRONG,
    ),
    "no barrier before what was kept is linked": (
        "postprocess_cluster_global.cuh",
        "__syncthreads();  // what the last batch kept has been written",
        "if (!{it}) __syncthreads();",
        "race in global memory",
    ),
    "no barrier of the cluster before the mask of a batch": (
        "postprocess_cluster_global.cuh",
        "      sync_cluster();\n      // mask",
        "      if (!{it}) sync_cluster();\n      // mask",
        RACE,
    ),
    "no barrier of the block within a round": (
        "postprocess_cluster_global.cuh",
        "      if (lane == 0) shared.stays[warp] = word;\n    }\n    __syncthreads();",
        "      if (lane == 0) shared.stays[warp] = word;\n    }\n    if (!{it}) __syncthreads();",
        RACE,
    ),
    "no barrier of the warp before a candidate is dropped": (
        "postprocess_cluster_global.cuh",
        "__syncwarp();  // all four have read it",
        "if (!{it}) __syncwarp();",
        RACE,
    ),
    "blocks wait for others and have not arrived": (
        "postprocess_cluster_global.cuh",
        "      } else {\n        cluster_arrive();",
        "      } else if (!{it}) {\n        cluster_arrive();",
        "a thread waits at the cluster's barrier and has not arrived",
    ),
    "one more than a class may hold": (
        "postprocess_cluster_global.cuh",
        "is_kept = held < static_cast<uint32_t>(call.cap);",
        "is_kept = held < static_cast<uint32_t>(call.cap) + {it};",
        WRONG,
    ),
    "the margin on the wrong side": (
        "suppression.cuh",
        "1.0f - 1.9073486328125e-6f",
        "{it} ? 1.0f + 1e-3f : 1.0f - 1.9073486328125e-6f",
        WRONG,
    ),
    "a sliver that TensorFlow's threads flush to zero is shared": (
        "suppression.cuh",
        "fmaxf(flushed_sub(fminf(a.ymax, b.ymax), fmaxf(a.ymin, b.ymin)), 0.0f)",
        "fmaxf(({it} ? sub : flushed_sub)(fminf(a.ymax, b.ymax), fmaxf(a.ymin, b.ymin)), 0.0f)",
        WRONG,
    ),
    "of equal scores the higher index is better": (
        "nms.cu",
        "strength + (column < first_row + r) > own_strength[r]",
        "strength + ({it} ? column > first_row + r : column < first_row + r) > own_strength[r]",
        WRONG,
    ),
    "no barrier in the rounds over all boxes": (
        "nms.cu",
        "= word;\n    }\n    __syncthreads();\n  }",
        "= word;\n    }\n    if (!{it}) __syncthreads();\n  }",
        RACE,
    ),
}


class HostMemory:
    """Stands in for a GPU's: what :mod:`cuda_calls` asks of it, and a pattern behind every buffer."""

    def __init__(self) -> None:
        self.buffers: list[np.ndarray] = []

    def __call__(self, array: np.ndarray) -> HostTensor:
        raw = np.full(array.nbytes + 256 + BEHIND, 0x5A, np.uint8)
        start = -raw.ctypes.data % 256
        buffer = raw[start : start + array.nbytes + BEHIND]
        buffer[: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        self.buffers.append(buffer)
        return HostTensor(buffer[: array.nbytes].view(array.dtype).reshape(array.shape))

    def is_intact(self) -> bool:
        return all((buffer[-BEHIND:] == 0x5A).all() for buffer in self.buffers)


@dataclasses.dataclass
class HostTensor:
    array: np.ndarray

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def cpu(self) -> HostTensor:
        return self

    def numpy(self) -> np.ndarray:
        return self.array


class Emulated:
    """A library in the emulator; ``settings`` are those of plugins/emulator/README.md and of its build."""

    def __init__(self, path: Path, **settings: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(native.ENVIRONMENT_VARIABLE, str(path))
            found = native.load()
        assert found is not None and found.cuda_architectures == "emulated"
        self.library, self.settings = found, settings

    def complaint(self, case: AnyCase, **settings: int) -> str:
        """What is wrong with the kernels' answer to a case beside the CPU's; empty where nothing is."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**self.settings, **settings}.items():
                patch.setenv(f"ODTRT_EMULATED_{name}", str(value))
            try:
                return f"{case.name}: {found}" if (found := self._difference(case)) else ""
            except native.NativeError as error:
                return f"{case.name}: {error}"

    def _difference(self, case: AnyCase) -> str:
        if isinstance(case, nms_cases.Case):
            return nms_cases.difference(nms_cases.by_library(self.library)(case), self.postprocess(case))
        expected, found = nms_by_cpu(self.library, case), self.select(case)
        return "" if np.array_equal(expected, found) else f"{found[:8]} instead of {expected[:8]}"

    def postprocess(self, case: nms_cases.Case) -> nms.Postprocessed:
        memory = HostMemory()
        call = cuda_calls.Postprocess(self.library, case, memory)
        call.enqueue_on(0)
        assert memory.is_intact(), case.name
        return call.result()

    def select(self, case: nms_cases.NmsCase) -> np.ndarray:
        memory = HostMemory()
        found = cuda_calls.select(self.library, case, memory, 0)
        assert memory.is_intact(), case.name
        return found

    def check(self, cases: Iterable[AnyCase], **settings: int) -> None:
        """No complaints, each case with threads and blocks in another order."""
        lines = [self.complaint(case, SEED=number, **settings) for number, case in enumerate(cases)]
        assert lines, "no cases"
        assert not any(lines), "\n".join(line for line in lines if line)


def nms_by_cpu(library: native.Library, case: nms_cases.NmsCase) -> np.ndarray:
    most = max(1, len(case.boxes) if case.max_kept is None else case.max_kept)
    return native.nms_cpu(
        library, case.boxes, case.scores, case.classes, most, case.iou_threshold, case.score_threshold
    )


def random_cases(*numbers: int) -> Iterator[nms_cases.Case]:
    return map(nms_cases.random_case, range(*numbers))


def chosen_cases(*names: str) -> list[nms_cases.Case]:
    """One of nms_cases.chosen_cases() for each name, in float32."""
    every = [case for case in nms_cases.chosen_cases() if case.class_logits.dtype == np.float32]
    return [next(case for case in every if name in case.name) for name in names]


def cases_at_the_edges() -> Iterator[nms_cases.Case]:
    """What random cases hardly draw: a pair whose logit and place are both 0, keys without gaps."""
    rng = np.random.default_rng(0)
    case = nms_cases.make_case("place 0", nms_cases.detector_spec(500, 90, USUAL), 2, rng)
    logits = np.full_like(case.class_logits, -9)
    logits[:, 0, 0], logits[:, 7, 3] = 0, 1
    yield dataclasses.replace(case, class_logits=logits)
    settings = dataclasses.replace(USUAL, iou_threshold=1.0, max_total_detections=1500)
    settings = dataclasses.replace(settings, max_detections_per_class=5000)
    spec = nms_cases.detector_spec(5003, 1, settings)
    yield nms_cases.make_case("no gaps between the keys", spec, 1, rng, "scattered", "all equal")
    yield just_full(0.0, "sigmoid")
    yield just_full(-np.inf, "identity")
    yield infinite_scores(1405, 3)
    yield many_columns()
    yield just_below()
    for threshold, columns in itertools.product((0.0, 2.0, np.inf), (30, 130)):
        yield at_the_threshold(threshold, columns)


def infinite_scores(anchors: int, most_of_class: int) -> nms_cases.Case:
    """Keys so large that a range of them ends where 64 bits do."""
    settings = dataclasses.replace(USUAL, score_threshold=1.0, max_detections_per_class=most_of_class)
    spec = nms_cases.detector_spec(anchors, 30, settings, scores=ScoreSpec("identity", 1.0))
    return nms_cases.make_case("infinite", spec, 1, np.random.default_rng(1), "all the same", "not finite")


def below_zero() -> nms_cases.Case:
    """Fewer boxes than asked for, and every octave of the scores below zero to look for them in."""
    spec = nms_cases.detector_spec(900, 30, dataclasses.replace(USUAL, score_threshold=-1.0))
    return nms_cases.make_case("below zero", spec, 1, np.random.default_rng(1), "all the same", "tied")


def just_full(threshold: float, converter: str) -> nms_cases.Case:
    """64 candidates fill a block's slot; then come anchors that are NaN, then 16 better ones an anchor."""
    spec = nms_cases.detector_spec(
        800, 16, dataclasses.replace(USUAL, score_threshold=threshold), scores=ScoreSpec(converter, 1.0)
    )
    rng = np.random.default_rng(0)
    case = nms_cases.make_case(f"just full, {converter}", spec, 1, rng, "scattered")
    logits = np.full_like(case.class_logits, np.nan)
    logits[0, :4] = 0.01 * rng.random((4, 16)) - 2
    logits[0, 320:324] = 0.01 * rng.random((4, 16)) + 3  # the same warp's, where 40 warps take four in turn
    return dataclasses.replace(case, class_logits=logits)


def many_columns() -> nms_cases.Case:
    """More columns than a warp reads at a time, and more candidates than a slot holds."""
    spec = nms_cases.detector_spec(600, 130, dataclasses.replace(USUAL, score_threshold=0.05))
    return nms_cases.make_case("many columns", spec, 1, np.random.default_rng(0), "scattered", "tied")


def just_below() -> nms_cases.Case:
    """Scores so little below the threshold that their logits, which are compared roughly, pass."""
    case = nms_cases.make_case(
        "just below", nms_cases.detector_spec(500, 90, USUAL), 1, np.random.default_rng(0)
    )
    return dataclasses.replace(case, class_logits=np.full_like(case.class_logits, np.log(3 / 7) - 1e-3))


def at_the_threshold(threshold: float, columns: int) -> nms_cases.Case:
    """All scores of the first image are the threshold, which is not enough; the second has better ones."""
    settings = dataclasses.replace(USUAL, score_threshold=threshold)
    spec = nms_cases.detector_spec(300, columns, settings, scores=ScoreSpec("identity", 1.0))
    name = f"at the threshold {threshold}, {columns} columns"
    case = nms_cases.make_case(name, spec, 2, np.random.default_rng(0))
    logits = np.full_like(case.class_logits, threshold)
    logits[1, ::7, 3] += 1
    return dataclasses.replace(case, class_logits=logits)


def one_class_behind() -> nms_cases.Case:
    """Ten crowds of one class, each better than the next: its block needs round after round for them."""
    spec = nms_cases.detector_spec(900, 16, dataclasses.replace(USUAL, score_threshold=0.05))
    rng = np.random.default_rng(0)
    case = nms_cases.make_case("one class behind", spec, 1, rng)
    crowd, column, row = np.arange(600) // 60, np.arange(300) % 20, np.arange(300) // 20
    anchors = np.empty_like(case.anchors)
    anchors[:600] = np.stack([0 * crowd + 0.1, 0.1 * crowd + 0.05, 0 * crowd + 0.1, 0 * crowd + 0.08], 1)
    anchors[:600, :2] += 0.004 * rng.random((600, 2))
    anchors[600:] = np.stack([0.25 + 0.05 * row, 0.05 * column + 0.025, *np.full((2, 300), 0.04)], 1)
    logits = np.full_like(case.class_logits, -20)
    logits[0, :600, 0] = 5 - 0.3 * crowd + 0.1 * rng.random(600)
    classes = np.where(np.arange(300) % 2, 0, rng.integers(1, 16, 300))
    logits[0, 600 + np.arange(300), classes] = rng.uniform(-1, 2, 300)
    encodings = np.zeros_like(case.box_encodings)
    return dataclasses.replace(case, anchors=anchors, box_encodings=encodings, class_logits=logits)


def all_the_same(anchors: int = 300, classes: int = 90) -> nms_cases.Case:
    """One box of a class suppresses all others, so one head of the order is looked for after the other."""
    spec = nms_cases.detector_spec(anchors, classes, USUAL)
    rng = np.random.default_rng(0)
    return nms_cases.make_case("all the same", spec, 1, rng, "all the same", "saturated")


def cases_by_class() -> Iterator[nms_cases.Case]:
    """Hundreds of candidates of many classes, in crowds; in the last two more than the slots hold."""
    yield just_full(0.0, "sigmoid")
    yield many_columns()
    yield one_class_behind()
    spec = nms_cases.detector_spec(900, 16, dataclasses.replace(USUAL, score_threshold=0.05))
    for seed, less in enumerate((7, 7, 5, 0)):
        case = nms_cases.make_case(f"by class {seed}", spec, 1, np.random.default_rng(seed), "crowds")
        yield dataclasses.replace(case, class_logits=case.class_logits - np.float32(less))


def nms_case(count: int, classes: int, threshold: float, most: int | None) -> nms_cases.NmsCase:
    rng = np.random.default_rng([count, classes])
    corner = rng.uniform(0, 10 * count**0.5, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, (count, 2))], 1).astype(np.float32)
    boxes[rng.random(count) < 0.05, 2:] = 0
    scores = rng.integers(0, count // 2, count).astype(np.float32)
    own = rng.integers(0, classes, count).astype(np.int32) if classes > 1 else None
    return nms_cases.NmsCase(f"{count} boxes", boxes, scores, threshold, own, -np.inf, most)


@pytest.fixture(scope="module")
def emulated_path(tmp_path_factory) -> Path:
    """The library; from how many pairs on a head is a large one is no constant but the setting FEW_PAIRS."""
    constant = "constexpr int64_t kFewPairs = ODTRT_FEW_PAIRS;"
    setting = '#define kFewPairs emulator::setting("FEW_PAIRS", ODTRT_FEW_PAIRS)'
    change = ("kernels/postprocess.cuh", constant, setting)
    return build_emulated(tmp_path_factory.mktemp("emulated"), changes=[change])


@pytest.fixture(scope="module")
def emulated(emulated_path) -> Emulated:
    return Emulated(emulated_path)


@pytest.fixture(scope="module")
def emulated_large(emulated_path) -> Emulated:
    """Heads of more than 100 pairs go the way of large ones."""
    return Emulated(emulated_path, FEW_PAIRS=100)


@pytest.fixture(scope="module")
def defective(tmp_path_factory) -> Emulated:
    """All of DEFECTS, each while the setting DEFECT is its number."""
    changes = [
        (f"kernels/{file}", old, new.replace("{it}", f'(emulator::setting("DEFECT", 0) == {number})'))
        for number, (file, old, new, _) in enumerate(DEFECTS.values(), start=1)
    ]
    folder = tmp_path_factory.mktemp("defective")
    return Emulated(build_emulated(folder, "-DODTRT_FEW_PAIRS=100", changes=changes))


@pytest.mark.parametrize("way", WAYS)
def test_postprocess(emulated, way):
    emulated.check(random_cases(25 if way == "clusters of 16" else 60), **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_boxes_and_scores_about_the_limits_of_float32(emulated, emulated_large, way):
    for library, first in ((emulated, 0), (emulated_large, 100)):
        numbers = range(first, first + (18 if way == "clusters of 16" else 45))
        library.check(map(nms_cases.extreme_case, numbers), **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_postprocess_of_small_heads_as_of_large_ones(emulated_large, way):
    emulated_large.check(random_cases(200, 215 if way == "clusters of 16" else 240), **WAYS[way])


def test_postprocess_at_the_edges(emulated_large):
    emulated_large.check(cases_at_the_edges(), CLUSTER=1, MULTIPROCESSORS=1)
    emulated_large.check(
        [infinite_scores(1405, 3), infinite_scores(1405, 100)], CLUSTER=16, MULTIPROCESSORS=1
    )
    emulated_large.check([below_zero(), infinite_scores(1405, 3)], MAJOR=8)


@pytest.mark.parametrize("way", WAYS)
def test_postprocess_class_by_class(emulated_large, way):
    emulated_large.check(cases_by_class(), **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_chosen_cases(emulated, way):
    names = (
        "1917 x 11, crowds, distinct", "1917 x 11, all the same, all equal", "many anchors", "601 classes",
        "softmax", "softmax: 1 x 1917 x 20, crowds, not finite", "class-agnostic", "one anchor, one class",
        "small cap", "head is too short", "no area", "boxes: 1 x 2003 x 4, not finite", "signed zeros",
    )  # fmt: skip
    cases = chosen_cases(*names)[list(WAYS).index(way) % 2 :: 2]  # every case two ways
    emulated.check(cases, MULTIPROCESSORS=24, **WAYS[way])


def test_a_batch_has_smaller_clusters(emulated):
    emulated.check(chosen_cases("batch of 32"), CLUSTER=4)


def test_the_numpy_reference_says_the_same(emulated):
    assert not list(nms_cases.disagreements(emulated.postprocess, random_cases(500, 515)))
    cases = map(nms_cases.random_nms_case, range(500, 515))
    assert not list(nms_cases.nms_disagreements(emulated.select, cases))


def test_nms(emulated):
    emulated.check(map(nms_cases.random_nms_case, range(80)))
    emulated.check(nms_case(count, 1, 0.5, None) for count in (33, 1024, 2049, 4096, 4097))
    emulated.check(nms_case(count, 3, 0.3, 100) for count in (1025, 2048, 4096, 4097))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_preprocess(emulated, dtype):
    rng = np.random.default_rng(5)
    for (height, width), true in (((72, 128), (27, 48)), ((33, 51), (48, 48)), ((1, 1), (48, 32))):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        resizer = Resizer("fixed_shape", pad_value=(0.5, -1, 2))
        spec = InputSpec(48, 48, resizer, (1 / 127.5, 1 / 60, 1 / 58), (-1, -2, 0.25))
        memory = HostMemory()
        found = cuda_calls.preprocess_difference(emulated.library, image, spec, true, memory, 0, dtype)
        assert not found
        assert memory.is_intact()


def test_no_races(emulated, emulated_large):
    for library, first in ((emulated, 0), (emulated_large, 300)):
        library.check(random_cases(first, first + 7), RACES=1, CLUSTER=4)
        library.check(random_cases(first + 7, first + 14), RACES=1, MAJOR=8)
    emulated_large.check(itertools.islice(cases_by_class(), 3), RACES=1, CLUSTER=4)
    emulated_large.check([all_the_same()], RACES=1, CLUSTER=4)
    emulated.check(map(nms_cases.random_nms_case, range(30)), RACES=1)
    emulated.check([nms_case(1025, 1, 0.5, None)], RACES=1)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found(defective, defect):
    number, (file, _, _, expected) = list(DEFECTS).index(defect) + 1, DEFECTS[defect]
    cases: Iterator[AnyCase] = random_cases(40)
    if file == "postprocess.cu":
        cases = reversed([*cases_at_the_edges()])
    elif "select" in file or "per_class" in file:
        cases = cases_by_class()
    elif "global" in file:
        same = [all_the_same(60, 20), all_the_same(200), all_the_same()]
        cases = itertools.chain(random_cases(1), same, random_cases(1, 40))
    elif "sliver" in defect:
        cases = map(nms_cases.extreme_case, range(2, 200, 3))
    elif not file.startswith("postprocess"):
        cases = itertools.chain(map(nms_cases.random_nms_case, range(40)), [nms_case(2049, 1, 0.5, None)])
    multiprocessors = 1 if "select" in file or file == "postprocess.cu" else 3
    way = {"MAJOR": 8} if "sm75" in file else {"CLUSTER": 4, "MULTIPROCESSORS": multiprocessors}
    settings = {**way, "RACES": int("race" in expected)}
    for case in cases:
        if found := defective.complaint(case, DEFECT=number, **settings):
            assert expected in found
            assert not defective.complaint(case, **settings), "without the defect too"
            return
    pytest.fail("not found")
