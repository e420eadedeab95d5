"""Photographs and what exported files find in them."""

import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from projects.stageinteractor.inference.export.agreement import compare


def photographs(sizes):
    """Real ones, which come with scikit-learn, of given heights and widths."""
    images = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return [images[i % 2].resize((width, height)) for i, (height, width) in enumerate(sizes)]


# The second to fifth are a batch of one padded size, the others are alone.
SIZES = [(427, 640), (250, 310), (256, 320), (230, 299), (255, 289), (333, 500), (96, 64)]


def assert_agreement(first, second, pictures, least=10):
    """Above 0.05 the same detections, boxes to 0.5 pixels and scores to 1e-3."""
    for expected, found in zip(first(pictures), second(pictures)):
        result = compare(expected, found)
        assert result.holds and result.pairs >= least, result
    for picture in pictures[:2]:  # alone
        assert compare(first(picture), second(picture)).holds


def found(*_, last_class=1, dtype=torch.int64):
    """A graph's outputs for one image."""
    return torch.zeros(1, 3, 4), torch.zeros(1, 3), torch.tensor([[0, 1, last_class]], dtype=dtype)
