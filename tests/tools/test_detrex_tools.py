"""detrex's other tools work on our configs, and its layers in our stages: detrex must be there."""

import json
import re

import pytest
import torch

from support.detrex import needs_detrex
from support.detrex_runs import CONFIGS, FILES, TRAIN_NET, arguments, check_steps, python

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


def test_detrex_own_parts_compute_the_same():
    from projects.stageinteractor.modeling.attention import IoFSelfAttention
    from projects.stageinteractor.modeling.stage import FeedForward
    from projects.stageinteractor.plugins import detrex_parts

    content, xyzr = torch.randn(2, 20, 64), torch.rand(2, 20, 4) * 4
    ours, theirs = IoFSelfAttention(64, 8), detrex_parts.MultiheadIoFAttention(64, 8)
    inside = theirs.attention.attn
    with torch.no_grad():
        ours.out_proj.bias.normal_()
        for theirs_, ours_ in (
            (inside.in_proj_weight, ours.in_proj.weight), (inside.in_proj_bias, ours.in_proj.bias),
            (inside.out_proj.weight, ours.out_proj.weight),
            (inside.out_proj.bias, ours.out_proj.bias), (theirs.iof_tau, ours.iof_tau),
        ):
            theirs_.copy_(ours_)
    torch.testing.assert_close(theirs(content, xyzr), ours(content, xyzr), rtol=1e-6, atol=1e-6)

    ours, theirs = FeedForward(64, 96), detrex_parts.NormalizedFFN(64, 96)
    for index, layer in ((0, theirs.layers[0][0]), (2, theirs.layers[1])):
        layer.load_state_dict(ours.layers[index].state_dict())
    assert torch.equal(theirs(content), ours(content))


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
