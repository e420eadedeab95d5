"""Promises of analysis/stage_panels.py: what is drawn, and where."""

import colorsys

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from projects.stageinteractor.analysis.stages.stage_panels import (
    KINDS,
    LEVELS,
    NEUTRAL,
    crop,
    draw_query,
)
from projects.stageinteractor.drawing.labelled_boxes import LONGEST_SIDE
from projects.stageinteractor.drawing.style import query_colors
from support.stage_records import BOXES, CLASSES, HEIGHT, NUM_STAGES, WIDTH

IMAGE = np.full((HEIGHT, WIDTH, 3), 200, dtype=np.uint8)


def corners(patch):
    x, y = patch.get_xy()
    return [x, y, x + patch.get_width(), y + patch.get_height()]


def test_a_query_has_no_colour_of_a_label():
    """Not even nearly: hues of 30 degrees and more between them, and others of its neighbours."""
    kinds = [colorsys.rgb_to_hsv(*to_rgb(color)) for color in KINDS.values()]
    hues = [hue for hue, saturation, _ in kinds if saturation > 0.3]
    assert len(hues) == 3  # the fourth is grey
    for count in (1, 7, 12, 24):
        colors = query_colors(count)
        assert len(set(colors)) == count
        for color in colors:
            hue, saturation, _ = colorsys.rgb_to_hsv(*to_rgb(color))
            assert saturation > 0.3
            assert min(abs((hue - other + 0.5) % 1 - 0.5) for other in hues) > 30 / 361
    assert NEUTRAL not in KINDS.values()


def test_a_query_alone_has_its_points_boxes_and_offers(record):
    axes = draw_query(record, IMAGE, 2, CLASSES).axes[1]  # stage 1
    lines = axes.patches[1::2]  # above dark ones
    objects = record.labels.boxes.tolist()
    assert [corners(patch) for patch in lines] == [*BOXES[1:], objects[1], objects[0]]
    colors = [to_hex(patch.get_edgecolor()) for patch in lines]
    assert colors == [NEUTRAL, NEUTRAL, KINDS["kept"], KINDS["refused"]]
    before, after, *offered = [patch.get_linestyle() for patch in lines]
    assert after == "-" and before != after and {*offered}.isdisjoint({before, after})
    drawn = {line.get_color(): line.get_xydata() for line in axes.lines
             if line.get_marker() == "o" and len(line.get_xydata())}
    points = record.points[1][2]
    assert {color: len(xy) for color, xy in drawn.items()} == {LEVELS[1]: 3, LEVELS[3]: 3}
    np.testing.assert_allclose(drawn[LEVELS[1]], points[0])
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["object 1: kept, IoU 0.937", "object 0: refused, IoU 0.187"]


@pytest.mark.parametrize("stages, panels", [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (6, (3, 2))])
def test_panels_of_a_query_are_in_two_columns(record, stages, panels):
    index = np.arange(stages) % NUM_STAGES
    longer = record._replace(
        boxes=record.boxes[[0, *index + 1]], scores=record.scores[index], labels=None,
        points=[record.points[i] for i in index], levels=[record.levels[i] for i in index],
        attention=record.attention[index],
    )
    axes = draw_query(longer, IMAGE, 2, CLASSES).axes
    assert axes[0].get_gridspec().get_geometry() == panels
    assert [bool(a.get_title(loc="left")) for a in axes] == [
        i < stages for i in range(np.prod(panels))
    ]


def test_a_query_is_shown_in_the_whole_picture_then_near_by(record):
    """In the picture's proportions, and never beyond it."""
    first, second = draw_query(record, IMAGE, 2, CLASSES).axes
    assert (first.get_xlim(), first.get_ylim()) == ((0, WIDTH), (HEIGHT, 0))
    (left, right), (bottom, top) = second.get_xlim(), second.get_ylim()
    assert 0 < left < 40 and 100 < right < WIDTH and 0 <= top < 20 and 80 < bottom <= HEIGHT
    assert (right - left) / (bottom - top) == pytest.approx(WIDTH / HEIGHT)
    for box in ([0, 0, 30, 9], [150, 110, 170, 140], [-9, -9, 500, 500], [170, 20, 180, 20]):
        boxes = np.tile(np.array(box, dtype=np.float32), (NUM_STAGES + 1, 4, 1))
        x1, y1, x2, y2 = crop(record._replace(boxes=boxes, labels=None), IMAGE, 2)
        inside = np.clip(box, 0, [WIDTH, HEIGHT] * 2)
        assert 0 <= x1 <= inside[0] <= inside[2] <= x2 <= WIDTH + 1e-3 and x1 < x2
        assert 0 <= y1 <= inside[1] <= inside[3] <= y2 <= HEIGHT + 1e-3 and y1 < y2


def test_lines_to_attended_queries_are_as_wide_as_the_weight(record):
    axes = draw_query(record, IMAGE, 2, CLASSES).axes[1]
    widths = [line.get_linewidth() for line in axes.lines if line.get_color() == "white"]
    assert np.diff(widths).tolist() == pytest.approx([5 * (0.15 - 0.6), 5 * (0.05 - 0.15)])


def test_without_annotations_there_are_no_labels(record):
    unlabelled = record._replace(labels=None)
    assert len(draw_query(unlabelled, IMAGE, 2, CLASSES).axes[1].patches) == 4  # two lines each


def test_a_large_picture_is_drawn_smaller_in_its_own_coordinates(record):
    image = np.zeros((HEIGHT, 2 * LONGEST_SIDE, 3), dtype=np.uint8)
    drawn = draw_query(record, image, 2, CLASSES).axes[0].images[0]
    assert drawn.get_array().shape == (HEIGHT // 2, LONGEST_SIDE, 3)
    assert list(drawn.get_extent()) == [0, 2 * LONGEST_SIDE, HEIGHT, 0]
