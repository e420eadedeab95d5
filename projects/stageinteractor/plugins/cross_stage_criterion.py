"""Cross-stage labels for the DETR-like detectors of detrex, whose decoder layers are the stages.

Outputs, targets and names of losses are those of detrex's criterions, but nothing is imported from
detrex. A layer is a dictionary with ``pred_logits`` (B, N, C) and ``pred_boxes`` (B, N, 4): centre
and size (cx, cy, w, h) in units of the image's width and height.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from ..modeling.criterion import average_over_ranks, log_assignment
from ..modeling.label_assigner import Assignment, CrossStageLabelAssigner
from ..modeling.targets import pad_objects

GIOU_EPS = 1e-6  # detrex's
NAMES = ("loss_class", "loss_bbox", "loss_giou")
# H-DETR hands all its outputs to the first of two calls, which learns from the one-to-one queries,
# and what ends in this as the outputs of a second one.
ONE2MANY = "_one2many"
OUTPUTS = {"pred_logits", "pred_boxes", "aux_outputs"}
KNOWN = {*OUTPUTS, *(f"{key}{ONE2MANY}" for key in OUTPUTS), "enc_outputs"}

Layer = dict[str, Tensor]


class CrossStageCriterion(nn.Module):
    """Losses of DINO, Deformable DETR and similar detectors, with labels from all decoder layers.

    Box targets are the layer's own matches, as usual. Encoder outputs learn class and box from
    their own matches, too, and denoising queries from the objects that they were made from. Losses
    are divided by the number of objects as in detrex, except that those of classes are divided by
    the number of labels if that is greater.

    Args:
        num_classes: classes C.
        matcher: function of a layer and the targets that returns, for each image, the indices of
            matched queries and of their objects.
        label_assigner: assigns the class targets of the decoder layers.
        weight_dict: loss weights by name, which the caller applies, as in detrex. If it has
            ``loss_class_dn``, the denoising losses of batches without denoising queries are zero.
        losses, loss_class_type: as in detrex, but only these values are supported.
        unknown: arguments of another criterion, which are refused by name.
        alpha, gamma: parameters of the focal loss.
        two_stage_binary_cls: whether encoder outputs only tell objects from background, so that
            all objects are of class 0 to them.

    Raises:
        ValueError: if other losses are asked for or an argument is unknown.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        matcher: nn.Module,
        label_assigner: CrossStageLabelAssigner,
        weight_dict: dict[str, float],
        losses: Sequence[str] = ("class", "boxes"),
        loss_class_type: str = "focal_loss",
        alpha: float = 0.25,
        gamma: float = 2.0,
        two_stage_binary_cls: bool = False,
        **unknown: Any,
    ):
        super().__init__()
        if set(losses) != {"class", "boxes"} or loss_class_type != "focal_loss":
            raise ValueError(
                f"losses={list(losses)}, {loss_class_type=}: cross-stage labels are for class and "
                "boxes, and for focal_loss, since a query may have several"
            )
        if unknown:
            raise ValueError(
                f"arguments of another criterion: {', '.join(unknown)}. Cross-stage labels do not "
                "do what they ask for; if your detector works without, delete them from its config"
            )
        self.num_classes = num_classes
        self.matcher = matcher
        self.label_assigner = label_assigner
        self.weight_dict = weight_dict
        self.alpha, self.gamma = alpha, gamma
        self.two_stage_binary_cls = two_stage_binary_cls

    def forward(
        self, outputs: dict, targets: list[dict[str, Tensor]], dn_metas: dict | None = None
    ) -> dict[str, Tensor]:
        """Compute the unweighted losses under detrex's names, in float32.

        Those of the last layer are ``loss_class``, ``loss_bbox`` and ``loss_giou``; others end in
        ``_0``, ``_1`` ... (earlier layers), ``_enc`` (encoder), ``_dn``, ``_dn_0`` ... (denoising).

        Args:
            outputs: the last layer, with the earlier ones in order as ``aux_outputs`` and the
                encoder's predictions as ``enc_outputs``, if there are any.
            targets: for each image, ``labels`` (T,) and ``boxes`` (T, 4) as in ``pred_boxes``.
            dn_metas: about DINO's denoising queries, if there are any: their predictions as
                ``output_known_lbs_bboxes``, in the form of ``outputs``; the numbers ``dn_num`` of
                groups and ``single_padding`` of queries per group. Each group starts with one query
                per object of the image.

        Raises:
            ValueError: if there are other outputs, from which the detector's own criterion would
                compute further losses, or if the logits do not have ``num_classes``.
        """
        unknown = outputs.keys() - KNOWN
        if unknown:
            raise ValueError(
                f"outputs that cross-stage labels do not know: {', '.join(sorted(unknown))}. The "
                "detector's own criterion may compute losses from them, which would be missing"
            )
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
        # As numbers, as in detrex: on CUDA, dividing by a tensor may round differently.
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
        is_one_to_one = f"pred_logits{ONE2MANY}" in outputs
        log_assignment(assignment, "labels_one2one" if is_one_to_one else "labels")
        return losses

    def match(self, layer: Layer, targets: list[dict[str, Tensor]]) -> Tensor:
        """Return image, query and object of the M pairs that the matcher finds: (3, M)."""
        return concatenate(self.matcher(layer, targets)).to(layer["pred_logits"].device)

    def assign(
        self, layers: list[Layer], pairs: list[Tensor], boxes: Tensor, labels: Tensor
    ) -> Assignment:
        """Assign class targets to all decoder layers, given the pairs (3, M) of each."""
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
    ) -> dict[str, Tensor]:
        """Compute the losses of one layer, with detrex's operations, so that the bits are equal.

        Args:
            suffix: end of the names of the losses.
            pairs: image, query and object (3, M) of the boxes to learn.
            classes: targets (B, N, C), 0 or 1.
            boxes: boxes of the objects (B, T, 4).
            num_objects: divisor of the losses of boxes.
            num_labels: divisor of the loss of classes.
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
    ) -> dict[str, Tensor]:
        """Compute `layer_losses` where a query gets only the label (B, T) of its own object."""
        image, query, number = pairs
        classes = torch.zeros_like(layer["pred_logits"])
        classes[image, query, labels[image, number]] = 1
        return self.layer_losses(suffix, layer, pairs, classes, boxes, num_objects, num_objects)

    def encoder_losses(
        self,
        outputs: Layer,
        targets: list[dict[str, Tensor]],
        boxes: Tensor,
        labels: Tensor,
        num_objects: float,
    ) -> dict[str, Tensor]:
        """Compute the losses of a two-stage detector's proposals, with matches of their own."""
        if self.two_stage_binary_cls:
            targets = [{**image, "labels": torch.zeros_like(image["labels"])} for image in targets]
            labels = torch.zeros_like(labels)
        layer, = all_layers(outputs)
        pairs = self.match(layer, targets)
        return self.one_to_one_losses("_enc", layer, pairs, boxes, labels, num_objects)

    def denoising_losses(
        self, dn_metas: dict, counts: list[int], boxes: Tensor, labels: Tensor, num_objects: float
    ) -> dict[str, Tensor]:
        """Compute the losses of denoising queries, given the number of objects in each image."""
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


def all_layers(outputs: dict) -> list[Layer]:
    """Return the predictions of every layer in order, in float32."""
    return [
        {name: layer[name].float() for name in ("pred_logits", "pred_boxes")}
        for layer in (*outputs.get("aux_outputs", ()), outputs)
    ]


def suffixes(layers: Sequence[Layer]) -> dict[int, str]:
    """Return the end of the names of each layer's losses, by index; the last layer has none.

    The last layer comes first, as in detrex, because the bits of a sum depend on the order.
    """
    return {-1: "", **{index: f"_{index}" for index in range(len(layers) - 1)}}


def concatenate(indices: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Convert queries and objects of each image to image, query and object of all pairs (3, M)."""
    image = [torch.full_like(queries, index) for index, (queries, _) in enumerate(indices)]
    return torch.stack([torch.cat([*column]) for column in (image, *zip(*indices))])


def to_corners(boxes: Tensor) -> Tensor:
    """Convert (cx, cy, w, h) to corners, both (..., 4)."""
    return box_convert(boxes, "cxcywh", "xyxy")
