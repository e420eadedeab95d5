"""A trained model that is called on one picture, as Detectron2's ``DefaultPredictor`` is."""

from typing import Dict, List, Sequence

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint import class_names_in
from ..data.coco_file import read_tables
from ..errors import UserError
from .checks import dataset_names
from .config import given_keys, load_config
from .dataset import NUM_CLASSES, num_classes_key
from .device import select_device
from .evaluation_setup import build_model, check_checkpoint
from .trained import fold_norms, load_trained


class Predictor:
    """Detections of a trained model in one picture at a time, resized as its test images were.

    Args:
        model: with Detectron2's inputs and outputs, on its device; it is put into evaluation mode.
        augmentations: those of the test images.
        image_format: RGB or BGR, which the model was trained on.
        categories: ``id`` in the data set and ``name`` of each class, in the order of the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        categories: List[dict],
    ):
        self.model = model.eval()
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format, self.categories = image_format, categories

    @property
    def class_names(self) -> List[str]:
        return [category["name"] for category in self.categories]

    @property
    def metadata(self) -> Metadata:
        """What Detectron2's Visualizer wants to know."""
        return Metadata(thing_classes=self.class_names)

    def prepare(self, image: np.ndarray) -> Dict[str, object]:
        """The model's input for a picture.

        Args:
            image: (H, W, 3) BGR, uint8, as OpenCV and ``read_image(file, "BGR")`` give it.

        Returns:
            ``image`` (3, h, w), resized, and ``height`` and ``width``, H and W, in pixels.
        """
        height, width = image.shape[:2]
        given = T.AugInput(image if self.image_format == "BGR" else image[:, :, ::-1])
        self.augmentations(given)
        resized = torch.from_numpy(given.image.transpose(2, 0, 1).copy())
        return {"image": resized, "height": height, "width": width}

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Dict[str, Instances]:
        """Detect in one picture (H, W, 3), BGR, uint8.

        Returns:
            ``instances`` with ``pred_boxes`` in pixels of the picture, ``scores`` and
            ``pred_classes``.

        Raises:
            ValueError: the array is something else.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f"a picture is (H, W, 3), BGR, uint8, not {image.shape}, {image.dtype}"
            )
        return self.model([self.prepare(image)])[0]


def load_predictor(config_file: str, checkpoint: str, overrides: Sequence[str] = ()) -> Predictor:
    """A config and a checkpoint, ready to predict; neither needs its data set.

    The names of the classes, and their number unless an override gives it, are those that the
    checkpoint has, else those of the config's test set.

    Raises:
        UserError: a file is missing, the checkpoint does not fit or has numbers that are not
            finite, or an override is wrong.
    """
    cfg = load_config(config_file, list(overrides))
    check_checkpoint(checkpoint)
    categories = known_categories(cfg, class_names_in(checkpoint))
    key = num_classes_key(cfg)
    if categories and not given_keys(overrides) & set(NUM_CLASSES):
        OmegaConf.update(cfg, key, len(categories))
    num_classes = OmegaConf.select(cfg, key)
    if len(categories) != num_classes:
        categories = [{"id": i + 1, "name": str(i)} for i in range(num_classes)]
    cfg.train.device = select_device(cfg.train.device)
    model = load_trained(build_model(cfg), checkpoint, cfg.train.model_ema, [])
    if not all(values.isfinite().all() for values in model.parameters()):
        raise UserError(f"{checkpoint} has weights that are not finite: its run has diverged")
    model = fold_norms(model)
    mapper = cfg.dataloader.test.mapper
    return Predictor(
        model,
        [instantiate(augmentation) for augmentation in mapper.augmentations],
        mapper.image_format,
        categories,
    )


def known_categories(cfg: DictConfig, class_names: Sequence[str]) -> List[dict]:
    """``id`` and ``name`` of the classes, in the model's order; empty if nothing is known.

    Args:
        cfg: the config; ids are those of its test set, if that has these classes.
        class_names: of the checkpoint, empty if it has none.
    """
    found = test_categories(cfg)
    if class_names and [category["name"] for category in found] != list(class_names):
        return [{"id": i + 1, "name": name} for i, name in enumerate(class_names)]
    return found


def test_categories(cfg: DictConfig) -> List[dict]:
    """``id`` and ``name`` of the classes of the test set, as far as they are known without it."""
    dataset = cfg.dataloader.test.dataset
    if cfg.dataset.val or "json_file" in dataset:
        found = read_tables(cfg.dataset.val or dataset.json_file).categories
        return [{k: c[k] for k in ("id", "name")} for c in sorted(found, key=lambda c: c["id"])]
    for name in dataset_names(dataset):
        metadata = MetadataCatalog.get(name)
        names = metadata.get("thing_classes")
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        if names and ids:
            return [{"id": i, "name": names[place]} for i, place in sorted(ids.items())]
    return []
