"""What the model sees: images of a data set after augmentation, with the boxes to learn."""

from collections.abc import Sequence

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from ..config.building import build_mapper, load_dataset
from ..config.preflight import class_names
from ..data.randomness import IMAGE, keep_random_states, seed_random
from ..data.unreadable import unreadable
from ..drawing.labelled_boxes import draw_classes, draw_record, to_xywh
from ..drawing.style import make_grid, spread
from ..errors import UserError

PANEL, DPI = 2.8, 150  # PANEL in inches


def draw_data(cfg: DictConfig, split: str, count: int, repeats: int, seed: int) -> Figure:
    """Draw a row per image: as it is in its file, then several versions of its augmentation.

    The same seed gives the same picture. Images are spread over what a run uses of the data set.
    Crowds are not learned, and are therefore drawn in the file only. A panel stays empty if the
    mapper skips its image.

    Args:
        cfg: its data set must be resolved.
        split: ``train`` or ``test``.
        count: most images.
        repeats: versions of each image.
        seed: of the augmentation.

    Raises:
        UserError: the data set is missing, or an image cannot be read.
    """
    dataset = spread(load_dataset(cfg, split), count)
    names = class_names(cfg.dataloader[split].dataset)
    mapper = build_mapper(cfg, split)
    aspects = [record["height"] / record["width"] for record in dataset]
    columns = 1 + repeats
    figure, grid = make_grid(aspects, columns, per_image=columns, panel=PANEL, dpi=DPI)
    for number, (record, panels) in enumerate(zip(dataset, grid)):
        try:
            draw_record(panels[0], record, names)
            for repeat, axes in enumerate(panels[1:]):
                with keep_random_states():
                    seed_random(seed, IMAGE, number, repeat)
                    mapped = mapper(record)
                if mapped is not None:
                    draw_mapped(axes, mapped, getattr(mapper, "image_format", "RGB"), names)
        except Exception as error:
            found = unreadable(record, error)
            raise UserError(f"cannot read {found.file_name}: {found.reason}") from error
    return figure


def draw_mapped(axes: Axes, mapped: dict, image_format: str, names: Sequence[str]):
    """Draw an image as the model takes it, with its objects if they are known."""
    image = convert_image_to_rgb(mapped["image"].permute(1, 2, 0), image_format)
    corners, classes = np.zeros((0, 4)), []
    if "instances" in mapped:
        corners = mapped["instances"].gt_boxes.tensor.numpy()
        classes = mapped["instances"].gt_classes.tolist()
    draw_classes(axes, image, to_xywh(corners), classes, names)
    height, width = image.shape[:2]
    axes.set_title(f"{width} x {height}, objects: {len(classes)}", fontsize=8, loc="left")
