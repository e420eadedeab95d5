"""Data sets in COCO format that live in a JSON file and a folder of images, and their images."""

from .coco import coco_dataset, training_dicts
from .loader import begin_loading, build_train_loader
from .reading import open_image, read_image, read_picture
from .resize import ResizeShortestEdgeBilinear
from .unreadable import NameUnreadable, ReadableBatches

__all__ = [
    "NameUnreadable",
    "ReadableBatches",
    "ResizeShortestEdgeBilinear",
    "begin_loading",
    "build_train_loader",
    "coco_dataset",
    "open_image",
    "read_image",
    "read_picture",
    "training_dicts",
]
