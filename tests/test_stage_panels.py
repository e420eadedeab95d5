"""Promises of visualization/stage_panels.py: what is drawn, and where."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_stage_page import BOXES, CLASSES, HEIGHT, NUM_STAGES, WIDTH, record  # noqa: F401

from projects.stageinteractor.visualization.stage_panels import (
    KINDS,
    LEVELS,
    LONGEST_SIDE,
    draw_overview,
    draw_query,
    shrink,
)

IMAGE = np.full((HEIGHT, WIDTH, 3), 200, dtype=np.uint8)


def corners(patch):
    x, y = patch.get_xy()
    return [x, y, x + patch.get_width(), y + patch.get_height()]


def test_boxes_of_a_query_move_from_panel_to_panel(record):  # noqa: F811
    figure = draw_overview(record, IMAGE, [2], CLASSES)
    panels = figure.subfigs[0].axes
    assert len(panels) == NUM_STAGES + 1
    for axes, box in zip(panels, BOXES):
        assert corners(axes.patches[0]) == box
    assert [axes.get_title() for axes in panels] == [
        "before the first stage", "after stage 0", "after stage 1"
    ]
    assert "2 <b>dog</b> 0.88" in [text.get_text() for text in panels[-1].texts]


def test_scores_are_those_of_the_final_class(record):  # noqa: F811
    axes = draw_overview(record, IMAGE, [2], CLASSES).subfigs[1].axes[0]
    assert axes.lines[0].get_ydata().tolist() == [0.125, 0.875]


def test_labels_are_told_with_the_iou_in_the_colour_of_their_kind(record):  # noqa: F811
    axes = draw_overview(record, IMAGE, [2, 0], CLASSES).subfigs[1].axes[1]
    marks = {text.get_text(): to_hex(text.get_bbox_patch().get_facecolor())
             for text in axes.texts if text.get_bbox_patch()}
    assert marks == {
        "0: 0.437": KINDS["dropped"], "1: 0.625": KINDS["borrowed"],
        "1: 0.937": KINDS["kept"], "0: 0.187": KINDS["refused"],
    }


def test_a_query_alone_has_its_points_boxes_and_offers(record):  # noqa: F811
    axes = draw_query(record, IMAGE, 2, CLASSES).axes[1]  # stage 1
    boxes = [corners(patch) for patch in axes.patches[:2]]
    assert boxes == BOXES[1:]
    assert axes.patches[0].get_linestyle() == "--" != axes.patches[1].get_linestyle()
    drawn = {line.get_color(): line.get_xydata() for line in axes.lines
             if line.get_marker() == "o" and len(line.get_xydata())}
    points = record.points[1][2]
    assert {color: len(xy) for color, xy in drawn.items()} == {LEVELS[1]: 3, LEVELS[3]: 3}
    np.testing.assert_allclose(drawn[LEVELS[1]], points[0])
    texts = [text.get_text() for text in axes.texts]
    assert "1 kept 0.937" in texts and "0 refused 0.187" in texts


def test_lines_to_attended_queries_are_as_wide_as_the_weight(record):  # noqa: F811
    axes = draw_query(record, IMAGE, 2, CLASSES).axes[1]
    widths = [line.get_linewidth() for line in axes.lines if line.get_color() == "white"]
    assert np.diff(widths).tolist() == pytest.approx([5 * (0.15 - 0.6), 5 * (0.05 - 0.15)])


def test_without_annotations_there_are_no_labels(record):  # noqa: F811
    unlabelled = record._replace(labels=None)
    assert len(draw_overview(unlabelled, IMAGE, [2], CLASSES).subfigs[1].axes) == 1
    assert len(draw_query(unlabelled, IMAGE, 2, CLASSES).axes[1].patches) == 2


@pytest.mark.parametrize("size", [(21, 2 * LONGEST_SIDE), (3 * LONGEST_SIDE, 600), (30, 40)])
def test_a_large_picture_is_shrunk_with_its_boxes_and_points(record, size):  # noqa: F811
    scaled, small = shrink(record, np.zeros((*size, 3), dtype=np.uint8))
    assert max(small.shape[:2]) == min(LONGEST_SIDE, max(size))
    scale = np.array([small.shape[1] / size[1], small.shape[0] / size[0]])
    np.testing.assert_allclose(scaled.boxes, record.boxes * np.tile(scale, 2))
    np.testing.assert_allclose(scaled.points[0], record.points[0] * scale)
    np.testing.assert_allclose(scaled.labels.boxes, record.labels.boxes * np.tile(scale, 2))
    assert shrink(record._replace(labels=None), IMAGE)[0].labels is None
