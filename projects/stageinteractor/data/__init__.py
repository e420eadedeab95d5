"""Data sets in COCO format that live in a JSON file and a folder of images, and their images."""

from .coco import coco_dataset, training_dicts
from .resize import ResizeShortestEdgeBilinear

__all__ = ["ResizeShortestEdgeBilinear", "coco_dataset", "training_dicts"]
