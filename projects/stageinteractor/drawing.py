"""Boxes on pictures, and colours. matplotlib draws: Detectron2 would need OpenCV."""

from typing import Iterable, List, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

matplotlib.rcParams["text.parse_math"] = False  # $ in a name starts no formula

# Okabe and Ito's palette, which colour-blind readers can tell apart, those that stand out from
# photographs first.
COLORS = ("#56B4E9", "#F0E442", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2")
OUTLINE = [withStroke(linewidth=2.2, foreground="black")]
LABEL = {"facecolor": "black", "alpha": 0.6, "pad": 0.8, "linewidth": 0}


def palette(count: int, colors: Sequence[str] = COLORS) -> List[str]:
    """As many colours: those given, or if there are too few, hues with neighbours far apart."""
    if count <= len(colors):
        return list(colors[:count])
    golden_ratio = (5**0.5 - 1) / 2
    return [to_hex(hsv_to_rgb((i * golden_ratio % 1, 0.6, 1))) for i in range(count)]


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread: full and empty images come as they are."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def draw_boxes(
    axes: Axes,
    image: Image.Image,
    boxes: Iterable[Sequence[float]],
    labels: Iterable[str],
    colors: Iterable[str],
):
    """Show an image with boxes (x, y, width, height in pixels) and a label at each one's top."""
    axes.imshow(image)
    axes.axis("off")
    for (x, y, width, height), label, color in zip(boxes, labels, colors):
        axes.add_patch(
            Rectangle((x, y), width, height, fill=False, ec=color, path_effects=OUTLINE)
        )
        if label:
            corner = max(x, 0) + 2, max(y, 0) + 2
            axes.text(*corner, label, c=color, size=6.5, va="top", bbox=LABEL, clip_on=True)
