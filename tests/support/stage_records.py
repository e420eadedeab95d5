"""A record of stages that is made up."""

import numpy as np
import pytest

from projects.stageinteractor.analysis.stages.stage_record import Label, Labels, StageRecord

HEIGHT, WIDTH = 120, 160


NUM_STAGES, NUM_QUERIES = 2, 4


CLASSES = ["cat", "<b>dog</b>"]


# Query 2 shrinks from the whole picture to an object in two steps.
BOXES = [[0, 0, WIDTH, HEIGHT], [40, 20, 100, 80], [50, 30, 90, 70]]


@pytest.fixture(scope="module")
def record():
    """A record with numbers that can be looked for."""
    boxes = np.tile(np.array(BOXES, dtype=np.float32)[:, None], (1, NUM_QUERIES, 1))
    boxes[1:, 0] += 10
    scores = np.zeros((NUM_STAGES, NUM_QUERIES, 2))
    scores[:, 2] = [[0.25, 0.125], [0.0625, 0.875]]
    points = np.stack(np.meshgrid([60, 70], [40, 50, 60]), -1).reshape(2, 3, 2)
    points = [np.tile(points.astype(float), (NUM_QUERIES, 1, 1, 1)) + stage for stage in range(2)]
    levels = np.zeros((NUM_QUERIES, 2, 3, 4))
    levels[:, 0, :, 1] = levels[:, 1, :, 3] = 0.75  # a group a level
    levels[:, 0, :, 0] = levels[:, 1, :, 2] = 0.25
    attention = np.full((NUM_STAGES, NUM_QUERIES, NUM_QUERIES), 0.1)
    attention[1, 2] = [0.15, 0.05, 0.2, 0.6]
    offers = [
        {2: [Label(0, "dropped", 0.4375, [0]), Label(1, "borrowed", 0.625, [1])]},
        {2: [Label(1, "kept", 0.9375, [1]), Label(0, "refused", 0.1875, [0])]},
    ]
    labels = Labels(
        boxes=np.array([[42, 22, 98, 78], [50, 30, 90, 70]], dtype=np.float32),
        classes=np.array([0, 1]),
        match=np.array([[-1, -1, 0, -1], [0, -1, 1, -1]]),
        offers=offers,
        iou_threshold=0.5,
    )
    reused = [{}, {0: np.array([0.1, 0.2, 0.3, 0.4])}]
    rows = [None, np.array([0.5, 0.6, 0.7, 0.8])]
    return StageRecord(
        boxes, scores, points, [levels, levels], [4, 8, 16, 32], attention, reused, rows, labels
    )
