"""Curves of training, drawn and looked at."""

import numpy as np
import visualize
from matplotlib.colors import to_rgb
from PIL import Image


def run(command, **options):
    arguments = [command]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    visualize.main(arguments)
    return np.asarray(Image.open(options["output"]).convert("RGB")).astype(int)


def has_color(picture, color):
    """Which pixels of a picture (H, W, 3) have a matplotlib colour, nearly: (H, W)."""
    return (abs(picture - np.array(to_rgb(color)) * 255) < 12).all(axis=-1)
