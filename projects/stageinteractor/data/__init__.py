"""Data sets of a COCO file and a folder of images: reading, checking and loading them."""

from .coco import coco_dataset, training_dicts
from .loader import TrainingMapper, begin_loading, build_train_loader
from .reading import open_image, read_image, read_picture
from .resize import ResizeShortestEdgeBilinear
from .unreadable import NameUnreadable, ReadableBatches

__all__ = [
    "NameUnreadable",
    "ReadableBatches",
    "ResizeShortestEdgeBilinear",
    "TrainingMapper",
    "begin_loading",
    "build_train_loader",
    "coco_dataset",
    "open_image",
    "read_image",
    "read_picture",
    "training_dicts",
]
