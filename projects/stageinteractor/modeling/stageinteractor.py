"""Meta-architecture: images -> backbone -> neck -> queries -> decoder -> losses or detections."""

from collections.abc import Sequence

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from .boxes import xyzr_to_corners
from .criterion import SetCriterion
from .decoder import DecoderOutput, StageInteractorDecoder
from .neck import SharedNormChannelMapper
from .queries import QueryGenerator
from .targets import gather_targets
from .transfer import send


class StageInteractor(nn.Module):
    """StageInteractor (ICCV 2023) as a Detectron2 model, see ``forward``.

    Args:
        backbone: images (B, 3, H, W) -> dictionary of feature maps.
        neck: dictionary of feature maps -> maps with the same number of channels, finest first.
        query_generator: makes the initial content and positional vectors.
        decoder: the cascade of stages.
        criterion: computes the training losses.
        pixel_mean, pixel_std: normalisation of each input channel, in the images' channel order.
        size_divisibility: after normalisation, images are zero-padded to a multiple of this.
        detections_per_image: how many of the N * C scores of an image become detections.

    Raises:
        ValueError: if an argument is out of range.
    """

    pixel_mean: Tensor  # (3, 1, 1)
    pixel_std: Tensor  # (3, 1, 1)

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

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Compute losses or detections, following Detectron2's protocol.

        Args:
            batched_inputs: one dictionary per image, with ``image`` (3, H, W) in the range 0..255;
                in training also ``instances`` with ``gt_boxes`` (pixels of ``image``) and
                ``gt_classes``; in inference optionally ``height`` and ``width`` of the output.

        Returns:
            in training, the weighted losses by name; otherwise ``[{"instances": Instances}, ...]``
            with ``pred_boxes`` clipped to the output size, ``scores`` and ``pred_classes``.
        """
        images = self.preprocess(batched_inputs)
        outputs = self.decode(images)
        if self.training:
            instances = [image["instances"] for image in batched_inputs]
            targets = gather_targets(instances, images.image_sizes, self.device)
            return self.criterion(outputs, targets)
        detections = self.detect(outputs.logits[-1], outputs.xyzr[-1], images.image_sizes)
        return self.postprocess(detections, batched_inputs)

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images, then zero-pad them to one size."""
        images = [
            (send(image["image"], self.device) - self.pixel_mean) / self.pixel_std
            for image in batched_inputs
        ]
        return ImageList.from_tensors(images, self.size_divisibility)

    def decode(self, images: ImageList) -> DecoderOutput:
        """Predict with every stage, for preprocessed images."""
        # In a trace, sizes are tensors.
        image_sizes = torch.tensor([[int(side) for side in size] for size in images.image_sizes])
        return self.decode_padded(images.tensor, send(image_sizes, self.device))  # (B, 2)

    def decode_padded(self, images: Tensor, image_sizes: Tensor) -> DecoderOutput:
        """Predict with every stage.

        Args:
            images: (B, 3, H, W), normalised and padded.
            image_sizes: (B, 2) height and width of each image before padding, pixels.
        """
        pyramid = self.neck(self.backbone(images))
        content, xyzr = self.query_generator(image_sizes)
        return self.decoder(content, xyzr, pyramid)

    def detect(
        self, logits: Tensor, xyzr: Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Turn the highest scores of a stage into detections; a query may have several classes.

        Args:
            logits: (B, N, C).
            xyzr: (B, N, 4) pixels of the network input.
            image_sizes: height and width of each image before padding, pixels.

        Returns:
            instances of each image by descending score, with boxes in pixels of the network input,
            not clipped. There is no score threshold and no non-maximum suppression (supplement,
            section D). Boxes that are not finite are omitted.
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

    def select(self, logits: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select the K highest scores of each image, in descending order.

        Args:
            logits: (B, N, C).
            xyzr: (B, N, 4) pixels.

        Returns:
            boxes (B, K, 4), corners in the same pixels; scores (B, K), 0 instead of NaN; classes
            (B, K).
        """
        num_classes = logits.shape[-1]
        scores = logits.float().sigmoid().nan_to_num(0).flatten(1)  # (B, N * C)
        scores, index = scores.topk(min(self.detections_per_image, scores.shape[1]))
        boxes = xyzr_to_corners(xyzr.float())  # (B, N, 4)
        # // and % would be exported with operations that not every runtime has for whole numbers.
        queries = torch.div(index, num_classes, rounding_mode="trunc")
        boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        return boxes, scores, index - queries * num_classes

    def postprocess(
        self, detections: Sequence[Instances], batched_inputs: list[dict]
    ) -> list[dict[str, Instances]]:
        """Scale the boxes of `detect`, in place, to the output size of each image, and clip them.

        Returns:
            detections in Detectron2's format, see `forward`.
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
