"""What the last step of `odtrt run` counts, by hand."""

import numpy as np

from odtrt_lib.app.demonstration import count_found
from odtrt_lib.detector import Detections


def test_a_box_of_the_wrong_class_with_a_higher_score_is_no_find():
    truth = [
        {"bbox": [0, 0, 10, 10], "category_id": 1},  # right, and a second, worse opinion
        {"bbox": [50, 0, 10, 10], "category_id": 1},  # its best detection is of another class
        {"bbox": [0, 50, 10, 10], "category_id": 2},  # missed: IoU 1/3
        {"bbox": [50, 50, 10, 10], "category_id": 2},  # of another class, and nothing else
    ]
    rows = [
        ([0, 0, 10, 10], 0.9, 1),
        ([0, 50, 10, 60], 0.8, 2),
        ([0, 51, 10, 61], 0.7, 1),
        ([50, 5, 60, 15], 0.6, 2),
        ([0, 0, 10, 11], 0.5, 2),
        ([50, 50, 60, 60], 0.4, 1),
    ]
    found = Detections(
        boxes=np.array([box for box, _, _ in rows], np.float32),
        scores=np.array([score for _, score, _ in rows], np.float32),
        class_ids=np.array([class_id for _, _, class_id in rows]),
        names=tuple("ab"[class_id - 1] for _, _, class_id in rows),
    )
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), ())
    assert count_found([truth, [], truth[:1]], [found, none, none]) == {
        "objects_in_the_pictures": 5,
        "objects_found": 1,
        "objects_taken_for_another_class": 2,
        "objects_missed": 2,
        "detections_where_no_object_is": 1,
    }
