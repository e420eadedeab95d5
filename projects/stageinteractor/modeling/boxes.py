"""Boxes of queries: the positional vector (x, y, z, r), its refinement and encoding, and overlaps.

Paper section 3.1: a query's positional vector holds the centre (x, y) in pixels of the network
input, the scale z = log2(sqrt(w h)) and the aspect ratio r = log2(h / w). Corners are
(x1, y1, x2, y2) in the same pixels.
"""

import torch
from torch import Tensor

OVERLAP_EPS = 1e-6  # in square pixels; keeps the overlap of boxes without area finite


def xyzr_to_corners(xyzr: Tensor) -> Tensor:
    """Convert positional vectors (..., 4) to corners (..., 4), both in pixels."""
    centre, half_size = xyzr[..., :2], box_sizes(xyzr) / 2
    return torch.cat([centre - half_size, centre + half_size], dim=-1)


def corners_to_xyzr(corners: Tensor) -> Tensor:
    """Convert corners (..., 4) to positional vectors (..., 4), both in pixels.

    Vectors of boxes without area are not finite.
    """
    size = corners[..., 2:] - corners[..., :2]
    log_w, log_h = size.log2().unbind(-1)
    centre = (corners[..., :2] + corners[..., 2:]) / 2
    return torch.cat([centre, torch.stack([(log_w + log_h) / 2, log_h - log_w], dim=-1)], dim=-1)


def box_sizes(xyzr: Tensor) -> Tensor:
    """Return width 2^(z - r/2) and height 2^(z + r/2) in pixels: (..., 4) -> (..., 2)."""
    half_r = xyzr[..., 3:] / 2
    # A product, because the sum z +- r/2 would lose digits to rounding before the exponentiation.
    return 2.0 ** xyzr[..., 2:3] * 2.0 ** torch.cat([-half_r, half_r], dim=-1)


def refine_boxes(xyzr: Tensor, deltas: Tensor) -> Tensor:
    """Move positional vectors (..., 4) by a stage's regression output (..., 4).

    The centre moves in units of the box's own width and height; z and r move additively.
    """
    centre = xyzr[..., :2] + deltas[..., :2] * box_sizes(xyzr)
    return torch.cat([centre, xyzr[..., 2:] + deltas[..., 2:]], dim=-1)


def positional_encoding(xyzr: Tensor, dim: int) -> Tensor:
    """Encode (x/1000, y/1000, z, r) in sine and cosine features: (..., 4) -> (..., dim).

    Each component a has dim/4 features: feature j is sin(a / 10000^(2 floor(j/2) / (dim/4))) for
    even j and the cosine of the same angle for odd j.
    """
    scaled = torch.cat([xyzr[..., :2] / 1000, xyzr[..., 2:]], dim=-1)
    num_features = dim // 4
    pair = torch.arange(num_features // 2, device=xyzr.device, dtype=xyzr.dtype)
    angles = scaled[..., None] / 10000 ** (2 * pair / num_features)  # (..., 4, dim/8)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def area(corners: Tensor) -> Tensor:
    """Return the area of boxes (..., 4) -> (...)."""
    width, height = (corners[..., 2:] - corners[..., :2]).unbind(-1)
    return width * height


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return the area shared by boxes a and b (..., 4), broadcast against each other -> (...)."""
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height


def pairwise_iof(boxes: Tensor) -> Tensor:
    """Return the share of box n (row) that box m (column) covers: (..., N, 4) -> (..., N, N)."""
    shared = intersection(boxes[..., :, None, :], boxes[..., None, :, :])
    return shared / area(boxes).clamp(min=OVERLAP_EPS)[..., None]


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of boxes a and b (..., 4), broadcast against each other -> (...)."""
    shared = intersection(a, b)
    return shared / (area(a) + area(b) - shared).clamp(min=OVERLAP_EPS)


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU of boxes a and b (..., 4), broadcast like those of `box_iou`."""
    shared = intersection(a, b)
    union = (area(a) + area(b) - shared).clamp(min=OVERLAP_EPS)
    top_left = torch.minimum(a[..., :2], b[..., :2])
    bottom_right = torch.maximum(a[..., 2:], b[..., 2:])
    hull = area(torch.cat([top_left, bottom_right], dim=-1)).clamp(min=OVERLAP_EPS)
    return shared / union - (hull - union) / hull
