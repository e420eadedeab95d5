"""A query of a `StageRecord`, stage by stage, as a picture for paper."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ...drawing.labelled_boxes import show_image, to_xywh
from ...drawing.style import KINDS, LEVELS, make_grid, shown
from .stage_record import StageRecord, partners

PANEL, DPI = 4.2, 150  # PANEL in inches; large enough to be read where the picture is shown smaller
NEUTRAL, WIDTH = "#ffffff", 2  # a query's boxes, whose colour means no kind of label; points
DASHED, DOTTED = (0, (4, 3)), (0, (1, 1))
MARGIN = 1.6  # size of a close-up, relative to what it shows


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
    by_stage = record.labels.offers if record.labels else []
    most_offers = max((len(by_query.get(query, [])) for by_query in by_stage), default=0)
    aspect = image.shape[0] / image.shape[1] + 0.22 * most_offers / PANEL  # with their labels
    figure, grid = make_grid([aspect] * num_stages, columns, panel=PANEL, dpi=DPI)
    near = crop(record, image, query)
    for stage, axes in enumerate(grid.flat[:num_stages]):
        show_image(axes, image, interpolation="bilinear")
        draw_stage(axes, record, query, stage)
        x1, y1, x2, y2 = near if stage else (0, 0, image.shape[1], image.shape[0])
        axes.set(xlim=(x1, x2), ylim=(y2, y1))
        best = record.scores[stage, query].argmax()
        score = f"{shown(class_names[best], 16)} {record.scores[stage, query, best]:.2f}"
        axes.set_title(f"query {query} in stage {stage}: {score}", size=11, loc="left")
    handles = [
        Line2D([], [], ls="", marker="o", c=color, mec="black", label=f"mostly stride {stride}")
        for color, stride in zip(LEVELS, record.strides)
    ]
    lines = {"box after the stage": (WIDTH, "-"), "box before it": (WIDTH, DASHED),
             "attention": (1, "-")}
    if record.labels:
        lines["offered object"] = WIDTH, DOTTED
    handles += [Line2D([], [], c=NEUTRAL, lw=width, ls=style, label=label)
                for label, (width, style) in lines.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4, fontsize=10,
        facecolor="#46525e", labelcolor="white",
    )
    return figure


def draw_stage(axes: Axes, record: StageRecord, query: int, stage: int):
    """Draw what `draw_query` shows of one stage; the kinds and IoUs of labels go below it."""
    offers = record.labels.offers[stage].get(query, []) if record.labels else []
    before, after = record.boxes[stage], record.boxes[stage + 1, query]
    for other in partners(record, stage, query):
        width = 0.4 + 5 * record.attention[stage, query, other]
        draw_line(axes, before[query], before[other], "white", width)
    points = record.points[stage][query].reshape(-1, 2)
    main = record.levels[stage][query].reshape(len(points), -1).argmax(-1)
    for level, color in zip(range(len(record.strides)), LEVELS):
        axes.plot(*points[main == level].T, "o", c=color, ms=3.2, mec="black", mew=0.4)
    outline(axes, before[query], NEUTRAL, DASHED)
    outline(axes, after, NEUTRAL, "-")
    handles = []
    for offer in offers:
        box, color = record.labels.boxes[offer.object], KINDS[offer.kind]
        outline(axes, box, color, DOTTED)
        draw_line(axes, after, box, color, WIDTH)
        label = f"object {offer.object}: {offer.kind}, IoU {offer.shown_iou}"
        handles.append(Line2D([], [], c=color, lw=6, label=label))
    if offers:
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
    corners = np.clip(boxes, 0, np.tile(size, 2))  # boxes may lie beyond the edge
    low, high = corners[:, :2].min(0), corners[:, 2:].max(0)
    share = np.clip(MARGIN * ((high - low) / size).max(), 0.1, 1)
    start = np.clip((low + high) / 2 - share * size / 2, 0, (1 - share) * size)
    return (*start, *(start + share * size))


def draw_line(axes: Axes, a: np.ndarray, b: np.ndarray, color: str, width: float):
    """Draw a line between the centres of two boxes, (4,) corners each."""
    (x1, y1), (x2, y2) = (a[:2] + a[2:]) / 2, (b[:2] + b[2:]) / 2
    axes.plot([x1, x2], [y1, y2], c=color, lw=width)
