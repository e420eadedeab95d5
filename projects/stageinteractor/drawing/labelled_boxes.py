"""Boxes on pictures, which Detectron2's Visualizer draws into a panel of a matplotlib figure."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke
from PIL import Image

from ..data import read_picture
from .style import palette, shown

LONGEST_SIDE = 1000  # pixels of an image in a panel; drawing a full photograph takes seconds
OUTLINE = [withStroke(linewidth=2.2, foreground="black")]
FONT_SIZE = 6.5  # points
GAP = 3  # pixels between labels, for their dark ground
# Shares of an image's height and width.
LOW = 0.12  # boxes lower than this would be filled by their label, which therefore goes below
BOTTOM = 0.92  # unless the box ends below this
RIGHT = 0.75  # labels of boxes that start right of this end where their box ends


def to_xywh(corners: np.ndarray) -> np.ndarray:
    """Convert corners (..., 4) to x, y, width, height (..., 4)."""
    return np.concatenate([corners[..., :2], corners[..., 2:] - corners[..., :2]], axis=-1)


def show_image(axes: Axes, image: np.ndarray, **options: str):
    """Show an image (H, W, 3) in a panel, with its pixels as coordinates.

    Args:
        image: RGB in the range 0..255; more than `LONGEST_SIDE` pixels are shown as fewer.
        options: of matplotlib's ``imshow``.
    """
    height, width = image.shape[:2]
    small = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    axes.imshow(small, extent=(0, width, height, 0), **options)
    axes.axis("off")


def draw_boxes(
    axes: Axes,
    image: np.ndarray,
    boxes: Iterable[Sequence[float]],
    labels: Iterable[str],
    colors: Iterable[str],
):
    """Show an image in a panel, with boxes and their labels, the last box on top.

    Args:
        image: see `show_image`.
        boxes: x, y, width, height in pixels of the image.
        labels: empty ones are not drawn.
        colors: matplotlib's, of each box and its label.
    """
    # A scale of 0 gives its thinnest lines, of a point. Others grow with the image, not the panel.
    visualizer = Visualizer(image, font_size_scale=0)
    # Lines and letters are sharp because they go into the panel, not into an image of fixed size.
    visualizer.output.ax = axes
    show_image(axes, image)
    height, width = image.shape[:2]
    for (x, y, w, h), label, color in zip(boxes, labels, colors):
        visualizer.draw_box((x, y, x + w, y + h), alpha=1, edge_color=color)
        axes.patches[-1].set_path_effects(OUTLINE)
        if label:
            is_right = x > RIGHT * width
            is_below = h < LOW * height and y + h < BOTTOM * height
            place = min(x + w, width) if is_right else max(x, 0), y + h if is_below else max(y, 0)
            visualizer.draw_text(
                label, place, font_size=FONT_SIZE, color=np.add(to_rgb(color), 1) / 2,
                horizontal_alignment="right" if is_right else "left",
            )
            axes.texts[-1].set_clip_on(True)


def separate_labels(axes: Axes):
    """Move labels down until none overlaps another; of two, the one that is drawn last stays.

    The panel must already have its final size, because the size of labels depends on it.
    """
    taken = []
    for text in reversed(axes.texts):
        place = text.get_window_extent()
        for other in sorted(taken, key=lambda other: -other.y1):  # from top to bottom
            if other.overlaps(place):
                place = place.translated(0, other.y0 - place.y1 - GAP)
                text.set_y(axes.transData.inverted().transform((place.x0, place.y1))[1])
        taken.append(place)


def draw_classes(
    axes: Axes,
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    names: Sequence[str],
    notes: Iterable[str] = itertools.repeat(""),
):
    """`draw_boxes` in the colours and with the names of their classes.

    Args:
        classes: index of the class of each box.
        names: of the classes. A class without a name is shown as its index, a single class not at
            all.
        notes: to add to each label.
    """
    colors = palette(max(len(names), 1))
    known = [""] if len(names) == 1 else [shown(name) for name in names]
    labels = [known[i] if i < len(known) else str(i) for i in classes]
    labels = [f"{label} {note}".strip() for label, note in zip(labels, notes)]
    draw_boxes(axes, image, boxes, labels, [colors[i % len(colors)] for i in classes])


def draw_record(axes: Axes, record: dict, names: Sequence[str], title: str = ""):
    """Draw an image as it is in its file, upright according to its EXIF tag, with all its boxes.

    Args:
        record: Detectron2's dictionary of the image.
        names: of the classes.
        title: to be put before the name of the file.

    Raises:
        UserError: the image is missing or cannot be read.
    """
    image, items = read_picture(record["file_name"], "RGB"), record.get("annotations", [])
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYWH_ABS) for item in items]
    crowds = ["(crowd)" if item.get("iscrowd") else "" for item in items]
    draw_classes(axes, image, boxes, [item["category_id"] for item in items], names, crowds)
    height, width = image.shape[:2]
    name = shown(Path(record["file_name"]).name)
    axes.set_title(f"{title}{name}\n{width} x {height}, boxes: {len(boxes)}", size=8, loc="left")
