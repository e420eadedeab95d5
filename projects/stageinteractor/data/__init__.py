"""Data sets in COCO format that live in a JSON file and a folder of images."""

from .coco import coco_dataset

__all__ = ["coco_dataset"]
