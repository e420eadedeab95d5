"""Promises of a detector that cuts large photographs into tiles. A model that cannot err looks."""

import tracemalloc

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference import Detector, load_detector
from projects.stageinteractor.inference.detector import BATCH_SIZE
from projects.stageinteractor.inference.tiles import put_together
from support.runs import CONFIG
from support.saved_models import save_model

CATEGORIES = [{"id": 7, "name": "even"}, {"id": 9, "name": "odd"}]
TILE = 64


class Oracle:
    """Finds what has a colour of its own, of which the red tells class and score."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append([tuple(item["image"].shape[1:]) for item in batch])
        return [{"instances": self.find(item["image"][0])} for item in batch]

    @staticmethod
    def find(red):
        values = red.unique()[red.unique() > 0]
        places = [torch.nonzero(red == value).flip(1) for value in values]
        boxes = [torch.cat([place.amin(0), place.amax(0) + 1]).float() for place in places]
        return Instances(
            tuple(red.shape), pred_boxes=Boxes(torch.stack(boxes) if boxes else torch.empty(0, 4)),
            scores=values / 255, pred_classes=values.long() % 2,
        )


def photograph(height, width, objects):
    """(H, W, 3), BGR: black, with {red: (x1, y1, x2, y2)}, later ones on top."""
    picture = np.zeros((height, width, 3), np.uint8)
    for red, (x1, y1, x2, y2) in objects.items():
        picture[y1:y2, x1:x2, 2] = red
    return picture


def detector(overlap=0.5, tile=TILE):
    return Detector(Oracle(), [], "RGB", CATEGORIES, 32, tile, overlap)


def found_in(found):
    """{red: corners}; fails if something was found twice."""
    reds = (255 * found.scores).round().long().tolist()
    assert len(reds) == len(set(reds))
    assert found.pred_classes.tolist() == [red % 2 for red in reds]
    return dict(zip(reds, map(tuple, found.pred_boxes.tensor.int().tolist())))


def test_tiles_have_their_size_and_the_batches_their_limit():
    """Tiles at the right and the lower edge end there, and share more with their neighbours."""
    detect = detector(overlap=0.25)
    found = detect(photograph(200, 300, {}))
    assert len(found) == 0 and found.image_size == (200, 300)
    assert [size for batch in detect.model.batches for size in batch] == [(TILE, TILE)] * 4 * 6
    assert [len(batch) for batch in detect.model.batches] == [BATCH_SIZE] * 3


def test_objects_in_one_tile_on_a_seam_and_on_a_corner():
    """Tiles begin every 32 pixels; each object is whole in one of them, and cut in others."""
    objects = {
        250: (2, 3, 22, 33),
        249: (56, 10, 72, 20),  # on the seam between the tiles that begin at 0 and 64
        200: (54, 110, 80, 140),  # on the corner of four, at 64, 128
        99: (190, 190, 200, 200),  # ends where the photograph ends
    }
    picture = photograph(200, 200, objects)
    found = detector()(picture)
    assert found_in(found) == objects
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    (found, plain) = detector()([picture] * 2, threshold=0.5, as_dicts=True)
    assert found == plain and found["boxes"] == [[*map(float, box)] for box in objects.values()][:3]


@pytest.mark.parametrize("overlap", [0.1, 0.2, 0.5, 0.9])
def test_an_object_that_no_tile_has_whole_is_put_together(overlap):
    """Some are larger than a tile: from edge to edge of the photograph, or on four corners."""
    objects = {
        250: (0, 5, 250, 25), 201: (10, 60, 80, 70), 150: (100, 80, 240, 220),
        99: (20, 100, 35, 240), 96: (60, 100, 90, 190),
    }
    assert found_in(detector(overlap)(photograph(250, 250, objects))) == objects


def test_tiles_without_an_overlap_cut_objects_in_two():
    found = detector(overlap=0)(photograph(64, 128, {200: (54, 10, 84, 20)}))
    assert found.pred_boxes.tensor.tolist() == [[54, 10, 64, 20], [64, 10, 84, 20]]


def test_neighbours_and_what_is_inside_another_stay():
    """Of the same class, in one tile and in several."""
    objects = {
        250: (2, 2, 28, 28), 240: (5, 5, 15, 15), 230: (28, 2, 40, 28), 220: (56, 40, 72, 60),
        210: (72, 40, 80, 60), 200: (58, 42, 70, 50), 190: (90, 10, 150, 100),
        180: (95, 20, 99, 30),
    }
    assert found_in(detector()(photograph(200, 200, objects))) == objects


def test_classes_are_not_put_together():
    """One class is found on the left of a seam, the other one on the right."""
    size, tiles = (10, 15), torch.tensor([[0, 0, 10, 10], [5, 0, 15, 10]])
    one, other = (
        Instances((10, 10), pred_boxes=Boxes(torch.tensor([[5.0 - x, 0, 10 - x, 5]])),
                  scores=torch.tensor([0.5]), pred_classes=torch.tensor([x]))
        for x in (0, 5)
    )
    assert len(put_together([one, other], tiles, size)) == 2
    other.pred_classes -= 5
    assert put_together([one, other], tiles, size).pred_boxes.tensor.tolist() == [[5, 0, 10, 5]]


def test_what_one_tile_has_twice_stays():
    """What the model takes for two objects are two, as in a photograph without tiles."""
    boxes = torch.tensor([[10.0, 10, 30, 30], [11, 10, 31, 30]])
    found = Instances((64, 64), pred_boxes=Boxes(boxes), scores=torch.tensor([0.9, 0.8]),
                      pred_classes=torch.tensor([0, 0]))
    whole = put_together([found], torch.tensor([[0, 0, 64, 64]]), (64, 64))
    assert whole.pred_boxes.tensor.tolist() == boxes.tolist()


def test_of_two_boxes_the_likelier_one_is_kept_as_it_is():
    """Unless an edge cuts it: the other tile may have it whole, or the rest of it."""
    tiles = torch.tensor([[0, 0, 100, 100], [50, 0, 150, 100]])

    def join(first, second):
        found = [
            Instances((100, 100), pred_boxes=Boxes(torch.tensor([box])),
                      scores=torch.tensor([score]), pred_classes=torch.tensor([0]))
            for box, score in ((first, 0.9), (second, 0.8))
        ]
        joined = put_together(found, tiles, (100, 150))
        assert joined.scores[0] == torch.tensor(0.9)
        return joined.pred_boxes.tensor.tolist()

    assert join([60.0, 10, 80, 40], [11.0, 11, 31, 42]) == [[60, 10, 80, 40]]
    assert join([60.0, 10, 99, 40], [11.0, 11, 61, 42]) == [[61, 11, 111, 42]]
    assert join([60.0, 10, 99, 40], [0.0, 11, 61, 42]) == [[50, 10, 111, 42]]
    assert join([0.0, 10, 80, 40], [0.0, 11, 31, 42]) == [[0, 10, 80, 40]]  # not cut by a tile
    assert len(join([60.0, 10, 80, 40], [31.0, 11, 51, 42])) == 2


@pytest.mark.parametrize("tile, overlap", [(TILE, 0), (TILE, 0.99), (1000, 0.2), (1, 0)])
def test_any_overlap_and_any_size(tile, overlap):
    objects = {250: (2, 3, 3, 4), 249: (70, 70, 71, 71)}
    assert found_in(detector(overlap, tile)(photograph(75, 90, objects))) == objects


def test_memory_is_bounded_by_the_tiles():
    """The photograph has 48 MB but takes no memory itself; eight tiles have 0.1 MB."""
    picture = np.broadcast_to(np.uint8(0), (4000, 4000, 3))
    detect = detector(overlap=0.0)
    detect.model = lambda batch: [{"instances": Oracle.find(item["image"][0, :1])}
                                  for item in batch]
    detect(picture[:100])  # imports
    tracemalloc.start()
    try:
        detect(picture)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16e6


@pytest.mark.parametrize("options, message", [
    ({"tile": 0}, "tile 0: "), ({"tile": -5}, "tile -5: "),
    ({"tile": 64, "overlap": 1.0}, "overlap 1: "),
    ({"tile": 64, "overlap": -0.1}, "overlap -0.1: "),
    ({"tile": 64, "overlap": float("nan")}, "overlap nan: "),
])
def test_tiles_that_cannot_be_cut(tmp_path, options, message):
    checkpoint = save_model(tmp_path / "model.pth", CONFIG, (), ["tree"])
    with pytest.raises(UserError, match=message) as raised:
        load_detector(checkpoint, CONFIG, ["train.device=cpu"], **options)
    assert "\n" not in str(raised.value)
