"""Colours, names and layouts that all pictures share. This module does not load torch."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure

matplotlib.rcParams["text.parse_math"] = False  # $ in a name does not start a formula

# Okabe and Ito's palette, which colour-blind readers can tell apart, ordered for photographs here
# and for white paper in INKS.
COLORS = ("#56B4E9", "#F0E442", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2")
# Colours of pyramid levels from fine to coarse, and of what happens to a label of a stage.
LEVELS = ("#f0f921", "#fca636", "#e16462", "#b12a90", "#6a00a8", "#0d0887")
KINDS = {"kept": "#2fbf8f", "dropped": "#f08a4b", "borrowed": "#62c0f5", "refused": "#a3adb8"}
# Hues in degrees that are at least 30 degrees from those of KINDS.
FREE_HUES = (*range(65, 126), *range(235, 341))
GOLDEN_RATIO = (5**0.5 - 1) / 2
INKS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")


def palette(count: int, colors: Sequence[str] = COLORS) -> list[str]:
    """`count` colours: the first of `colors`, or if these are too few, hues that differ clearly."""
    if count <= len(colors):
        return list(colors[:count])
    return [to_hex(hsv_to_rgb((i * GOLDEN_RATIO % 1, 0.6, 1))) for i in range(count)]


def query_colors(count: int) -> list[str]:
    """`count` colours of queries that cannot be mistaken for those of KINDS."""
    hues = [FREE_HUES[int(i * GOLDEN_RATIO % 1 * len(FREE_HUES))] / 360 for i in range(count)]
    return [to_hex(hsv_to_rgb((hue, (0.65, 0.4)[i % 2], 1))) for i, hue in enumerate(hues)]


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread over all of them."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def shown(name: str, length: int = 40) -> str:
    """A name that is safe to print and draw, with its middle left out if it is long."""
    name = name if name.isprintable() else repr(name)[1:-1]
    half = length // 2
    return name if len(name) <= length else f"{name[:half - 2]}...{name[1 - half:]}"


def make_grid(
    aspects: Sequence[float], columns: int, *, per_image: int = 1, panel: float, dpi: int
) -> tuple[Figure, np.ndarray]:
    """A figure of empty panels for images, in rows as high as their images.

    Args:
        aspects: height over width of each image.
        columns: panels in a row.
        per_image: panels of each image, side by side.
        panel: width of a panel in inches.
        dpi: pixels per inch.

    Returns:
        the figure, and its panels (rows, columns).
    """
    in_row = columns // per_image
    rows = [max(aspects[i:i + in_row]) for i in range(0, len(aspects), in_row)]
    heights = np.clip(rows, 0.2, 1.5) * panel + 0.45  # with two lines of title
    size = columns * panel, heights.sum() + 0.35  # with a legend
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    options = {"height_ratios": heights.tolist()}
    grid = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw=options)
    for axes in grid.flat:
        axes.axis("off")
    return figure, grid
