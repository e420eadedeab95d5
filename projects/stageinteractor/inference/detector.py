"""A trained model that is called on pictures of any kind, one or many."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from tqdm import tqdm

from .inputs import Picture, is_one_picture, to_array
from .tiles import OVERLAP, check_tiles, cut, put_together

BATCH_SIZE = 8  # at most; images of one padded size only


class SizeOnly(T.AugInput):
    """A picture of which only the size is known, for augmentations that resize."""

    image: np.ndarray

    def __init__(self, height: int, width: int):
        super().__init__(np.broadcast_to(np.uint8(0), (height, width, 3)))  # takes no memory

    def transform(self, transform: T.Transform) -> None:
        height, width = self.image.shape[:2]
        if hasattr(transform, "new_h"):
            height, width = transform.new_h, transform.new_w
        self.image = np.broadcast_to(np.uint8(0), (height, width, 3))


class Detector:
    """Detections of a trained model in pictures, resized as its test images were.

    Threads may call one detector at the same time.

    Args:
        model: Detectron2's inputs and outputs; a module is in evaluation mode and on its device.
        augmentations: those of the test images.
        image_format: RGB or BGR, which the model was trained on.
        categories: ``id`` in the data set and ``name`` of each class, in the order of the model's.
        size_divisibility: of the sides to which the model pads images, pixels.
        tile: side of the square tiles into which pictures are cut, pixels; None leaves them whole.
        overlap: least share of a tile's side that the next tile has as well, at least 0, below 1.

    Raises:
        UserError: ``tile`` or ``overlap`` is out of range.
    """

    def __init__(
        self,
        model: Callable[[list[dict]], list[dict[str, Instances]]],
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        categories: list[dict],
        size_divisibility: int = 32,
        tile: int | None = None,
        overlap: float = OVERLAP,
    ):
        if tile is not None:
            check_tiles(tile, overlap)
        self.tile, self.overlap = tile, overlap
        self.model = model
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format, self.categories = image_format, categories
        self.size_divisibility = size_divisibility

    @property
    def class_names(self) -> list[str]:
        return [category["name"] for category in self.categories]

    @property
    def metadata(self) -> Metadata:
        """What Detectron2's Visualizer wants to know."""
        return Metadata(thing_classes=self.class_names)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the model's input for a picture of a size; pixels."""
        given = SizeOnly(height, width)
        self.augmentations(given)
        return self.padded_size(*given.image.shape[:2])

    def prepare(self, picture: Picture) -> dict[str, Any]:
        """The model's input for a picture, see `inputs.to_array`.

        Returns:
            ``image`` (3, h, w), uint8, resized; ``height`` and ``width`` of the picture, pixels.
        """
        image = to_array(picture)
        height, width = image.shape[:2]
        given = T.AugInput(image if self.image_format == "BGR" else image[:, :, ::-1])
        self.augmentations(given)
        resized = torch.from_numpy(given.image.transpose(2, 0, 1).copy())
        return {"image": resized, "height": height, "width": width}

    def __call__(
        self,
        pictures: Picture | Iterable[Picture],
        *,
        threshold: float = 0.0,
        as_dicts: bool = False,
    ) -> Instances | dict | list[Instances] | list[dict]:
        """Detect in one picture or in many, of any sizes.

        Args:
            pictures: one of, or any number of: paths; contents of files as bytes, or files that are
                open for reading bytes; arrays (H, W, 3), BGR, uint8, as OpenCV and Detectron2 have
                them; images of Pillow's; tensors (3, H, W), RGB, uint8 or between 0 and 1, as
                torchvision has them.
            threshold: least score of what is returned, between 0 and 1.
            as_dicts: return plain dictionaries, which JSON can hold.

        Returns:
            for one picture its detections by falling score, on the CPU; for many a list in their
            order. ``Instances`` have ``pred_boxes``, corners in pixels of the picture,
            ``scores`` between 0 and 1 and ``pred_classes``, counted from 0. Dictionaries have
            ``height`` and ``width`` of the picture and lists ``boxes`` of [x1, y1, x2, y2],
            ``scores``, ``classes`` and ``names``.

        Raises:
            UserError: a file is missing or cannot be read.
            TypeError, ValueError: something is not a picture, or the threshold not a share.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold={threshold!r} is not a number between 0 and 1")
        if not 0 <= threshold <= 1:
            hint = f": {threshold / 100:g} is {threshold:g} %" if 1 < threshold <= 100 else ""
            raise ValueError(f"threshold={threshold:g} is not a share between 0 and 1{hint}")
        is_one = is_one_picture(pictures)
        many: Any = [pictures] if is_one else pictures
        if self.tile is None:
            found = [instances[instances.scores >= threshold] for instances in self.detect(many)]
        else:
            found = [self.detect_in_tiles(picture, self.tile, threshold) for picture in many]
        results = [self.to_dict(instances) for instances in found] if as_dicts else found
        return results[0] if is_one else results

    @torch.no_grad()
    def detect(self, pictures: Iterable[Picture]) -> list[Instances]:
        """All detections in each picture. At most a batch of every padded size is in memory."""
        waiting: dict[tuple[int, int], list[tuple[int, dict]]] = defaultdict(list)
        results: dict[int, Instances] = {}

        def run(batch: list[tuple[int, dict]]) -> None:
            outputs = self.model([prepared for _, prepared in batch])
            for (place, _), output in zip(batch, outputs):
                results[place] = output["instances"].to("cpu")
            batch.clear()

        for place, picture in enumerate(pictures):
            prepared = self.prepare(picture)
            batch = waiting[self.padded_size(*prepared["image"].shape[1:])]
            batch.append((place, prepared))
            if len(batch) == BATCH_SIZE:
                run(batch)
        for batch in filter(None, waiting.values()):
            run(batch)
        return [results[place] for place in range(len(results))]

    def detect_in_tiles(self, picture: Picture, tile: int, threshold: float) -> Instances:
        """What is found in the tiles of a picture with at least a score, see `put_together`."""
        image = to_array(picture)
        size = image.shape[:2]
        tiles = cut(size, tile, self.overlap)
        shown = tqdm(tiles.tolist(), unit="tile", delay=1, leave=False, disable=None)
        found = self.detect(image[y1:y2, x1:x2] for x1, y1, x2, y2 in shown)
        return put_together([item[item.scores >= threshold] for item in found], tiles, size)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """A size after padding. More padding would change the results."""
        unit = max(self.size_divisibility, 1)
        return -(-height // unit) * unit, -(-width // unit) * unit

    def to_dict(self, instances: Instances) -> dict:
        """Detections as plain numbers and names, see `__call__`."""
        height, width = instances.image_size
        classes, names = instances.pred_classes.tolist(), self.class_names
        return {
            "height": height,
            "width": width,
            "boxes": instances.pred_boxes.tensor.tolist(),
            "scores": instances.scores.tolist(),
            "classes": classes,
            "names": [names[index] for index in classes],
        }
