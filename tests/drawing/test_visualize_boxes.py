"""Labels of boxes on pictures can be read, and hide little."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from projects.stageinteractor.drawing.labelled_boxes import draw_boxes


def extents(box, label="label 0.50"):
    """Where the label of one box is, in pixels of a 100 x 200 image."""
    figure = Figure(figsize=(3.2, 1.6), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_boxes(axes, np.zeros((100, 200, 3), np.uint8), [box], [label], ["#56B4E9"])
    FigureCanvasAgg(figure).draw()
    text, = axes.texts
    corners = axes.transData.inverted().transform(text.get_window_extent())
    (x1, y2), (x2, y1) = corners
    assert text.get_clip_on() and text.get_fontsize() >= 6
    return x1, y1, x2, y2


@pytest.mark.parametrize("box", [
    [10, 10, 60, 40], [180, 10, 20, 40], [150, -5, 70, 30], [-10, -10, 30, 40], [30, 80, 40, 20],
])
def test_labels_are_in_the_picture_at_the_top_of_their_box(box):
    x1, y1, x2, y2 = extents(box)
    assert -1 <= x1 < x2 <= 201 and -1 <= y1 < y2 <= 101
    assert abs(y1 - max(box[1], 0)) < 3
    assert min(abs(x1 - max(box[0], 0)), abs(x2 - min(box[0] + box[2], 200))) < 2


def test_labels_leave_small_boxes_free():
    assert extents([50, 50, 8, 8])[1] > 57
    assert extents([50, 92, 8, 8])[3] <= 101  # there is no room below
