"""A `StageRecord` as pictures for paper: all chosen queries in one, and one for each query."""

from typing import List, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from .boxes import draw_boxes, to_xywh
from .stage_record import StageRecord, partners
from .style import KINDS, LEVELS, make_grid, palette, shown

PANEL, DPI = 3.2, 110  # PANEL in inches
LONGEST_SIDE = 1000  # pixels of a picture in a panel; drawing a photograph in full takes seconds


def shrink(record: StageRecord, image: np.ndarray) -> Tuple[StageRecord, np.ndarray]:
    """A picture no larger than panels need, and its record in pixels of that.

    Args:
        image: the picture (H, W, 3), RGB, uint8.
    """
    height, width = image.shape[:2]
    small = Image.fromarray(image)
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    scale = np.array([small.width / width, small.height / height])
    labels = record.labels and record.labels._replace(boxes=record.labels.boxes * np.tile(scale, 2))
    scaled = record._replace(
        boxes=record.boxes * np.tile(scale, 2),
        points=[points * scale for points in record.points],
        labels=labels,
    )
    return scaled, np.asarray(small)


def draw_overview(
    record: StageRecord, image: np.ndarray, queries: Sequence[int], class_names: Sequence[str]
) -> Figure:
    """The boxes of the chosen queries before the first stage and after each, and their scores.

    With annotations, also every label that is kept, dropped, borrowed or refused, and its IoU.

    Args:
        image: the picture (H, W, 3), RGB, uint8.
    """
    num_stages, colors = len(record.scores), palette(len(queries))
    aspect = np.clip(image.shape[0] / image.shape[1], 0.2, 1.5)
    heights = [aspect * PANEL + 0.4, max(2.2, 0.2 * (len(queries) + 2))]
    columns = num_stages + 1
    figure = Figure(figsize=(columns * PANEL, sum(heights)), dpi=DPI, layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=heights)
    for place, axes in enumerate(rows[0].subplots(1, columns)):
        notes = [""] * len(queries) if place == 0 else [
            f"{query} {score_text(record, place - 1, query, class_names)}" for query in queries
        ]
        # The first query, which has the highest score, on top.
        drawn = list(zip(to_xywh(record.boxes[place, list(queries)]), notes, colors))[::-1]
        draw_boxes(axes, image, *zip(*drawn))
        axes.set_title(f"after stage {place - 1}" if place else "before the first stage", size=9)
    has_labels = record.labels is not None
    below = rows[1].subplots(1, 2 if has_labels else 1, width_ratios=[1, 2] if has_labels else [1])
    draw_scores(below[0] if has_labels else below, record, queries, colors)
    if has_labels:
        draw_label_table(below[1], record, queries)
    return figure


def draw_scores(axes: Axes, record: StageRecord, queries: Sequence[int], colors: Sequence[str]):
    """The score of each query's final class after each stage."""
    stages = range(len(record.scores))
    for query, color in zip(queries, colors):
        final = record.scores[-1, query].argmax()
        scores = record.scores[:, query, final]
        axes.plot(stages, scores, "o-", c=color)
        axes.text(stages[-1] + 0.06, scores[-1], str(query), c=color, size=8, va="center")
    axes.set(title="score of each query's final class", xlabel="after stage", ylim=(0, 1.02))
    axes.set_xticks(stages)
    axes.set_facecolor("#555")  # the colours are those that stand out from photographs
    axes.grid(alpha=0.3)


def draw_label_table(axes: Axes, record: StageRecord, queries: Sequence[int]):
    """A row for each query, a column for each stage: object, what happens to its label, IoU."""
    axes.axis("off")
    num_stages = len(record.scores)
    axes.set(xlim=(-0.3, num_stages), ylim=(len(queries), -1), title="labels: object, IoU")
    for stage in range(num_stages):
        axes.text(stage + 0.02, -0.5, f"stage {stage}", size=8, weight="bold", va="center")
    for row, query in enumerate(queries):
        axes.text(-0.3, row + 0.5, f"query {query}", size=8, va="center")
        for stage, offers in enumerate(record.labels.offers):
            # At most three find room beside each other; the rest is in the page.
            for number, label in enumerate(offers.get(query, [])[:3]):
                axes.text(
                    stage + 0.02 + number / 3, row + 0.5, f"{label.object}: {label.shown_iou}",
                    size=7, va="center",
                    bbox={"facecolor": KINDS[label.kind], "linewidth": 0, "pad": 1.5},
                )
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
    axes.legend(handles=kind_handles(), **above, ncols=4, fontsize=7)


def kind_handles() -> List[Line2D]:
    """For a legend of what happens to labels."""
    return [Line2D([], [], c=color, lw=6, label=kind) for kind, color in KINDS.items()]


def draw_query(
    record: StageRecord, image: np.ndarray, query: int, class_names: Sequence[str]
) -> Figure:
    """One query in every stage: its box before (dashed) and after, and where it samples.

    White lines lead to the queries that it attends to most, and with annotations coloured ones to
    the objects that the stage is offered as labels.

    Args:
        image: the picture (H, W, 3), RGB, uint8.
    """
    figure, grid = make_grid(
        [image.shape[0] / image.shape[1]], len(record.scores), panel=1.4 * PANEL, dpi=DPI
    )
    for stage, axes in enumerate(grid[0]):
        before, after = record.boxes[stage, query], record.boxes[stage + 1, query]
        labels = record.labels.offers[stage].get(query, []) if record.labels else []
        boxes, notes = [before, after], ["", ""]
        boxes += [record.labels.boxes[label.object] for label in labels]
        notes += [f"{label.object} {label.kind} {label.shown_iou}" for label in labels]
        colors = ["#ffffff", "#56B4E9"] + [KINDS[label.kind] for label in labels]
        draw_boxes(axes, image, to_xywh(np.stack(boxes)), notes, colors)
        for patch in [axes.patches[0], *axes.patches[2:]]:
            patch.set_linestyle("--")
        draw_attention(axes, record, stage, query)
        for label, color in zip(labels, colors[2:]):
            draw_line(axes, after, record.labels.boxes[label.object], color, 1.5)
        draw_points(axes, record, stage, query)
        axes.set_xlim(0, image.shape[1])
        axes.set_ylim(image.shape[0], 0)
        axes.set_title(
            f"query {query} in stage {stage}: {score_text(record, stage, query, class_names)}",
            size=9, loc="left",
        )
    handles = [
        Line2D([], [], ls="", marker="o", c=color, mec="black", label=f"mostly stride {stride}")
        for color, stride in zip(LEVELS, record.strides)
    ]
    handles += [Line2D([], [], ls="--", c="#999", label="box before the stage"),
                Line2D([], [], c="#56B4E9", label="box after it")]
    if record.labels:
        handles += kind_handles()
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def draw_attention(axes: Axes, record: StageRecord, stage: int, query: int):
    """Lines to the queries that are attended to most, as wide as the weight."""
    boxes = record.boxes[stage]
    for other in partners(record, stage, query):
        width = 0.4 + 5 * record.attention[stage, query, other]
        draw_line(axes, boxes[query], boxes[other], "white", width)


def draw_line(axes: Axes, a: np.ndarray, b: np.ndarray, color: str, width: float):
    """A line between the centres of two boxes, (4,) corners each."""
    (x1, y1), (x2, y2) = (a[:2] + a[2:]) / 2, (b[:2] + b[2:]) / 2
    axes.plot([x1, x2], [y1, y2], c=color, lw=width)


def draw_points(axes: Axes, record: StageRecord, stage: int, query: int):
    """Sampling points of all groups in the colour of the level that has the largest share."""
    points = record.points[stage][query].reshape(-1, 2)
    main = record.levels[stage][query].reshape(len(points), -1).argmax(-1)
    for level, color in zip(range(len(record.strides)), LEVELS):
        x, y = points[main == level].T
        axes.plot(x, y, "o", c=color, ms=3.2, mec="black", mew=0.4)


def score_text(
    record: StageRecord, stage: int, query: int, class_names: Sequence[str]
) -> str:
    """The most likely class of a query after a stage and its score."""
    best = int(record.scores[stage, query].argmax())
    return f"{shown(class_names[best], 16)} {record.scores[stage, query, best]:.2f}"
