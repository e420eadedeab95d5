"""Large photographs: cut into tiles that overlap, whose detections are put together again."""

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..errors import UserError

OVERLAP = 0.2  # the usual share of a tile's side that the next tile has as well
SAME = 0.5  # IoU from which on two boxes are one object's
NEAR = 0.02  # share of a tile's side; a box that is as near to an edge may be cut by it


def check_tiles(tile: int, overlap: float) -> None:
    """Raises UserError if pictures cannot be cut so, see `Detector`."""
    if tile < 1:
        raise UserError(f"tile {tile}: the side of a tile is at least 1 pixel")
    if not 0 <= overlap < 1:
        raise UserError(f"overlap {overlap:g}: the share of a tile is at least 0 and below 1")


def cut(size: tuple[int, int], tile: int, overlap: float) -> Tensor:
    """Tiles of a picture.

    Args:
        size: height and width of the picture, pixels.
        tile, overlap: see `Detector`.

    Returns:
        corners x1, y1, x2, y2 (T, 4), whole numbers; no tile is smaller than the others, unless the
        picture is.
    """
    stride = tile - int(tile * overlap)
    ys, xs = ([*range(0, side - tile, stride), max(side - tile, 0)] for side in size)
    height, width = size
    return torch.tensor(
        [[x, y, min(x + tile, width), min(y + tile, height)] for y in ys for x in xs]
    )


def shared_area(boxes: Tensor, others: Tensor) -> Tensor:
    """Area of the intersection of corners (..., 4) with others."""
    low = torch.maximum(boxes[..., :2], others[..., :2])
    return (torch.minimum(boxes[..., 2:], others[..., 2:]) - low).clamp(min=0).prod(-1)


def put_together(found: list[Instances], tiles: Tensor, size: tuple[int, int]) -> Instances:
    """Detections in a picture from those in its tiles, by falling score.

    Boxes of one class in two tiles are one object's if they agree where the tiles overlap. Of an
    object's boxes, the likeliest that no edge of a tile cuts is kept. If all are cut, the box
    around them takes their place. The score is the highest of them.

    Args:
        found: the detections in each tile, on the CPU.
        tiles: their corners, see `cut`.
        size: height and width of the picture, pixels.
    """
    picture = torch.tensor([0, 0, *size[::-1]])
    every = []
    for item, tile in zip(found, tiles):
        boxes = item.pred_boxes.tensor + tile[:2].repeat(2)
        is_near = (boxes - tile).abs() < NEAR * (tile[2:] - tile[:2]).repeat(2)
        every.append(Instances(
            size, pred_boxes=Boxes(boxes), scores=item.scores, pred_classes=item.pred_classes,
            tile=tile.expand(len(item), 4), is_cut=(is_near & (tile != picture)).any(1),
        ))
    joined = Instances.cat(every)
    first_whole = (joined.scores.double() - joined.is_cut.double()).argsort(descending=True)
    joined = joined[first_whole]
    boxes, tile_of, is_cut = joined.pred_boxes.tensor, joined.get("tile"), joined.is_cut.tolist()
    is_free, kept = torch.ones(len(joined), dtype=torch.bool), []
    for first in range(len(joined)):
        if not is_free[first]:
            continue
        is_free[first] = False
        group = [first]
        for one in group:  # which grows
            if one == first or is_cut[one]:
                both = shared_area(boxes[one], boxes)
                either = shared_area(boxes[one], tile_of) + shared_area(boxes, tile_of[one]) - both
                is_same = is_free & (both > 0) & (both >= SAME * either)
                is_same &= joined.pred_classes == joined.pred_classes[one]
                is_same &= (tile_of != tile_of[one]).any(1)
                is_free &= ~is_same
                group += is_same.nonzero()[:, 0].tolist()
        joined.scores[first] = joined.scores[group].max()
        if is_cut[first]:
            boxes[first] = torch.cat([boxes[group, :2].amin(0), boxes[group, 2:].amax(0)])
        kept.append(first)
    joined.remove("tile")
    joined.remove("is_cut")
    joined = joined[torch.tensor(kept, dtype=torch.long)]
    return joined[joined.scores.argsort(descending=True, stable=True)]
