"""Pictures of predictions reach TensorBoard at every evaluation and leave no trace in training."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.data import DatasetMapper
from detectron2.engine import HookBase, hooks
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, TensorboardXWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from projects.stageinteractor.data import coco_dataset, read_image
from projects.stageinteractor.drawing import detections
from projects.stageinteractor.engine.hooks import ModelEMA
from projects.stageinteractor.engine.prediction_pictures import PredictionPictures, draw_predictions
from projects.stageinteractor.engine.trainer import Trainer
from support.shapes import CLASSES
from support.tensorboard import read_pictures


@pytest.fixture
def dataset(shapes):
    return coco_dataset(
        json_file=str(shapes), image_root=str(shapes.parent / "images")
    )


class Detector(nn.Module):
    """Boxes from the mean colour; random and statistical parts show any trace in the weights."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3, 4)

    def forward(self, batch):
        outputs = []
        for entry in batch:
            image = entry["image"].float()[None]
            outputs.append(self.head(self.drop(self.norm(image).mean((2, 3))))[0])
        if self.training:
            factor = random.random() + np.random.rand()
            return {"loss": factor * torch.stack(outputs).square().mean()}
        assert len(batch) == 1
        instances = Instances((batch[0]["height"], batch[0]["width"]))
        instances.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 50.0]]))
        instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([2])
        return [{"instances": instances}]


class GreedyMapper(DatasetMapper):
    """Draws random numbers of every kind, and changes what it is given."""

    def __call__(self, entry):
        random.random(), np.random.rand(), torch.rand(1)
        mapped = super().__call__(entry)
        entry.clear()
        return mapped


class OnlyModes(HookBase):
    def before_step(self):
        assert self.trainer.model.training


def train_detector(folder, dataset, pictures, ema=False):
    """Seven steps with an evaluation every third: the weights afterwards."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    model, mapper = Detector(), GreedyMapper(True, augmentations=[], image_format="RGB")

    def batches():
        for index in range(7):
            yield [mapper(dict(dataset[index % len(dataset)]))]

    one = Trainer(model, batches(), torch.optim.SGD(model.parameters(), 0.1))
    average = ModelEMA(model, 0.5)
    test_mapper = GreedyMapper(False, augmentations=[], image_format="RGB")
    shown = average.module if ema else model
    hook = PredictionPictures(3, shown, dataset, test_mapper, CLASSES)
    one.register_hooks([
        average,
        OnlyModes(),
        hook if pictures else None,
        hooks.PeriodicWriter([TensorboardXWriter(str(folder))], period=2),
    ])
    one.train(0, 7)
    assert shown.training
    return {**model.state_dict(), **average.averaged.state_dict()}


@pytest.mark.parametrize("ema", [False, True])
def test_pictures_are_written_once_and_leave_no_trace(dataset, tmp_path, ema):
    """At steps 2 and 5, and at 7 after the last one; training goes on with the same bits."""
    without = train_detector(tmp_path / "without", dataset, pictures=False, ema=ema)
    with_pictures = train_detector(tmp_path / "with", dataset, pictures=True, ema=ema)
    assert all(tensor.equal(without[name]) for name, tensor in with_pictures.items())
    assert read_pictures(tmp_path / "without") == {}
    expected = [(step, 192, 64) for step in (2, 5, 7)]
    assert read_pictures(tmp_path / "with") == {f"predictions/{i}": expected for i in range(1, 5)}


def test_pictures_are_of_images_across_the_data_set():
    dataset = [{"file_name": str(i)} for i in range(8)]
    for count, names in ((4, "1357"), (1, "4"), (20, "01234567")):
        hook = PredictionPictures(1, Detector(), dataset, None, [], count)
        assert [entry["file_name"] for entry in hook.records] == list(names)
    assert PredictionPictures(1, Detector(), [], None, []).records == []


def test_a_process_draws_without_waiting_for_the_others(dataset, tmp_path, monkeypatch):
    """The wrapper of several processes, which exchanges buffers in every pass, is not called."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Detector())
        monkeypatch.setattr(DistributedDataParallel, "forward", None)
        mapper = DatasetMapper(False, augmentations=[], image_format="RGB")
        hook = PredictionPictures(1, model, dataset, mapper, CLASSES, count=1)
        with EventStorage() as storage:
            hook.trainer = SimpleNamespace(storage=storage)
            hook._do_eval()
        assert [name for name, _, _ in storage._vis_data] == ["predictions/1"]
    finally:
        dist.destroy_process_group()


def found(*scores):
    instances = Instances((64, 96))
    instances.pred_boxes = Boxes(torch.tensor([[20.0, 10.0, 70.0, 50.0]] * len(scores)))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.full((len(scores),), 2)
    return instances


def test_the_truth_is_left_and_predictions_are_right(dataset):
    """Predictions change the right half only, and only from a score of 0.3."""
    bare = {**dataset[0], "annotations": []}
    nothing, low, high = (draw_predictions(dataset[0], found(*scores), CLASSES)
                          for scores in ([], [0.2], [0.2, 0.8]))
    image = read_image(dataset[0]["file_name"], "RGB").transpose(2, 0, 1)
    assert nothing.shape == (3, 64, 2 * 96) and nothing.dtype == np.uint8
    assert (nothing[:, :, 96:] == image).all() and (nothing[:, :, :96] != image).any()
    assert (low == nothing).all()
    assert (high[:, :, :96] == nothing[:, :, :96]).all()
    # The box is at (20, 10) and 50 x 40 pixels: its lower edge is drawn, and nothing below it.
    changed = (high != nothing).any(0)[:, 96:]
    assert changed[47:54, 25:65].any(0).all() and not changed[56:].any()
    without_truth = draw_predictions(bare, found(), CLASSES)
    assert (without_truth[:, :, :96] == image).all()


def test_data_without_annotations_or_names_is_drawn(dataset):
    bare = {"file_name": dataset[0]["file_name"]}
    assert draw_predictions(bare, found(0.9), []).shape == (3, 64, 192)


def test_a_very_large_picture_is_shrunk(dataset, monkeypatch):
    """TensorBoard would hold it in memory, and matplotlib a hundred bytes for each pixel."""
    monkeypatch.setattr(detections, "LEAST_SIDE", 50)
    monkeypatch.setattr(detections, "MAX_PIXELS", 32 * 48)
    assert draw_predictions(dataset[0], found(0.9), CLASSES).shape == (3, 32, 96)
