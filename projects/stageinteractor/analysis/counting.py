"""Count the parameters and multiply-adds of a model, by part and by stage.

Multiply-adds are those of convolutions, linear layers, products of matrices, attention and bilinear
samples; one multiplication with its addition counts as one, as in the papers' GFLOPs. Element-wise
work, which includes norms, is not counted.
"""

import ast
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.layers import FrozenBatchNorm2d
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter, get_shape
from torch import Tensor, nn

from ..modeling import StageInteractor
from ..modeling.adamixer import AdaptiveMixing

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SUMMARY = re.compile(r"(.+?)(?:: (?:([\d.]+) AP in the paper \((.+)\)|no figure in the paper))?\.?")

# The parts of a stage by the name of their module. Work of the stage itself, outside these modules,
# is sampling; work of the mixing outside its modules is dynamic mixing.
PARTS = {
    "attention": "self-attention",
    "points": "sampling points",
    "": "feature sampling",
    "mixing.filter_generator": "filter generator",
    "mixing.bias_generator": "bias generator",
    "mixing.static_mixings": "static mixing",
    "mixing.channel_adapter": "channel filter adapter",
    "mixing.spatial_adapter": "spatial filter adapter",
    "mixing": "dynamic mixing, norm",
    "mixing.out_proj": "output projection",
    "ffn": "feed-forward network",
    "class_head": "class head",
    "box_head": "box head",
}


class Counts(NamedTuple):
    """Counts of a model by the name of the module; the name of the whole model is empty."""

    parameters: Counter
    trained: Counter  # parameters that are trained
    multiply_adds: Counter
    not_counted: Counter  # how often each operator was called that has no count


class FromTensor(nn.Module):
    """A model from the normalised image on, because fvcore traces nothing but tensors."""

    def __init__(self, model: StageInteractor, size: tuple[int, int]):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the decoder's outputs for an image (1, 3, H, W) that is padded."""
        model = self.model
        pyramid = model.neck(model.backbone(image))
        return model.decoder(*model.query_generator(torch.tensor([self.size])), pyramid)


def matrix_product(inputs, outputs) -> int:
    """Count a product of matrices, whose second factor is the last tensor among the inputs."""
    *_, second = filter(None, map(get_shape, inputs))
    return prod(get_shape(outputs[0])) * second[-2]


def attention(inputs, outputs) -> int:
    """Count both products of scaled dot-product attention."""
    query, key, value = map(get_shape, inputs[:3])
    return prod(query[:-1]) * key[-2] * (key[-1] + value[-1])


def gathered_samples(inputs, outputs) -> int:
    """Count the weighted rows of a table that are summed up."""
    rows, indices = map(get_shape, inputs[:2])
    return prod(indices) * rows[-1]


def deformable_convolution(inputs, outputs) -> int:
    """Count the convolution, and a bilinear sample of each channel for each tap."""
    images, weight, output = get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0])
    samples = images[1] * prod(weight[2:])
    return output[0] * prod(output[2:]) * (prod(weight) + 4 * samples)


NOTHING = elementwise_flop_counter(0, 0)  # None would leave fvcore's own handle in place
# In addition to fvcore's own, which count 4 multiply-adds for a bilinear sample.
HANDLES = {
    **dict.fromkeys(("aten::matmul", "aten::bmm", "aten::baddbmm"), matrix_product),
    "aten::scaled_dot_product_attention": attention,
    "aten::embedding_bag": gathered_samples,
    "torchvision::deform_conv2d": deformable_convolution,
    **dict.fromkeys(("aten::batch_norm", "aten::group_norm", "aten::layer_norm"), NOTHING),
}


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of all parameters and of those that are trained.

    Weights and biases of frozen norms count as parameters, although Detectron2 has them as buffers.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, FrozenBatchNorm2d)]
    frozen = sum(norm.weight.numel() + norm.bias.numel() for norm in norms)
    return (
        sum(parameter.numel() for parameter in module.parameters()) + frozen,
        sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
    )


def dead_parameters(model: StageInteractor) -> int:
    """Return the number of parameters without effect that the released code has in addition.

    StageInteractor has, for each reused filter, a linear layer like the column gate's, followed by
    a softmax over one element. AdaMixer has initial boxes, which are always the whole image.
    """
    mixings = [stage.mixing for stage in model.decoder.stages]
    if isinstance(mixings[0], AdaptiveMixing):
        return 4 * model.query_generator.content.num_embeddings
    return sum(
        len(mixing.static_mixings) * count_parameters(mixing.spatial_adapter.column_gate)[0]
        for mixing in mixings
        if mixing.spatial_adapter
    )


def count(model: StageInteractor, size: tuple[int, int]) -> Counts:
    """Count everything for one image of ``size``, height and width in pixels before padding.

    The model runs once, and is in evaluation mode afterwards.
    """
    parameters, trained = Counter(), Counter()
    for name, module in model.named_modules():
        parameters[name], trained[name] = count_parameters(module)
    image = model.preprocess([{"image": torch.zeros(3, *size)}]).tensor
    analysis = FlopCountAnalysis(FromTensor(model.eval(), size), image).set_op_handle(**HANDLES)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    with torch.no_grad():
        found = analysis.by_module()
    multiply_adds = Counter({name[len("model."):]: number for name, number in found.items()})
    return Counts(parameters, trained, multiply_adds, analysis.unsupported_ops())


def parameter_table(model: nn.Module) -> list[list]:
    """Make a table of the parameters of any model's children; its first row is the header."""
    rows = [
        [name.replace("_", " "), parameters, trained, parameters - trained]
        for name, module in [*model.named_children(), ("total", model)]
        for parameters, trained in [count_parameters(module)]
    ]
    return [["", "parameters", "trained", "frozen"], *rows]


def part_table(model: StageInteractor, counts: Counts) -> list[list]:
    """Make a table of the parameters and multiply-adds of the parts of the model."""
    header, *rows = parameter_table(model)
    rows = [
        [*row, counts.multiply_adds["" if row[0] == "total" else row[0].replace(" ", "_")] / 1e9]
        for row in rows if row[1]
    ]
    dead = dead_parameters(model)
    rows.append(["dead in the authors' code", dead])
    rows.append(["total in the authors' code", counts.parameters[""] + dead])
    return [[*header, "G multiply-adds"], *rows]


def split_stage(counts: Counter, stage: int) -> dict[str, int]:
    """Split the counts of a stage into those of `PARTS`, each without the parts inside it."""
    prefix, own = f"decoder.stages.{stage}", {}
    for part in sorted(PARTS, key=len, reverse=True):
        inside = sum(number for other, number in own.items() if other.startswith(part))
        own[part] = counts[f"{prefix}.{part}".rstrip(".")] - inside
    return own


def stage_table(counts: Counter, num_stages: int, unit: float) -> list[list]:
    """Make a table of the counts of `PARTS` in all stages together and in each, per ``unit``."""
    stages = [split_stage(counts, stage) for stage in range(num_stages)]
    found = {name: [stage[part] for stage in stages] for part, name in PARTS.items()}
    found["total"] = [sum(stage.values()) for stage in stages]
    rows = [
        [name, sum(row) / unit, *(number / unit for number in row)]
        for name, row in found.items()
        if any(row)
    ]
    return [["", "all stages", *range(num_stages)], *rows]


def config_table() -> list[list]:
    """Make a table of the configs of this project, from the first lines of their docstrings."""
    rows = []
    for path in sorted(CONFIGS.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or "-"
        what, ap, where = SUMMARY.fullmatch(docstring.splitlines()[0]).groups()
        rows.append([path.name, what.replace("``", ""), ap or "-", where or "-"])
    return [["config", "model and schedule", "AP in the paper", "where"], *rows]
