"""Meta-architecture: images -> backbone -> neck -> queries -> decoder -> losses or detections."""

from typing import Dict, List, Sequence, Tuple, Union

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from .boxes import xyzr_to_corners
from .criterion import SetCriterion
from .decoder import DecoderOutput, StageInteractorDecoder
from .neck import SharedNormChannelMapper
from .queries import QueryGenerator
from .targets import gather_targets, send


class StageInteractor(nn.Module):
    """StageInteractor (ICCV 2023), Detectron2's ``batched_inputs`` in, losses or instances out.

    Args:
        backbone: images (B, 3, H, W) -> dictionary of feature maps.
        neck: dictionary of feature maps -> pyramid of maps of one width, finest first.
        query_generator: initial content and positional vectors.
        decoder: the cascade of stages.
        criterion: training losses.
        pixel_mean, pixel_std: normalisation of each input channel, in the order of the images.
        size_divisibility: images are zero-padded, after normalisation, to a multiple of this.
        detections_per_image: how many of the N * C scores of an image become detections.

    Raises:
        ValueError: a number that none of these can be.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: SharedNormChannelMapper,
        query_generator: QueryGenerator,
        decoder: StageInteractorDecoder,
        criterion: SetCriterion,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int = 32,
        detections_per_image: int = 100,
    ):
        super().__init__()
        if not len(pixel_mean) == len(pixel_std) == 3:
            raise ValueError("pixel_mean and pixel_std have three channels")
        if size_divisibility < 0:
            raise ValueError(f"{size_divisibility=} is negative")
        if detections_per_image < 1:
            raise ValueError(f"{detections_per_image=}: at least 1")
        self.backbone = backbone
        self.neck = neck
        self.query_generator = query_generator
        self.decoder = decoder
        self.criterion = criterion
        self.size_divisibility = size_divisibility
        self.detections_per_image = detections_per_image
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: List[dict]
    ) -> Union[Dict[str, Tensor], List[Dict[str, Instances]]]:
        """Detectron2's model protocol.

        Args:
            batched_inputs: a dictionary an image, with ``image`` (3, H, W) in the range 0..255, in
                training ``instances`` with ``gt_boxes`` (pixels of ``image``) and ``gt_classes``,
                in inference optionally ``height`` and ``width``, the size wanted for the output.

        Returns:
            in training the losses by name, weighted; else ``[{"instances": Instances}, ...]`` with
            ``pred_boxes`` clipped to the output size, ``scores`` and ``pred_classes``.
        """
        images = self.preprocess(batched_inputs)
        outputs = self.decode(images)
        if self.training:
            instances = [image["instances"] for image in batched_inputs]
            targets = gather_targets(instances, images.image_sizes, self.device)
            return self.criterion(outputs, targets)
        detections = self.detect(outputs.logits[-1], outputs.xyzr[-1], images.image_sizes)
        return self.postprocess(detections, batched_inputs)

    def preprocess(self, batched_inputs: List[dict]) -> ImageList:
        """Normalise, then zero-pad the images to one size."""
        images = [
            (send(image["image"], self.device) - self.pixel_mean) / self.pixel_std
            for image in batched_inputs
        ]
        return ImageList.from_tensors(images, self.size_divisibility)

    def decode(self, images: ImageList) -> DecoderOutput:
        """What every stage predicts for preprocessed images."""
        image_sizes = send(torch.tensor(images.image_sizes), self.device)  # (B, 2)
        return self.decode_padded(images.tensor, image_sizes)

    def decode_padded(self, images: Tensor, image_sizes: Tensor) -> DecoderOutput:
        """The same of images (B, 3, H, W) and their heights and widths (B, 2) before padding."""
        pyramid = self.neck(self.backbone(images))
        content, xyzr = self.query_generator(image_sizes)
        return self.decoder(content, xyzr, pyramid)

    def detect(
        self, logits: Tensor, xyzr: Tensor, image_sizes: Sequence[Tuple[int, int]]
    ) -> List[Instances]:
        """The highest scores of a stage's predictions, several classes of a query included.

        Args:
            logits: (B, N, C).
            xyzr: (B, N, 4) pixels of the network input.
            image_sizes: height and width of each image before padding, pixels.

        Returns:
            instances of each image by falling score, boxes in pixels of the network input, not
            clipped. No score threshold, no non-maximum suppression (supplement, section D).
            Boxes that are not finite are left out.
        """
        boxes, scores, classes = self.select(logits, xyzr)
        return [
            Instances(
                size, pred_boxes=Boxes(image_boxes), scores=image_scores, pred_classes=image_classes
            )[image_boxes.isfinite().all(-1)]
            for size, image_boxes, image_scores, image_classes in zip(
                image_sizes, boxes, scores, classes
            )
        ]

    def select(self, logits: Tensor, xyzr: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """The K highest scores of each image, falling, with their boxes and classes.

        Args:
            logits: (B, N, C).
            xyzr: (B, N, 4) pixels.

        Returns:
            boxes (B, K, 4), corners in the same pixels; scores (B, K), 0 for what is no number;
            classes (B, K).
        """
        num_classes = logits.shape[-1]
        scores = logits.float().sigmoid().nan_to_num(0).flatten(1)  # (B, N * C)
        scores, index = scores.topk(min(self.detections_per_image, scores.shape[1]))
        boxes = xyzr_to_corners(xyzr.float())  # (B, N, 4)
        boxes = boxes.gather(1, (index // num_classes)[..., None].expand(-1, -1, 4))
        return boxes, scores, index % num_classes

    def postprocess(
        self, detections: Sequence[Instances], batched_inputs: List[dict]
    ) -> List[Dict[str, Instances]]:
        """Scale what `detect` found, in place, to the size wanted of each image, and clip it there.

        Returns:
            Detectron2's format, see `forward`.
        """
        return [
            {
                "instances": detector_postprocess(
                    found,
                    image.get("height", found.image_size[0]),
                    image.get("width", found.image_size[1]),
                )
            }
            for found, image in zip(detections, batched_inputs)
        ]
