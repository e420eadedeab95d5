"""detrex's other tools work on our configs, and its layers in our stages: detrex must be there."""

import json
import re

import pytest
import torch
from detectron2.config import instantiate

from projects.stageinteractor.config.overrides import load_config
from support.detrex import needs_detrex
from support.detrex_runs import CONFIGS, FILES, ROOT, TRAIN_NET, arguments, check_steps, python

pytestmark = needs_detrex

TOOL = """
import runpy, sys
sys.path[0] = "tools"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def tool(checkout, name, *flags, **options):
    line = json.loads(arguments(checkout, "stageinteractor_lite0_trees", "tools", **options))
    return python(checkout, TOOL, f"tools/{name}.py", *flags, *line)


@pytest.mark.slow
def test_the_model_is_analyzed_there(checkout):
    """Multiply-adds, activations, parameters and structure."""
    options = {"train.init_checkpoint": "", "dataloader.test.num_workers": 0}
    printed = tool(checkout, "analyze_model", "-n", "2", "--tasks", "flop", "activation",
                   "parameter", "structure", **options)
    assert float(re.search(r"Total GFlops: ([\d.]+)", printed)[1]) > 0
    assert float(re.search(r"Total \(Million\) Activations: ([\d.]+)", printed)[1]) > 0
    assert "decoder.stages.0" in printed and "(box_head)" in printed


@pytest.mark.slow
def test_the_data_is_drawn_there(checkout):
    two_batches = """
import itertools
from projects.stageinteractor.data import loader
endless = loader.TrainingLoader.__iter__
loader.TrainingLoader.__iter__ = lambda self: itertools.islice(endless(self), 2)
"""
    keys = json.loads(arguments(checkout, "stageinteractor_lite0_trees", "drawn"))[2:]
    python(checkout, two_batches + TOOL, "tools/visualize_data.py", "--source", "dataloader",
           "--config-file", f"{CONFIGS}/stageinteractor_lite0_trees.py", "--output-dir", "drawn",
           *keys)
    assert len([*(checkout / "drawn").glob("*.jpg")]) >= 2


# ---- detrex's attention and feed-forward network in a stage


# Names of our weights, and of the same ones in detrex's parts.
PARTS = {
    "attention.in_proj.": "attention.attention.attn.in_proj_",
    "attention.out_proj.": "attention.attention.attn.out_proj.",
    "ffn.layers.0.": "ffn.layers.0.0.",
    "ffn.layers.2.": "ffn.layers.1.",
}


def renamed(name):
    for ours, theirs in PARTS.items():
        name = name.replace(ours, theirs)
    return name


def test_the_config_with_detrex_own_parts_computes_the_same():
    """In float64, since rounding can move a sampling point to another cell: outputs, gradients."""
    ours, theirs = (
        instantiate(load_config(str(ROOT / CONFIGS / folder / "stageinteractor_r50_12ep.py"), [
            f"model.decoder.{key}" for key in ("points_per_stage=[8,8,8]", "out_points=8",
                                               "embed_dim=64", "feature_dim=64", "ffn_dim=96")
        ]).model.decoder).double() for folder in ("", "detrex_parts")
    )
    for weight in ours.parameters():  # those that start at zero, too
        weight.data += 0.05 * torch.randn_like(weight)
    theirs.load_state_dict({renamed(name): value for name, value in ours.state_dict().items()})
    content = torch.randn(2, 20, 64).double()
    xyzr = torch.tensor([64.0, 64, 5, 0]) + 4 * torch.rand(2, 20, 4).double()
    maps = [torch.randn(2, 64, 128 // stride, 128 // stride).double() for stride in (4, 8, 16, 32)]

    for one, other in zip(ours(content, xyzr, maps), theirs(content, xyzr, maps)):
        torch.testing.assert_close(other, one)
        weights = torch.randn_like(one)
        for outputs in (one, other):
            (outputs * weights).sum().backward(retain_graph=True)
    learned = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(learned[renamed(name)].grad, weight.grad)

    with torch.no_grad():
        for one, other in zip(*(model.eval()(content, xyzr, maps) for model in (ours, theirs))):
            torch.testing.assert_close(other, one)


@pytest.mark.slow
def test_the_config_with_detrex_own_parts_trains_there(checkout):
    line = arguments(checkout, "detrex_parts/stageinteractor_r50_12ep", "parts", **FILES, **{
        "dataloader.train.dataset.names": "shapes", "dataloader.test.dataset.names": "shapes",
        "train.max_iter": 2, "train.eval_period": 0, "train.log_period": 1,
        "dataloader.train.num_workers": 0, "dataloader.test.num_workers": 0,
        "dataloader.train.mapper.augmentations": "[]", "dataloader.test.mapper.augmentations": "[]",
        "model.neck.num_groups": 8, "model.backbone.freeze_at": 5,
    })
    register = """
from detectron2.data.datasets import register_coco_instances
register_coco_instances("shapes", {}, "shapes/annotations.json", "shapes/images")
"""
    python(checkout, register + TRAIN_NET, line)
    check_steps(checkout, {"parts": 2})
