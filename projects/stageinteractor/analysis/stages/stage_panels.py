"""A query of a `StageRecord`, stage by stage, as a picture for paper."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from ...drawing.labelled_boxes import to_xywh
from ...drawing.style import KINDS, LEVELS, shown
from .stage_record import StageRecord, partners

PANEL, DPI = 4.2, 150  # PANEL in inches; large enough to be read where the picture is shown smaller
NEUTRAL, WIDTH = "#ffffff", 2  # a query's boxes, whose colour means no kind of label; points
DASHED, DOTTED = (0, (4, 3)), (0, (1, 1))
MARGIN = 1.6  # size of a close-up, relative to what it shows
LONGEST_SIDE = 1000  # pixels of a picture in a panel; drawing a full photograph takes seconds


def draw_query(
    record: StageRecord, image: np.ndarray, query: int, class_names: Sequence[str]
) -> Figure:
    """Draw a query in every stage: its box before (dashed) and after, and where it samples.

    White lines lead to the queries that it attends to most. With annotations, coloured lines lead
    to the objects (dotted) that the stage is offered as labels. From the second stage on, the
    panel is a close-up of the boxes and objects.

    Args:
        image: the picture (H, W, 3), RGB, uint8.
    """
    num_stages = len(record.scores)
    columns = min(2, num_stages)
    num_rows = math.ceil(num_stages / columns)
    by_stage = record.labels.offers if record.labels else []
    most_offers = max((len(by_query.get(query, [])) for by_query in by_stage), default=0)
    # With a title and the labels.
    aspect = np.clip(image.shape[0] / image.shape[1], 0.2, 1.5)
    height = aspect * PANEL + 0.35 + 0.22 * most_offers
    size = columns * PANEL, num_rows * height + 0.6  # with a legend
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    small = Image.fromarray(image)
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    views = [(0, 0, image.shape[1], image.shape[0])]
    views += [crop(record, image, query)] * (num_stages - 1)
    for stage, (axes, view) in enumerate(zip(grid.flat, views)):
        axes.imshow(small, extent=(0, image.shape[1], image.shape[0], 0), interpolation="bilinear")
        draw_stage(axes, record, query, stage)
        (x1, y1, x2, y2), score = view, score_text(record, stage, query, class_names)
        axes.set(xlim=(x1, x2), ylim=(y2, y1))
        axes.set_title(f"query {query} in stage {stage}: {score}", size=11, loc="left")
    handles = [
        Line2D([], [], ls="", marker="o", c=color, mec="black", label=f"mostly stride {stride}")
        for color, stride in zip(LEVELS, record.strides)
    ]
    handles += [
        Line2D([], [], c=NEUTRAL, lw=WIDTH, label="box after the stage"),
        Line2D([], [], c=NEUTRAL, lw=WIDTH, ls=DASHED, label="box before it"),
        Line2D([], [], c=NEUTRAL, lw=1, label="attention"),
    ]
    if record.labels:
        handles.append(Line2D([], [], c=NEUTRAL, lw=WIDTH, ls=DOTTED, label="offered object"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4, fontsize=10,
        facecolor="#46525e", labelcolor="white",
    )
    return figure


def draw_stage(axes: Axes, record: StageRecord, query: int, stage: int):
    """Draw what `draw_query` shows of one stage; the kinds and IoUs of labels go below it."""
    offers = record.labels.offers[stage].get(query, []) if record.labels else []
    before, after = record.boxes[stage, query], record.boxes[stage + 1, query]
    draw_attention(axes, record, stage, query)
    draw_points(axes, record, stage, query)
    outline(axes, before, NEUTRAL, DASHED)
    outline(axes, after, NEUTRAL, "-")
    for offer in offers:
        box = record.labels.boxes[offer.object]
        outline(axes, box, KINDS[offer.kind], DOTTED)
        draw_line(axes, after, box, KINDS[offer.kind], WIDTH)
    if offers:
        handles = [
            Line2D([], [], c=KINDS[offer.kind], lw=6,
                   label=f"object {offer.object}: {offer.kind}, IoU {offer.shown_iou}")
            for offer in offers
        ]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), fontsize=10.5,
                    frameon=False, borderpad=0.2, handlelength=1)


def outline(axes: Axes, box: np.ndarray, color: str, style):
    """Draw a box (4,) as a line that is dark in its gaps, so that it shows on any ground."""
    x, y, w, h = to_xywh(box)
    for c, ls in (("#0008", "-"), (color, style)):
        axes.add_patch(Rectangle((x, y), w, h, fill=False, ec=c, lw=WIDTH, ls=ls))


def crop(record: StageRecord, image: np.ndarray, query: int) -> tuple[float, ...]:
    """Return the part x1, y1, x2, y2 of a picture that a close-up of a query shows.

    It has the picture's proportions, and contains the query's boxes after every stage and the
    objects that any stage offers it as labels.
    """
    boxes = [*record.boxes[1:, query]]
    for by_query in record.labels.offers if record.labels else []:
        boxes += [record.labels.boxes[label.object] for label in by_query.get(query, [])]
    size = np.array(image.shape[1::-1])
    low, high = (np.clip(edge, 0, size) for edge in (
        np.min(boxes, axis=0)[:2], np.max(boxes, axis=0)[2:]
    ))
    share = np.clip(MARGIN * ((high - low) / size).max(), 0.1, 1)  # boxes may lie beyond the edge
    start = np.clip((low + high) / 2 - share * size / 2, 0, (1 - share) * size)
    return (*start, *(start + share * size))


def draw_attention(axes: Axes, record: StageRecord, stage: int, query: int):
    """Draw lines to the queries that are attended to most; their width shows the weight."""
    boxes = record.boxes[stage]
    for other in partners(record, stage, query):
        width = 0.4 + 5 * record.attention[stage, query, other]
        draw_line(axes, boxes[query], boxes[other], "white", width)


def draw_line(axes: Axes, a: np.ndarray, b: np.ndarray, color: str, width: float):
    """Draw a line between the centres of two boxes, (4,) corners each."""
    (x1, y1), (x2, y2) = (a[:2] + a[2:]) / 2, (b[:2] + b[2:]) / 2
    axes.plot([x1, x2], [y1, y2], c=color, lw=width)


def draw_points(axes: Axes, record: StageRecord, stage: int, query: int):
    """Draw all groups' sampling points in the colour of the level with the largest share."""
    points = record.points[stage][query].reshape(-1, 2)
    main = record.levels[stage][query].reshape(len(points), -1).argmax(-1)
    for level, color in zip(range(len(record.strides)), LEVELS):
        x, y = points[main == level].T
        axes.plot(x, y, "o", c=color, ms=3.2, mec="black", mew=0.4)


def score_text(
    record: StageRecord, stage: int, query: int, class_names: Sequence[str]
) -> str:
    """Return the most likely class of a query after a stage and its score."""
    best = int(record.scores[stage, query].argmax())
    return f"{shown(class_names[best], 16)} {record.scores[stage, query, best]:.2f}"
