"""A `StageRecord` as pictures for paper: all chosen queries in one, and one for each query."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from ..drawing.labelled_boxes import draw_boxes, to_xywh
from ..drawing.style import KINDS, LEVELS, query_colors, shown
from .stage_record import StageRecord, partners

PANEL, DPI = 3.2, 110  # PANEL in inches
QUERY_PANEL, QUERY_DPI = 4.2, 150  # letters are read where the picture is shown smaller
NEUTRAL, WIDTH = "#ffffff", 2  # of a query's boxes: no kind of label; in points
DASHED, DOTTED = (0, (4, 3)), (0, (1, 1))
MARGIN = 1.6  # sides of a cropped picture, in those of what it is cropped around
LONGEST_SIDE = 1000  # pixels of a picture in a panel; drawing a photograph in full takes seconds


def shrink(record: StageRecord, image: np.ndarray) -> tuple[StageRecord, np.ndarray]:
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
    num_stages, colors = len(record.scores), query_colors(len(queries))
    aspect = np.clip(image.shape[0] / image.shape[1], 0.2, 1.5)
    heights = [aspect * PANEL + 0.4, max(2.2, 0.2 * (len(queries) + 2))]
    columns = num_stages + 1
    figure = Figure(figsize=(columns * PANEL, sum(heights)), dpi=DPI, layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=heights)
    for place, axes in enumerate(rows[0].subplots(1, columns)):
        boxes = record.boxes[place, list(queries)]
        # The first query, which has the highest score, on top.
        draw_boxes(axes, image, to_xywh(boxes)[::-1], [""] * len(boxes), colors[::-1])
        if place:
            draw_numbers(axes, image, boxes, queries, colors)
        axes.set_title(f"after stage {place - 1}" if place else "before the first stage", size=9)
    has_labels = record.labels is not None
    below = rows[1].subplots(1, 2 if has_labels else 1, width_ratios=[1, 2] if has_labels else [1])
    draw_scores(below[0] if has_labels else below, record, queries, colors, class_names)
    if has_labels:
        draw_label_table(below[1], record, queries)
    return figure


def draw_numbers(
    axes: Axes,
    image: np.ndarray,
    boxes: np.ndarray,
    queries: Sequence[int],
    colors: Sequence[str],
):
    """Each query's number at the corner of its box that is farthest from the numbers before."""
    size, taken = np.array(image.shape[1::-1]), []
    for (x1, y1, x2, y2), query, color in zip(boxes, queries, colors):
        corners = [(x1, y1), (x2, y1), (x1, y2), (x2, y2)]
        corners = np.clip(corners, 0.03 * size, 0.97 * size)  # whole numbers inside
        free = [min((np.hypot(*(corner - other)) for other in taken), default=0)
                for corner in corners]
        taken.append(corners[int(np.argmax(free))])
        axes.text(
            *taken[-1], str(query), size=7, ha="center", va="center", clip_on=True,
            bbox={"facecolor": color, "linewidth": 0, "pad": 1},
        )


def draw_scores(
    axes: Axes,
    record: StageRecord,
    queries: Sequence[int],
    colors: Sequence[str],
    class_names: Sequence[str],
):
    """The score of each query's final class after each stage."""
    stages, final = range(len(record.scores)), record.scores[-1].argmax(-1)
    lines = [
        axes.plot(stages, record.scores[:, query, final[query]], "o-", c=color,
                  label=f"{query} {shown(class_names[final[query]], 16)}")[0]
        for query, color in zip(queries, colors)
    ]
    axes.set(title="score of each query's final class", xlabel="after stage", ylim=(0, 1.02))
    axes.set_xticks(stages)
    axes.set_facecolor("#555")  # the colours are those that stand out from photographs
    axes.grid(alpha=0.3)
    # In the order of the lines' ends, beside them.
    lines.sort(key=lambda line: -line.get_ydata()[-1])
    axes.legend(handles=lines, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7,
                facecolor="#555", labelcolor="white")


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


def kind_handles() -> list[Line2D]:
    """For a legend of what happens to labels."""
    return [Line2D([], [], c=color, lw=6, label=kind) for kind, color in KINDS.items()]


def draw_query(
    record: StageRecord, image: np.ndarray, query: int, class_names: Sequence[str]
) -> Figure:
    """One query in every stage: its box before (dashed) and after, and where it samples.

    White lines lead to the queries that it attends to most, and with annotations coloured ones to
    the objects that the stage is offered as labels, which are dotted. From the second stage on
    the picture is cropped around them.

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
    height = aspect * QUERY_PANEL + 0.35 + 0.22 * most_offers
    size = columns * QUERY_PANEL, num_rows * height + 0.6  # with a legend
    figure = Figure(figsize=size, dpi=QUERY_DPI, layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    views = [(0, 0, image.shape[1], image.shape[0])]
    views += [crop(record, image, query)] * (num_stages - 1)
    for stage, (axes, view) in enumerate(zip(grid.flat, views)):
        draw_stage(axes, record, image, query, stage)
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


def draw_stage(axes: Axes, record: StageRecord, image: np.ndarray, query: int, stage: int):
    """What `draw_query` draws of one stage, below it what the labels are called and their IoU."""
    offers = record.labels.offers[stage].get(query, []) if record.labels else []
    before, after = record.boxes[stage, query], record.boxes[stage + 1, query]
    draw_boxes(axes, image, [], [], [])
    axes.images[0].set_interpolation("bilinear")  # a crop would show its pixels
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
    """The corners (4,) of a box as a line, dark in its gaps and so seen on any ground."""
    x, y, w, h = to_xywh(box)
    for c, ls in (("#0008", "-"), (color, style)):
        axes.add_patch(Rectangle((x, y), w, h, fill=False, ec=c, lw=WIDTH, ls=ls))


def crop(record: StageRecord, image: np.ndarray, query: int) -> tuple[float, ...]:
    """The part x1, y1, x2, y2 of a picture, in its proportions, that has the query's boxes.

    And the objects that it is offered as labels, in any stage.
    """
    boxes = [*record.boxes[1:, query]]
    for by_query in record.labels.offers if record.labels else []:
        boxes += [record.labels.boxes[label.object] for label in by_query.get(query, [])]
    size = np.array(image.shape[1::-1])
    low, high = (np.clip(edge, 0, size) for edge in (
        np.min(boxes, axis=0)[:2], np.max(boxes, axis=0)[2:]
    ))
    share = np.clip(MARGIN * ((high - low) / size).max(), 0.1, 1)  # of a box beyond the edge, too
    start = np.clip((low + high) / 2 - share * size / 2, 0, (1 - share) * size)
    return (*start, *(start + share * size))


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
