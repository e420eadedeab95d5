"""Ground truth in a form that COCO's evaluation handles: ids from 1 to n, and plausible areas."""

import contextlib
import io
from collections.abc import Iterable

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO

from .coco_file import brief, id_order, is_number, is_whole


class NumberedCOCO(COCO):
    """pycocotools' index of a COCO file, with ids from 1 to n in place of the file's.

    Evaluation stores ids in 64 bits and disregards annotations whose id is 0 or less, but the ids
    of a JSON file may also be longer numbers or text. Areas are those of `object_area`.

    Args:
        dataset: the content of the file. Annotations of an unknown image or category are left out,
            as in evaluation.
    """

    def __init__(self, dataset: dict):
        super().__init__()
        categories = {category["id"] for category in dataset["categories"]}
        self.numbers = {
            "image_id": _number(_evaluation_order(image["id"] for image in dataset["images"])),
            "category_id": _number(sorted(categories, key=id_order)),
        }
        known = (
            item for item in dataset["annotations"]
            if all(item[key] in numbers for key, numbers in self.numbers.items())
        )
        self.dataset = {
            **dataset,
            **{
                table: [{**entry, "id": self.numbers[key][entry["id"]]} for entry in dataset[table]]
                for table, key in (("images", "image_id"), ("categories", "category_id"))
            },
            "annotations": [
                {"iscrowd": 0, **self._renumber(item), "id": number, "area": object_area(item)}
                for number, item in enumerate(known, start=1)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self.createIndex()

    def loadRes(self, results: list[dict]) -> COCO:  # noqa: N802, pycocotools' name
        """An index of results, whose ids are replaced in the same way. `results` stay unchanged.

        Raises:
            ValueError: a result refers to an unknown image or category.
        """
        self._refuse_unknown(results)
        with contextlib.redirect_stdout(io.StringIO()):
            return super().loadRes([self._renumber(result) for result in results])

    def table(self, results: list[dict]) -> np.ndarray:
        """Results as rows of image, x, y, width, height, score and category: (N, 7), float64.

        Raises:
            ValueError: a result refers to an unknown image or category.
        """
        self._refuse_unknown(results)
        images, categories = self.numbers["image_id"], self.numbers["category_id"]
        table = np.empty((len(results), 7))
        table[:, 0] = [images[result["image_id"]] for result in results]
        table[:, 1:5] = [result["bbox"] for result in results]
        table[:, 5] = [result["score"] for result in results]
        table[:, 6] = [categories[result["category_id"]] for result in results]
        return table

    @property
    def boxes(self) -> dict:
        """The dataset with nothing but what an evaluation of boxes reads."""
        kept = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        return {
            "images": [{"id": image["id"]} for image in self.dataset["images"]],
            "annotations": [
                {key: item[key] for key in kept} for item in self.dataset["annotations"]
            ],
            "categories": [
                {"id": item["id"], "name": str(item["id"])} for item in self.dataset["categories"]
            ],
        }

    def _refuse_unknown(self, results: list[dict]):
        for key, numbers in self.numbers.items():
            for unknown in {result[key] for result in results} - numbers.keys():
                raise ValueError(f"{key} {brief.repr(unknown)} is not in the ground truth")

    def _renumber(self, item: dict) -> dict:
        return {**item, **{key: numbers[item[key]] for key, numbers in self.numbers.items()}}


def _number(ids: Iterable) -> dict:
    return {value: number for number, value in enumerate(ids, start=1)}


def _evaluation_order(ids: Iterable) -> list:
    """The order of images, which decides between equal scores.

    pycocotools sorts ids. Ids that are not positive whole numbers stay in the order of the file.
    """
    unique = dict.fromkeys(ids)
    return sorted(unique) if all(is_whole(i) and i > 0 for i in unique) else list(unique)


def object_area(annotation: dict) -> float:
    """The ``area`` of an annotation if it is plausible, else the area of its box, in pixels.

    It is plausible if it is a finite number above 0 and does not exceed the box with a margin of a
    pixel, which the outline of a mask may touch. It must also be at least a quarter of the area of
    the segmentation, whose parts may overlap, or without one at least the longer side of the box:
    an object in one piece has a pixel in every row and column.
    """
    _, _, width, height = annotation["bbox"]
    area, most = annotation.get("area"), (width + 2) * (height + 2)
    least = _segmentation_area(annotation.get("segmentation")) / 4 or max(width, height)
    if is_number(area) and area > 0 and least <= area <= most:
        return area
    return max(width, 0) * max(height, 0)


def _segmentation_area(segmentation) -> float:
    """The area of a mask or of all polygons together, in pixels; 0 if there is nothing usable."""
    try:
        if isinstance(segmentation, dict):
            counts = segmentation["counts"]
            if isinstance(counts, list):
                return float(sum(counts[1::2]))
            return float(mask.area({"size": segmentation["size"], "counts": counts.encode()}))
        corners = [np.reshape(polygon, (-1, 2)).astype(float) for polygon in segmentation or []]
        twice = sum(abs(np.linalg.det(np.stack([c, np.roll(c, 1, 0)], 1)).sum()) for c in corners)
        return float(np.nan_to_num(twice)) / 2
    except (AttributeError, KeyError, TypeError, ValueError):  # broken, as the checks report
        return 0.0
