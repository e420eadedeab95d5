"""A model's detections, drawn by Detectron2's Visualizer and written as a COCO file."""

import copy
import io
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke
from PIL import Image

from ..data.coco_file import coco_annotation
from ..data.reading import IMAGE_SUFFIXES
from ..files import write_durably
from .labelled_boxes import separate_labels
from .style import palette, shown

JPEG_QUALITY = 95  # letters blur at Pillow's 75
LEAST_SIDE = 800  # pixels: labels would cover the objects of smaller pictures
MAX_PIXELS = 2**24  # matplotlib takes 100 bytes a pixel
RIM = 2  # points of black around a line, so that it shows on bright ground


class DetectionFile:
    """Collects detections picture by picture, for a file in COCO's instance format with scores.

    Args:
        categories: ``id`` and ``name`` of each class, in the model's order.
        info: the file's ``info``.
    """

    def __init__(self, categories: Sequence[dict], info: dict):
        self.categories, self.info = categories, info
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add(self, found: Instances, file_name: str, **more):
        """Add the detections, on the CPU, of a picture; ``more`` goes into the picture's entry.

        Of ``track_ids``, those below 0 are left out.
        """
        height, width = found.image_size
        number = len(self.images) + 1
        self.images.append(
            {"id": number, "file_name": file_name, "height": height, "width": width, **more}
        )
        fields = found.pred_boxes.tensor, found.scores, found.pred_classes
        ids = found.track_ids.tolist() if found.has("track_ids") else [-1] * len(found)
        for corners, score, index, track in zip(*(field.tolist() for field in fields), ids):
            of_track = {"track_id": track} if track >= 0 else {}
            self.annotations.append(coco_annotation(
                len(self.annotations) + 1, number, self.categories[index]["id"], corners,
                digits=2, score=round(score, 6), **of_track,
            ))

    @property
    def content(self) -> dict:
        """The content of the file."""
        names = "info", "categories", "images", "annotations"
        return {name: getattr(self, name) for name in names}

    def write(self, path: Path):
        """Write the file as `write_durably` does. Raises OSError if that fails."""
        text = json.dumps(self.content)
        write_durably(str(path), lambda file: file.write(text.encode()))


def class_metadata(names: Sequence[str]) -> Metadata:
    """Names and colours of classes for Detectron2's visualizers. The names may be any text."""
    colors = [[round(255 * part) for part in to_rgb(color)] for color in palette(len(names))]
    return Metadata(thing_classes=[shown(name) for name in names], thing_colors=colors)


def draw_detections(
    image: np.ndarray, found: Instances, metadata: Metadata, *, keep_size: bool = False
) -> np.ndarray:
    """Draw detections in the colours of their classes.

    Args:
        image: (H, W, 3) RGB uint8.
        found: on the CPU. ``track_ids``, unless they are below 0, become part of the labels.
        metadata: see `class_metadata`.
        keep_size: otherwise an image whose longer side is below `LEAST_SIDE` is enlarged to that,
            and one of more than `MAX_PIXELS` is shrunk.

    Returns:
        (h, w, 3) RGB uint8.
    """
    height, width = image.shape[:2]
    most = (MAX_PIXELS / (height * width)) ** 0.5
    scale = 1 if keep_size else min(max(1, LEAST_SIDE / max(height, width)), most)
    if scale != 1:
        size = max(1, int(width * scale)), max(1, int(height * scale))
        image = np.asarray(Image.fromarray(image).resize(size))
        found = detector_postprocess(copy.deepcopy(found), *size[::-1])  # changes its boxes
    if not len(found):  # matplotlib before 3.8 shifts some images by a pixel
        return image
    if found.has("track_ids"):
        found, metadata = with_track_labels(found, metadata)
    visualizer = Visualizer(image, metadata, instance_mode=ColorMode.SEGMENTATION)
    drawn = visualizer.draw_instance_predictions(found, jittering=False)
    for box in drawn.ax.patches:
        rim = withStroke(linewidth=box.get_linewidth() + RIM, foreground="black")
        box.set(alpha=1, path_effects=[rim])
    separate_labels(drawn.ax)
    return drawn.get_image()


def with_track_labels(found: Instances, metadata: Metadata) -> tuple[Instances, Metadata]:
    """Make each detection a class of its own, named with the id of its track as well."""
    classes, ids = found.pred_classes.tolist(), found.track_ids.tolist()
    names = [metadata.thing_classes[index] for index in classes]
    names = [f"{name} #{track}" if track >= 0 else name for name, track in zip(names, ids)]
    fields = {**found.get_fields(), "pred_classes": torch.arange(len(found))}
    colors = [metadata.thing_colors[index] for index in classes]
    metadata = Metadata(thing_classes=names, thing_colors=colors)
    return Instances(found.image_size, **fields), metadata


def save_picture(picture: np.ndarray, path: Path):
    """Write a picture (H, W, 3) RGB uint8 in the format of the name's suffix.

    Raises:
        OSError: it cannot be written.
    """
    encoded = io.BytesIO()  # Pillow would not report that a disk is full
    form = Image.registered_extensions()[path.suffix.lower()]
    Image.fromarray(picture).save(encoded, form, quality=JPEG_QUALITY)
    write_durably(str(path), lambda file: file.write(encoded.getbuffer()))


def picture_name(path: str) -> str:
    """The name of a file without its folder, as PNG unless its format is a common one."""
    name = Path(path).name
    keeps = IMAGE_SUFFIXES - {".gif"}  # which has 256 colours at most
    return name if Path(name).suffix.lower() in keeps else f"{Path(name).stem}.png"


def unused_path(folder: Path, name: str) -> Path:
    """A path in a folder that is not taken: the name gets a number if it is."""
    path = folder / name
    for number in itertools.count(2):
        if not os.path.lexists(path):
            return path
        path = folder / f"{Path(name).stem}_{number}{Path(name).suffix}"
