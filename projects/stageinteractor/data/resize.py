"""The resize of the release: OpenCV's bilinear filter, which does not smooth what it shrinks."""

from collections.abc import Sequence

import detectron2.data.transforms as T
import numpy as np
import torch
import torch.nn.functional as F


class BilinearResizeTransform(T.ResizeTransform):
    """Detectron2's, but bytes go through the plain bilinear filter too, as floats do there.

    Detectron2 gives bytes to Pillow, which averages over all pixels that an output pixel covers.
    Enlarged images are the same within a grey level, shrunk ones are not.

    Args:
        h, w: size of the image in pixels.
        new_h, new_w: the size it gets.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int):
        super().__init__(h, w, new_h, new_w)

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image (h, w) or (h, w, C); `interp`, for masks, is one of Pillow's filters."""
        if img.dtype != np.uint8 or interp is not None:
            return super().apply_image(img, interp)
        pixels = torch.tensor(np.ascontiguousarray(img)).view(self.h, self.w, -1)
        # Bytes all the way: on CPUs with AVX2 three times as fast as Pillow, and floats are slower.
        resized = F.interpolate(
            pixels.permute(2, 0, 1)[None], (self.new_h, self.new_w), mode="bilinear"
        )
        return resized[0].permute(1, 2, 0).reshape(self.new_h, self.new_w, *img.shape[2:]).numpy()

    def inverse(self) -> "BilinearResizeTransform":
        return BilinearResizeTransform(self.new_h, self.new_w, self.h, self.w)


class ResizeShortestEdgeBilinear(T.Augmentation):
    """Scales the short side to a length, or the long side to the maximum if it would be longer.

    Args:
        short_edge_length: in pixels; one of several is drawn for every image.
        max_size: of the long side, in pixels.
    """

    def __init__(self, short_edge_length: int | Sequence[int], max_size: int):
        super().__init__()
        self.short_edge_length = short_edge_length
        self.max_size = max_size

    def get_transform(self, image: np.ndarray) -> BilinearResizeTransform:
        h, w = image.shape[:2]
        length = int(np.random.choice(np.atleast_1d(self.short_edge_length)))
        return BilinearResizeTransform(h, w, *output_size(h, w, length, self.max_size))


def output_size(h: int, w: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
    """Height and width as the release rounds them; Detectron2's differ by a pixel now and then.

    At least a pixel, however long and thin an image is.
    """
    scale = min(max_size / max(h, w), short_edge_length / min(h, w))
    return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))
