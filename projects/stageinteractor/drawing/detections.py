"""A model's detections, drawn by Detectron2's Visualizer and written as a COCO file."""

import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from detectron2.data.catalog import Metadata
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
RIM = 2  # points of black around a line, so that it shows on bright ground
MAX_PIXELS, MAX_SIDE = 2**24, 16383  # matplotlib takes 100 bytes a pixel; WebP has no longer side


class DetectionFile:
    """Collects detections picture by picture, for a file in COCO's instance format with scores.

    It keeps only a few numbers of each detection, so that those of a long video fit in memory.

    Args:
        categories: ``id`` and ``name`` of each class, in the model's order.
        info: the file's ``info``.
    """

    def __init__(self, categories: Sequence[dict], info: dict):
        self.categories, self.info = categories, info
        self.pictures: list[tuple] = []  # entry, corners (n, 4), scores (n,), classes (n,)

    @property
    def num_detections(self) -> int:
        return sum(len(scores) for _, _, scores, _ in self.pictures)

    def add(self, found: Instances, file_name: str, **more):
        """Add the detections, on the CPU, of a picture; ``more`` goes into the picture's entry."""
        height, width = found.image_size
        entry = {"id": len(self.pictures) + 1, "file_name": file_name, "height": height,
                 "width": width, **more}
        boxes = found.pred_boxes.tensor.numpy()
        self.pictures.append((entry, boxes, found.scores.numpy(), found.pred_classes.numpy()))

    def annotations(self) -> Iterator[dict]:
        """COCO annotations with scores, of all pictures."""
        number = itertools.count(1)
        for entry, boxes, scores, classes in self.pictures:
            for corners, score, index in zip(boxes.tolist(), scores.tolist(), classes.tolist()):
                yield coco_annotation(
                    next(number), entry["id"], self.categories[index]["id"], corners,
                    digits=2, score=round(score, 6),
                )

    def lines(self) -> Iterator[str]:
        """The text of the file, with a line for each picture and each detection."""
        yield f'{{"info": {json.dumps(self.info)},\n"categories": {json.dumps(self.categories)}'
        images = (entry for entry, *_ in self.pictures)
        for name, entries in (("images", images), ("annotations", self.annotations())):
            yield f',\n"{name}": ['
            for place, entry in enumerate(entries):
                yield (",\n" if place else "\n") + json.dumps(entry)
            yield "\n]"
        yield "}\n"

    def write(self, path: Path):
        """Write the file as `write_durably` does. Raises OSError if that fails."""
        write_durably(str(path), lambda file: file.writelines(map(str.encode, self.lines())))


def class_metadata(names: Sequence[str]) -> Metadata:
    """Names and colours of classes for Detectron2's visualizers. The names may be any text."""
    colors = [[round(255 * part) for part in to_rgb(color)] for color in palette(len(names))]
    return Metadata(thing_classes=[shown(name) for name in names], thing_colors=colors)


def draw_detections(image: np.ndarray, found: Instances, metadata: Metadata) -> np.ndarray:
    """`overlay_detections` on a picture of a suitable size, (h, w, 3) RGB uint8.

    A small picture is enlarged to `LEAST_SIDE`, one of more than 16 million pixels is shrunk.

    Args:
        image: (H, W, 3) RGB uint8.
        found: on the CPU.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    most = min((MAX_PIXELS / (height * width)) ** 0.5, MAX_SIDE / longest)
    scale = min(max(1, LEAST_SIDE / longest), most)
    if scale != 1:
        size = max(1, int(width * scale)), max(1, int(height * scale))
        how = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
        image = np.asarray(Image.fromarray(image).resize(size, how))
        boxes = found.pred_boxes.clone()
        boxes.scale(size[0] / width, size[1] / height)
        found = Instances(size[::-1], **{**found.get_fields(), "pred_boxes": boxes})
    return overlay_detections(image, found, metadata)


def overlay_detections(image: np.ndarray, found: Instances, metadata: Metadata) -> np.ndarray:
    """A picture (H, W, 3) RGB uint8 with its detections in the colours of their classes."""
    if not len(found):  # matplotlib before 3.8 shifts some images by a pixel
        return image
    visualizer = Visualizer(image, metadata, instance_mode=ColorMode.SEGMENTATION)
    drawn = visualizer.draw_instance_predictions(found, jittering=False)
    for box in drawn.ax.patches:
        rim = withStroke(linewidth=box.get_linewidth() + RIM, foreground="black")
        box.set(alpha=1, path_effects=[rim])
    separate_labels(drawn.ax)
    return drawn.get_image()


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
