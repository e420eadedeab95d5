"""Cross-stage labels for DETR-like detectors of detrex; a decoder layer is a stage.

Outputs, targets and the names of the losses are those of detrex's criterions, and nothing of
detrex is imported. A layer is a dictionary with ``pred_logits`` (B, N, C) and ``pred_boxes``
(B, N, 4), centre and size (cx, cy, w, h) in units of the image's width and height.
"""

from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from .criterion import average_over_ranks, log_assignment
from .label_assigner import Assignment, CrossStageLabelAssigner
from .targets import pad_objects

GIOU_EPS = 1e-6  # detrex's
NAMES = ("loss_class", "loss_bbox", "loss_giou")

Layer = Dict[str, Tensor]


class CrossStageCriterion(nn.Module):
    """Losses of DINO, Deformable DETR and their like, with class labels from all decoder layers.

    Boxes are taught by the layer's own matches, as ever. So are encoder outputs, and denoising
    queries by the objects that they were made from: both class and box. Losses are divided by the
    number of objects as in detrex, but those of classes by the number of labels if it is greater.

    Args:
        num_classes: C.
        matcher: called with a layer and the targets; gives the indices of the queries matched and
            of their objects, for each image.
        label_assigner: class targets of the decoder layers.
        weight_dict: loss weights by name. Whoever calls the criterion applies them, as in detrex.
            With ``loss_class_dn``, batches without denoising queries have zeros for their losses.
        losses, loss_class_type: as in detrex, but only with these values.
        alpha, gamma: parameters of the focal loss.
        two_stage_binary_cls: encoder outputs tell objects from background only: all are class 0.

    Raises:
        ValueError: other losses, or in training another number of classes than the logits have.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        matcher: nn.Module,
        label_assigner: CrossStageLabelAssigner,
        weight_dict: Dict[str, float],
        losses: Sequence[str] = ("class", "boxes"),
        loss_class_type: str = "focal_loss",
        alpha: float = 0.25,
        gamma: float = 2.0,
        two_stage_binary_cls: bool = False,
    ):
        super().__init__()
        if set(losses) != {"class", "boxes"} or loss_class_type != "focal_loss":
            raise ValueError(
                f"losses={list(losses)}, {loss_class_type=}: cross-stage labels are for class and "
                "boxes, and for focal_loss, since a query may have several"
            )
        self.num_classes = num_classes
        self.matcher = matcher
        self.label_assigner = label_assigner
        self.weight_dict = weight_dict
        self.alpha, self.gamma = alpha, gamma
        self.two_stage_binary_cls = two_stage_binary_cls

    def forward(
        self, outputs: dict, targets: List[Dict[str, Tensor]], dn_metas: Optional[dict] = None
    ) -> Dict[str, Tensor]:
        """Unweighted losses under detrex's names, computed in float32.

        Those of the last layer are ``loss_class``, ``loss_bbox`` and ``loss_giou``; others end in
        ``_0``, ``_1`` ... (earlier layers), ``_enc`` (encoder), ``_dn``, ``_dn_0`` ... (denoising).

        Args:
            outputs: the last layer, with the earlier ones in order as ``aux_outputs``, and the
                encoder's predictions as ``enc_outputs``, if there are any.
            targets: of each image ``labels`` (T,), and ``boxes`` (T, 4) as in ``pred_boxes``.
            dn_metas: of DINO's denoising queries: ``output_known_lbs_bboxes``, their predictions
                like ``outputs``; ``dn_num`` groups of ``single_padding`` queries each, which start
                with a query for each object of the image.
        """
        if outputs["pred_logits"].shape[-1] != self.num_classes:
            raise ValueError(
                f"criterion.num_classes={self.num_classes}, but the model predicts "
                f"{outputs['pred_logits'].shape[-1]} classes"
            )
        layers = all_layers(outputs)
        boxes, labels = pad_objects(
            [image["boxes"] for image in targets], [image["labels"] for image in targets]
        )
        pairs = [self.match(layer, targets) for layer in layers]
        assignment = self.assign(layers, pairs, boxes, labels)

        counts = [len(image["labels"]) for image in targets]
        totals = torch.cat([boxes.new_tensor([sum(counts)]), assignment.classes.sum((1, 2, 3))])
        # Numbers, not tensors, as in detrex: on CUDA the bits of a quotient depend on it.
        num_objects, *num_labels = average_over_ranks(totals).clamp(min=1).tolist()

        losses = {}
        for index, suffix in suffixes(layers).items():
            losses.update(self.layer_losses(
                suffix, layers[index], pairs[index], assignment.classes[index], boxes,
                num_objects, max(num_labels[index], num_objects),
            ))
        if "enc_outputs" in outputs:
            losses.update(self.encoder_losses(
                outputs["enc_outputs"], targets, boxes, labels, num_objects
            ))
        if dn_metas and "output_known_lbs_bboxes" in dn_metas:
            losses.update(self.denoising_losses(dn_metas, counts, boxes, labels, num_objects))
        elif "loss_class_dn" in self.weight_dict:
            losses.update({
                f"{name}_dn{suffix}": boxes.new_zeros(())
                for suffix in suffixes(layers).values() for name in NAMES
            })
        log_assignment(assignment)
        return losses

    def match(self, layer: Layer, targets: List[Dict[str, Tensor]]) -> Tensor:
        """Image, query and object of the M pairs (3, M) that the matcher finds."""
        return concatenate(self.matcher(layer, targets)).to(layer["pred_logits"].device)

    def assign(
        self, layers: List[Layer], pairs: List[Tensor], boxes: Tensor, labels: Tensor
    ) -> Assignment:
        """Class targets of all decoder layers."""
        logits = torch.stack([layer["pred_logits"] for layer in layers])  # (L, B, N, C)
        predicted = torch.stack([layer["pred_boxes"] for layer in layers])  # (L, B, N, 4)
        match = labels.new_full(logits.shape[:-1], -1)
        for layer, (image, query, number) in zip(match, pairs):
            layer[image, query] = number
        return self.label_assigner(logits, to_corners(predicted), match, to_corners(boxes), labels)

    def layer_losses(
        self,
        suffix: str,
        layer: Layer,
        pairs: Tensor,
        classes: Tensor,
        boxes: Tensor,
        num_objects: float,
        num_labels: float,
    ) -> Dict[str, Tensor]:
        """Losses of one layer, operation by operation as in detrex, so that their bits are equal.

        Args:
            suffix: what the names end in.
            pairs: image, query and object (3, M) of the boxes to teach.
            classes: targets (B, N, C), 0 or 1.
            boxes: of the objects (B, T, 4).
            num_objects, num_labels: what the losses of boxes and of classes are divided by.
        """
        logits, (image, query, number) = layer["pred_logits"], pairs
        focal = sigmoid_focal_loss(logits, classes, self.alpha, self.gamma)
        predicted, wanted = layer["pred_boxes"][image, query], boxes[image, number]
        giou = generalized_box_iou_loss(to_corners(predicted), to_corners(wanted), eps=GIOU_EPS)
        values = (
            focal.mean(1).sum() / num_labels * logits.shape[1],
            F.l1_loss(predicted, wanted, reduction="none").sum() / num_objects,
            giou.sum() / num_objects,
        )
        return {f"{name}{suffix}": value for name, value in zip(NAMES, values)}

    def one_to_one_losses(
        self,
        suffix: str,
        layer: Layer,
        pairs: Tensor,
        boxes: Tensor,
        labels: Tensor,
        num_objects: float,
    ) -> Dict[str, Tensor]:
        """`layer_losses` where each query of a pair has the label (B, T) of its object only."""
        image, query, number = pairs
        classes = torch.zeros_like(layer["pred_logits"])
        classes[image, query, labels[image, number]] = 1
        return self.layer_losses(suffix, layer, pairs, classes, boxes, num_objects, num_objects)

    def encoder_losses(
        self,
        outputs: Layer,
        targets: List[Dict[str, Tensor]],
        boxes: Tensor,
        labels: Tensor,
        num_objects: float,
    ) -> Dict[str, Tensor]:
        """Losses of a two-stage detector's proposals, matched by themselves."""
        if self.two_stage_binary_cls:
            targets = [{**image, "labels": torch.zeros_like(image["labels"])} for image in targets]
            labels = torch.zeros_like(labels)
        layer, = all_layers(outputs)
        pairs = self.match(layer, targets)
        return self.one_to_one_losses("_enc", layer, pairs, boxes, labels, num_objects)

    def denoising_losses(
        self, dn_metas: dict, counts: List[int], boxes: Tensor, labels: Tensor, num_objects: float
    ) -> Dict[str, Tensor]:
        """Losses of queries whose objects are known, see `forward`; ``counts`` of each image."""
        groups, size = dn_metas["dn_num"], dn_metas["single_padding"]
        known = []
        for count in counts:
            number = torch.arange(count).repeat(groups)
            start = size * torch.arange(groups).repeat_interleave(count)
            known.append((start + number, number))
        pairs = concatenate(known).to(boxes.device)
        layers = all_layers(dn_metas["output_known_lbs_bboxes"])
        losses = {}
        for index, suffix in suffixes(layers).items():
            losses.update(self.one_to_one_losses(
                f"_dn{suffix}", layers[index], pairs, boxes, labels, num_objects * groups
            ))
        return losses


def all_layers(outputs: dict) -> List[Layer]:
    """The predictions of every layer, the last one at the end, in float32."""
    return [
        {name: layer[name].float() for name in ("pred_logits", "pred_boxes")}
        for layer in (*outputs.get("aux_outputs", ()), outputs)
    ]


def suffixes(layers: Sequence[Layer]) -> Dict[int, str]:
    """What the names of the losses of a layer end in, by its index: nothing for the last one.

    It comes first, as in detrex: the order of a sum decides its bits.
    """
    return {-1: "", **{index: f"_{index}" for index in range(len(layers) - 1)}}


def concatenate(indices: Sequence[Tuple[Tensor, Tensor]]) -> Tensor:
    """Queries and objects of each image to image, query and object of all pairs (3, M)."""
    image = [torch.full_like(queries, index) for index, (queries, _) in enumerate(indices)]
    return torch.stack([torch.cat(column) for column in (image, *zip(*indices))])


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to corners, (..., 4) both."""
    return box_convert(boxes, "cxcywh", "xyxy")
