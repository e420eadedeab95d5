#!/usr/bin/env python
"""List the configs, or count the parameters and multiply-adds of one by part and by stage.

    python tools/analyze_model.py
    python tools/analyze_model.py --config-file FILE [--size 800 1280] [key=value ...]

Counted are the convolutions, linear layers, products of matrices, attention and bilinear samples of
one image, a multiply-add as one, as in the papers' GFLOPs. Not counted is what works element by
element, norms included. The model runs once, with random weights and on the CPU.
"""

import argparse
import ast
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import NamedTuple
from collections.abc import Callable

import _start
import torch
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter, get_shape
from tabulate import tabulate
from torch import Tensor, nn

from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.config.building import explain_misfits
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.modeling import StageInteractor
from projects.stageinteractor.modeling.adamixer import AdaptiveMixing
from projects.stageinteractor.modeling.mixing import StaticMixing

CONFIGS = Path(__file__).resolve().parents[1] / "projects/stageinteractor/configs"
SUMMARY = re.compile(r"(.+?)(?:: (?:([\d.]+) AP in the paper \((.+)\)|no figure in the paper))?\.?")

# The parts of a stage by their module. The stage itself only samples; what the mixing does without
# a module of its own is dynamic mixing.
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


class Analysis(NamedTuple):
    """Counts of a model by the name of the module; the model's is empty."""

    parameters: Counter
    trained: Counter  # those of the parameters that are
    multiply_adds: Counter
    operators: dict[str, Counter]  # multiply-adds of each module by operator
    not_counted: Counter  # how often each operator without a count is called


class FromTensor(nn.Module):
    """A model from the normalised image on: fvcore traces tensors only."""

    def __init__(self, model: StageInteractor, size: tuple[int, int]):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image (1, 3, H, W), padded -> the decoder's outputs."""
        model = self.model
        pyramid = model.neck(model.backbone(image))
        return model.decoder(*model.query_generator(torch.tensor([self.size])), pyramid)


def matrix_product(first: int) -> Callable:
    """Counts products of the arguments ``first`` and ``first + 1``.

    They are named after their sizes, which tell channel from spatial mixing.
    """

    def count(inputs, outputs) -> Counter:
        inner, shape = get_shape(inputs[first])[-1], get_shape(outputs[0])
        return Counter({f"product {shape[-2]}x{inner}x{shape[-1]}": prod(shape) * inner})

    return count


def attention(inputs, outputs) -> int:
    """Counts both products of scaled dot-product attention."""
    query, key, value = map(get_shape, inputs[:3])
    return prod(query[:-1]) * key[-2] * (key[-1] + value[-1])


def gathered_samples(inputs, outputs) -> int:
    """Counts the rows of a table that are summed with weights."""
    rows, indices = map(get_shape, inputs[:2])
    return prod(indices) * rows[-1]


def deformable_convolution(inputs, outputs) -> int:
    """Counts the convolution, and as bilinear samples what each tap reads of each channel."""
    images, weight, output = get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0])
    samples = images[1] * prod(weight[2:])
    return output[0] * prod(output[2:]) * (prod(weight) + 4 * samples)


NOTHING = elementwise_flop_counter(0, 0)  # None would leave fvcore's own handle in place
# Beside fvcore's own, which take 4 multiply-adds for a bilinear sample.
HANDLES = {
    "aten::matmul": matrix_product(0),
    "aten::bmm": matrix_product(0),
    "aten::baddbmm": matrix_product(1),
    "aten::scaled_dot_product_attention": attention,
    "aten::embedding_bag": gathered_samples,
    "torchvision::deform_conv2d": deformable_convolution,
    "aten::batch_norm": NOTHING,
    "aten::group_norm": NOTHING,
    "aten::layer_norm": NOTHING,
}


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """All parameters and the trained ones. Frozen norms count, though Detectron2 has buffers."""
    norms = [norm for norm in module.modules() if isinstance(norm, FrozenBatchNorm2d)]
    frozen = sum(norm.weight.numel() + norm.bias.numel() for norm in norms)
    return (
        sum(parameter.numel() for parameter in module.parameters()) + frozen,
        sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
    )


def dead_parameters(model: StageInteractor) -> int:
    """Parameters that the released code has besides, and that have no effect.

    StageInteractor: for each reused filter a linear layer like the column gate's, followed by a
    softmax over one element. AdaMixer: the initial boxes, which are always the whole image.
    """
    mixings = [stage.mixing for stage in model.decoder.stages]
    if isinstance(mixings[0], AdaptiveMixing):
        return 4 * model.query_generator.content.num_embeddings
    return sum(
        len(mixing.static_mixings) * count_parameters(mixing.spatial_adapter.column_gate)[0]
        for mixing in mixings
        if mixing.spatial_adapter
    )


def analyze(model: StageInteractor, size: tuple[int, int]) -> Analysis:
    """Count everything, for one image of ``size``, height and width in pixels before padding."""
    parameters, trained = Counter(), Counter()
    for name, module in model.named_modules():
        parameters[name], trained[name] = count_parameters(module)
    image = model.preprocess([{"image": torch.zeros(3, *size)}]).tensor
    counts = FlopCountAnalysis(FromTensor(model.eval(), size), image).set_op_handle(**HANDLES)
    counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        operators = counts.by_module_and_operator()
    operators = {name[len("model."):]: found for name, found in operators.items()}
    multiply_adds = Counter({name: sum(found.values()) for name, found in operators.items()})
    return Analysis(parameters, trained, multiply_adds, operators, counts.unsupported_ops())


def parameter_table(model: nn.Module) -> list[list]:
    """Parameters of the children of any model."""
    rows = [
        [name.replace("_", " "), parameters, trained, parameters - trained]
        for name, module in [*model.named_children(), ("total", model)]
        for parameters, trained in [count_parameters(module)]
    ]
    return [["", "parameters", "trained", "frozen"], *rows]


def part_table(model: StageInteractor, analysis: Analysis) -> list[list]:
    """Parameters and multiply-adds of the parts of the model."""
    rows = []
    for title in ("backbone", "neck", "query_generator", "decoder", "total"):
        name = "" if title == "total" else title
        parameters, trained = analysis.parameters[name], analysis.trained[name]
        giga = analysis.multiply_adds[name] / 1e9
        rows.append([title.replace("_", " "), parameters, trained, parameters - trained, giga])
    dead = dead_parameters(model)
    rows.append(["dead in the authors' code", dead])
    rows.append(["total in the authors' code", analysis.parameters[""] + dead])
    return [["", "parameters", "trained", "frozen", "G multiply-adds"], *rows]


def split_stage(counts: Counter, stage: int) -> dict[str, int]:
    """Counts of ``PARTS`` in a stage, each without the parts within it."""
    prefix, own = f"decoder.stages.{stage}", {}
    for part in sorted(PARTS, key=len, reverse=True):
        within = sum(count for other, count in own.items() if other.startswith(part))
        own[part] = counts[f"{prefix}.{part}".rstrip(".")] - within
    return own


def stage_table(counts: Counter, num_stages: int, unit: float) -> list[list]:
    """Counts of ``PARTS`` in all stages together and in each, in units of ``unit``."""
    stages = [split_stage(counts, stage) for stage in range(num_stages)]
    found = {name: [stage[part] for stage in stages] for part, name in PARTS.items()}
    found["total"] = [sum(stage.values()) for stage in stages]
    rows = [
        [name, sum(row) / unit, *(count / unit for count in row)]
        for name, row in found.items()
        if any(row)
    ]
    return [["", "all stages", *range(num_stages)], *rows]


def filter_table(model: StageInteractor, analysis: Analysis) -> list[list]:
    """Multiply-adds of generating a channel filter and of mixing with it, stage by stage.

    The formula counts multiplications and additions apart, and no bias.
    """
    rows = []
    for stage, part in enumerate(model.decoder.stages):
        mixing, name = part.mixing, f"decoder.stages.{stage}.mixing"
        points, dim = mixing.num_points, mixing.group_dim
        content = mixing.filter_generator.in_features
        share = mixing.filter_sizes[0] / sum(mixing.filter_sizes)
        generation = analysis.multiply_adds[f"{name}.filter_generator"] * share
        products = {
            operator: count
            for operator, count in analysis.operators[name].items()
            if operator.startswith("product")
        }
        if len(products) < 2:  # spatial mixing has the same sizes: there is no telling them apart
            continue
        mixings = 1 + len(part.reused)
        one = products[f"product {points}x{dim}x{dim}"] / mixings
        formula = (2 * content - 1) * dim**2 / (points * (2 * dim - 1) * dim)
        giga = generation / 1e9, one / 1e9
        rows.append([stage, points, *giga, generation / one, formula, mixings])
    costs = ["generating it", "one mixing", "ratio", "paper's formula"]
    return [["stage", "points", *costs, "mixings"], *rows]


def static_table(model: StageInteractor) -> list[list]:
    """Parameters of one static mixing for each number of points in the model."""
    rows = []
    dim = model.decoder.stages[0].mixing.group_dim
    for points in sorted({stage.mixing.num_points for stage in model.decoder.stages}):
        static = StaticMixing(num_points=points, group_dim=dim)
        first, sub = static.num_first, static.num_subpoints
        weights = static.across.weight.numel() + static.within.weight.numel()
        biases = count_parameters(static)[0] - weights
        cost, bound = (sub**2 + first**2) * dim**2, 3 * points * dim**2
        rows.append([points, sub, first, weights, biases, cost, bound])
    header = ["points P", "K", "P/K", "weights", "biases", "(K^2 + (P/K)^2) Dc^2", "3 P Dc^2"]
    return [header, *rows]


def config_table() -> list[list]:
    """The configs with what their docstrings begin with."""
    rows = []
    for path in sorted(CONFIGS.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or "-"
        what, ap, where = SUMMARY.fullmatch(docstring.splitlines()[0]).groups()
        rows.append([path.name, what.replace("``", ""), ap or "-", where or "-"])
    return [["config", "model and schedule", "AP in the paper", "where"], *rows]


def show(title: str, table: list[list]):
    """Print a table whose first row is its header."""
    print(f"\n{title}\n\n{tabulate(table, 'firstrow', floatfmt='.3f', intfmt=',')}")


def describe(config_file: str, overrides: list[str], size: tuple[int, int]):
    """Print all tables of a model.

    Raises:
        UserError: a config that cannot be used or an image without pixels.
    """
    if min(size) < 1:
        raise UserError("--size takes the height and the width of the image in pixels")
    cfg = load_config(config_file, overrides)
    if "model" not in cfg:
        raise UserError(f"{config_file} has no model: choose one of those listed without arguments")
    with explain_misfits("model"):
        model = instantiate(cfg.model)
    if not isinstance(model, StageInteractor):  # a peer of another design, from Detectron2
        show(f"{config_file}: multiply-adds are counted in StageInteractor and AdaMixer only",
             parameter_table(model))
        return
    analysis, num_stages = analyze(model, size), len(model.decoder.stages)
    show(f"{config_file}, an image of {size[0]} x {size[1]}", part_table(model, analysis))
    show("Parameters by stage, M", stage_table(analysis.parameters, num_stages, 1e6))
    show("Multiply-adds by stage, G", stage_table(analysis.multiply_adds, num_stages, 1e9))
    show("A channel filter's multiply-adds, G (supplement F)", filter_table(model, analysis))
    if any(isinstance(module, StaticMixing) for module in model.modules()):
        show("Parameters of one static mixing (supplement A)", static_table(model))
    names = sorted(name.partition("::")[2] for name in analysis.not_counted)
    print(f"\nNot counted: norms, {', '.join(names)}")


@_start.command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1280), metavar=("H", "W"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    if args.config_file or args.overrides:
        describe(args.config_file, args.overrides, tuple(args.size))
    else:
        show("Configs in projects/stageinteractor/configs", config_table())


if __name__ == "__main__":
    main()
