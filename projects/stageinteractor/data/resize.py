"""The release's way to resize: OpenCV's bilinear filter, which does not smooth as it shrinks."""

from collections.abc import Sequence

import cv2
import detectron2.data.transforms as T
import numpy as np


class BilinearResizeTransform(T.ResizeTransform):
    """Detectron2's transform, but with OpenCV's bilinear filter for bytes.

    Detectron2 gives bytes to Pillow, which averages over all pixels that an output pixel covers.
    Enlarged images are the same within a grey level, shrunk ones are not.

    Args:
        h, w: size of the image in pixels.
        new_h, new_w: size after resizing, in pixels.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int):
        super().__init__(h, w, new_h, new_w)

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image (h, w) or (h, w, C); `interp`, for masks, is one of Pillow's filters."""
        if img.dtype != np.uint8 or interp is not None:
            return super().apply_image(img, interp)
        if img.strides[1] < 0:  # a flipped view, which numpy copies slowly
            img = cv2.flip(img[:, ::-1], 1)
        size = self.new_w, self.new_h
        resized = cv2.resize(np.ascontiguousarray(img), size, interpolation=cv2.INTER_LINEAR)
        return resized.reshape(self.new_h, self.new_w, *img.shape[2:])

    def inverse(self) -> "BilinearResizeTransform":
        return BilinearResizeTransform(self.new_h, self.new_w, self.h, self.w)


class ResizeShortestEdgeBilinear(T.Augmentation):
    """Scales the short side to a length, unless the long side would exceed its maximum.

    Args:
        short_edge_length: in pixels; if there are several, one is drawn for each image.
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
    """Height and width in pixels, at least 1, after scaling.

    They are rounded as in the release; Detectron2's sometimes differ by a pixel.
    """
    scale = min(max_size / max(h, w), short_edge_length / min(h, w))
    return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))
