"""A small detector as Deformable DETR and DINO are, for tests: a decoder without an encoder."""

import math

import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torchvision.ops import MLP, box_convert


class DeformableAttention(nn.Module):
    """Each query samples a few points around its box on every level, as in Deformable DETR."""

    def __init__(self, dim, heads, levels, points):
        super().__init__()
        self.shape = heads, levels, points
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.offsets.weight)
        nn.init.uniform_(self.offsets.bias, -1, 1)  # all over the box

    def forward(self, queries, boxes, maps):
        """Queries (B, N, D) with boxes (B, N, 4), cx, cy, w, h in units of the padded images."""
        (batch, number, dim), (heads, levels, points) = queries.shape, self.shape
        offsets = self.offsets(queries).view(batch, number, heads, levels, points, 2)
        boxes = boxes[:, :, None, None, None]  # (B, N, 1, 1, 1, 4)
        places = 2 * (boxes[..., :2] + offsets * boxes[..., 2:] / 2) - 1  # as grid_sample counts
        places = places.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (S, B * H, N, P, 2)
        sampled = [
            F.grid_sample(
                self.value(level.movedim(1, -1)).movedim(-1, 1)  # (B, D, h, w)
                .reshape(batch * heads, dim // heads, *level.shape[-2:]),
                place, align_corners=False,
            )
            for level, place in zip(maps, places)
        ]
        weights = self.weights(queries).view(batch, number, heads, -1).softmax(-1)
        weights = weights.transpose(1, 2).reshape(batch * heads, 1, number, -1)
        found = (torch.cat(sampled, -1) * weights).sum(-1)  # (B * H, D / H, N)
        return self.out(found.view(batch, dim, number).transpose(1, 2))


class Layer(nn.Module):
    def __init__(self, dim, heads, levels, points, num_classes):
        super().__init__()
        self.position = MLP(4, [dim, dim])
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.sampling = DeformableAttention(dim, heads, levels, points)
        self.ffn = MLP(dim, [2 * dim, dim])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.classes = nn.Linear(dim, num_classes)
        self.boxes = MLP(dim, [dim, dim, 4])
        nn.init.constant_(self.classes.bias, -math.log(99))  # a score of 0.01
        nn.init.zeros_(self.boxes[-2].weight)
        nn.init.zeros_(self.boxes[-2].bias)

    def forward(self, content, boxes, valid, maps):
        """Content (B, N, D) and boxes (B, N, 4) to content, logits and boxes after the layer."""
        place = self.position(boxes.logit(1e-5))
        query = content + place
        content = self.norms[0](content + self.attention(query, query, content)[0])
        content = self.norms[1](content + self.sampling(content + place, boxes * valid, maps))
        content = self.norms[2](content + self.ffn(content))
        refined = (boxes.logit(1e-5) + self.boxes(content)).sigmoid()
        return content, self.classes(content), refined


class SmallDetr(nn.Module):
    """Reference boxes that are refined layer by layer; Detectron2's model protocol.

    Args:
        in_features, in_channels: names and channels of the backbone's maps.
        criterion: in detrex's style; its ``weight_dict`` is applied here, as detrex's models do.
    """

    def __init__(self, *, backbone, in_features, in_channels, num_classes, criterion, pixel_mean,
                 pixel_std, num_queries=60, dim=128, heads=8, points=4, num_layers=4):
        super().__init__()
        self.backbone, self.criterion = backbone, criterion
        self.neck = nn.ModuleDict({
            name: nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(8, dim))
            for name, channels in zip(in_features, in_channels)
        })
        self.content = nn.Parameter(torch.randn(num_queries, dim) / 10)
        centres = torch.rand(num_queries, 2) * 0.9 + 0.05
        self.places = nn.Parameter(
            torch.cat([centres, torch.full_like(centres, 0.15)], dim=-1).logit()
        )
        self.layers = nn.ModuleList(
            Layer(dim, heads, len(in_features), points, num_classes) for _ in range(num_layers)
        )
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    def forward(self, batched_inputs):
        images = ImageList.from_tensors([
            (image["image"].to(self.pixel_mean.device) - self.pixel_mean) / self.pixel_std
            for image in batched_inputs
        ], 32)
        # width, height, width, height of each image, (B, 1, 4)
        sizes = self.pixel_mean.new_tensor([[(w, h, w, h)] for h, w in images.image_sizes])
        outputs = self.decode(images.tensor, sizes)
        if not self.training:
            return self.detect(outputs, sizes, batched_inputs, images.image_sizes)
        targets = [
            {
                "labels": image["instances"].gt_classes.to(sizes.device),
                "boxes": box_convert(
                    image["instances"].gt_boxes.tensor.to(sizes.device) / size, "xyxy", "cxcywh"
                ),
            }
            for image, size in zip(batched_inputs, sizes)
        ]
        losses = self.criterion(outputs, targets)
        for name in losses:
            losses[name] *= self.criterion.weight_dict[name]
        return losses

    def decode(self, images, sizes):
        """What every layer predicts, in detrex's form."""
        features = self.backbone(images)
        maps = [layer(features[name]) for name, layer in self.neck.items()]
        height, width = images.shape[-2:]
        valid = sizes / sizes.new_tensor([width, height, width, height])
        content = self.content.expand(len(images), -1, -1)
        boxes = self.places.sigmoid().expand(len(images), -1, -1)
        outputs = []
        for layer in self.layers:
            content, logits, refined = layer(content, boxes, valid, maps)
            outputs.append({"pred_logits": logits, "pred_boxes": refined})
            boxes = refined.detach()
        return {**outputs[-1], "aux_outputs": outputs[:-1]}

    def detect(self, outputs, sizes, batched_inputs, image_sizes):
        logits = outputs["pred_logits"]  # (B, N, C)
        boxes = box_convert(outputs["pred_boxes"], "cxcywh", "xyxy") * sizes
        scores, index = logits.sigmoid().flatten(1).topk(logits.shape[1])
        found = [
            Instances(
                size, scores=score, pred_classes=number % logits.shape[-1],
                pred_boxes=Boxes(box[number // logits.shape[-1]]),
            )
            for size, score, number, box in zip(image_sizes, scores, index, boxes)
        ]
        return [
            {"instances": detector_postprocess(
                instances, image.get("height", instances.image_size[0]),
                image.get("width", instances.image_size[1]),
            )}
            for instances, image in zip(found, batched_inputs)
        ]
