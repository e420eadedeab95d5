"""`projects/stageinteractor/` in a detrex checkout trains and evaluates with its train_net.py.

The checkout is detrex's own if DETREX_CHECKOUT names one, otherwise a stand-in, see
tests/support/detrex.py.
"""

import ast
import json
import re

import numpy as np
import pytest
import torch
import train_net

from support.detrex import CHECKOUT
from support.detrex_runs import (
    ALONE,
    CONFIGS,
    FILES,
    ROOT,
    TRAIN_NET,
    arguments,
    check_steps,
    load,
    python,
)
from support.runs import metrics

# Configs whose models are made, of those that differ in more than numbers.
MODELS = (
    "stageinteractor_r50_12ep",
    "stageinteractor_x101_dcn_300q_36ep",
    "stageinteractor_swin_s_300q_36ep",
    "adamixer_r50_12ep",
    "stageinteractor_lite0_trees",
    "retinanet_lite0_bccd",
)

LOAD_ALL = f"""
import torch
from detectron2.config import LazyConfig, instantiate
from pathlib import Path

for path in sorted(Path("{CONFIGS}").glob("*.py")):
    cfg = LazyConfig.load(str(path))
    train = cfg.train
    assert (train.device, train.checkpointer.max_to_keep) == ("cuda", 100), "not detrex's"
    instantiate(cfg.dataloader.train.mapper), instantiate(cfg.dataloader.test.mapper)
    factor = instantiate(cfg.lr_multiplier)
    if path.stem in {MODELS}:
        device = "meta"  # no memory for weights, and no time
        if "swin" in path.stem:  # not possible there
            device = "cpu"
            cfg.model.backbone.depths, cfg.model.decoder.points_per_stage = [1, 1, 1, 1], [4]
        with torch.device(device):
            cfg.optimizer.params.model = instantiate(cfg.model)
        decay = {{group["weight_decay"] for group in instantiate(cfg.optimizer).param_groups}}
        assert decay == ({{0, 1e-4}} if "swin" in path.stem else {{1e-4}}), decay
    if path.stem == "stageinteractor_r50_12ep":
        steps = 0, 250, 500, 8 * 7330 - 1, 8 * 7330, 11 * 7330
        print([round(factor(step / train.max_iter), 4) for step in steps])
    print(path)
""" + ALONE


@pytest.mark.slow
def test_every_config_loads_there(checkout):
    printed = python(checkout, LOAD_ALL).splitlines()
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / CONFIGS).glob("*.py")}
    assert configs <= {*printed} and len(configs) > 20
    # Warm-up over 500 steps from a thousandth, then a tenth after 8 and 11 epochs of COCO.
    assert "[0.001, 0.5005, 1, 1, 0.1, 0.01]" in printed


def run_resume_evaluate(checkout, name, output, in_one_process, **options):
    """Train four steps, go on to the tenth, evaluate: what the last prints, and the metrics."""
    stages = [
        arguments(checkout, name, output, **{"train.max_iter": 4, **options}),
        arguments(checkout, name, output, "--resume", **{"train.max_iter": 10, **options}),
        arguments(
            checkout, name, output, "--eval-only",
            **{"train.init_checkpoint": f"{output}/model_final.pth", **options},
        ),
    ]
    commands = [stages] if in_one_process else [[stage] for stage in stages]
    printed = [python(checkout, TRAIN_NET, *command) for command in commands]
    assert "Starting training from iteration 4" in "".join(printed)
    return printed[-1], metrics(checkout / output)


def check_run(checkout, output, printed, rows):
    steps = [row for row in rows if "lr" in row]
    assert [row["iteration"] for row in steps] == [*range(10)]
    losses = [{k: v for k, v in row.items() if "_loss_" in k} for row in steps]
    assert all(len(row) == 9 and np.isfinite(list(row.values())).all() for row in losses)
    # The schedule of the config is relative to train.max_iter, with steps down at 80 and 95 %.
    factors = [0.001] + 7 * [1] + 2 * [0.1]
    assert np.allclose([row["lr"] for row in steps], np.multiply(factors, 3e-4))
    evaluations = [row for row in rows if "bbox/AP" in row]
    assert [row["iteration"] for row in evaluations] == [2, 4, 5, 8, 10]
    folder = checkout / output
    assert {f"model_000000{i}.pth" for i in (1, 3, 5, 7, 9)} <= {f.name for f in folder.iterdir()}
    assert same_figures(printed_figures(printed), evaluations[-1])


def printed_figures(text):
    """What --eval-only prints at its end."""
    last = re.findall(r"^OrderedDict\((.*)\)$", text, re.M)[-1]
    return dict(ast.literal_eval(last.replace("nan", "None")))["bbox"]


def same_figures(figures, row):
    """Whether they are those of a row of metrics.json: six, and one a class."""
    logged = {key.removeprefix("bbox/"): row[key] for key in row if key.startswith("bbox/")}
    assert len(logged) == 9 and logged.keys() == figures.keys()
    as_numbers = [np.array([row[key] for key in logged], dtype=float) for row in (figures, logged)]
    return np.allclose(*as_numbers, atol=0.01, equal_nan=True)


@pytest.mark.skipif(
    torch.__version__ < "2.10", reason="torch 2.6 loads no checkpoint of detrex again: README.md"
)
def test_a_run_is_trained_resumed_and_evaluated_there(checkout):
    printed, rows = run_resume_evaluate(checkout, "stageinteractor_lite0_trees", "run", True)
    check_run(checkout, "run", printed, rows)


# A person's own data, as detrex's documentation has it: registered in a config.
MINE = """
from detectron2.config import LazyCall as L
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances

from projects.stageinteractor.data import training_dicts

from .adamixer_lite0_bccd import dataloader, lr_multiplier, model, optimizer, train

for name in ("shapes_train", "shapes_val"):
    register_coco_instances(name, {}, "shapes/annotations.json", "shapes/images")
dataloader.train.dataset = L(training_dicts)(names="shapes_train")
dataloader.test.dataset = L(get_detection_dataset_dicts)(names="shapes_val", filter_empty=False)
dataloader.evaluator.dataset_name = "shapes_val"
"""


@pytest.mark.slow
def test_adamixer_on_registered_data_runs_there_command_by_command(checkout):
    (checkout / CONFIGS / "mine.py").write_text(MINE)
    printed, rows = run_resume_evaluate(checkout, "mine", "mine", False, **FILES)
    check_run(checkout, "mine", printed, rows)


@pytest.mark.slow
@pytest.mark.skipif(bool(CHECKOUT), reason="mixed precision of detrex itself needs CUDA")
def test_mixed_precision_works_there(checkout):
    name, amp = "stageinteractor_lite0_trees", {"train.amp.enabled": "true"}
    python(
        checkout, TRAIN_NET, arguments(checkout, name, "amp", **amp),
        arguments(checkout, name, "amp", "--resume", **amp, **{"train.max_iter": 8}),
    )
    check_steps(checkout, {"amp": 8})
    assert "grad_scaler" in load(checkout / "amp/model_final.pth")["trainer"]


@pytest.mark.slow
def test_options_of_detrex_work_there(checkout):
    """No clipping, the moving average, on the model's device by itself, and the quick run."""
    name, average = "stageinteractor_lite0_trees", "train.model_ema"
    ema = {f"{average}.enabled": "true"}
    last = {"train.init_checkpoint": "ema/model_final.pth"}
    python(
        checkout, TRAIN_NET,
        arguments(checkout, name, "unclipped", **{"train.clip_grad.enabled": "false"}),
        arguments(checkout, name, "ema", **ema),
        arguments(checkout, name, "ema", "--resume", **{"train.max_iter": 8, **ema}),
        arguments(checkout, name, "evaluated", "--eval-only", **{
            f"{average}.use_ema_weights_for_eval_only": "true", **ema, **last}),
        arguments(checkout, name, "quick", **{"train.fast_dev_run.enabled": "true"}),
    )
    check_steps(checkout, {"unclipped": 6, "ema": 8, "quick": 20})
    saved = load(checkout / "ema/model_final.pth")
    weight = "decoder.stages.0.class_head.3.weight"
    difference = (saved["ema_state"][weight] - saved["model"][weight]).abs().max()
    assert 0 < difference < 1


# Files of one's own, in a config that names them in `dataset`.
OWN = {"dataset.train": "shapes/annotations.json", "dataset.val": "shapes/annotations.json",
       "dataset.images": "shapes/images"}


@pytest.mark.slow
def test_files_in_dataset_are_trained_on_and_evaluated_there(checkout):
    line = arguments(checkout, "stageinteractor_lite0_bccd", "own", **FILES, **OWN)
    printed = python(checkout, TRAIN_NET, line)
    assert metrics(checkout / "own")[-1]["bbox/AP"] >= 0
    assert "shapes/annotations.json" in printed


@pytest.mark.slow
@pytest.mark.parametrize("key", [
    "dataset.train=other.json", "train.epochs=3", "train.scale_lr.enabled=true",
    "train.accumulation_steps=2", "dataset.val=other.json",
])
def test_what_has_no_effect_there_is_refused(key, checkout):
    """Before the first step, or before the figures of another data set."""
    name, value = key.split("=")
    line = arguments(checkout, "stageinteractor_lite0_trees", name, **{
        name: value, "train.eval_period": 1, "train.checkpointer.period": 100})
    printed = python(checkout, TRAIN_NET, line, expect=1)
    assert re.search(rf"UserError: {name.removesuffix('.enabled')}\b", printed)
    steps = checkout / name / "metrics.json"  # which a writer may have opened
    assert name == "dataset.val" or not steps.exists() or not steps.read_text()
    assert not (checkout / name / "coco_instances_results.json").exists()


# A config of somebody else's project, outside our folder.
OUTSIDE = """
import sys
from detectron2.config import LazyConfig, instantiate

cfg = LazyConfig.load("projects/mine/configs/mine.py")
assert cfg.model.query_generator.num_queries == 7 and cfg.train.max_iter == 3
assert cfg.train.device == "cuda", "not detrex's"
print("warm-up:", cfg.lr_multiplier.warmup_length, type(instantiate(cfg.dataloader.train.mapper)))
"""
IMPORTS = """
from projects.stageinteractor.configs.stageinteractor_r50_12ep import (
    dataloader, lr_multiplier, model, optimizer, train
)

model.query_generator.num_queries = 7
train.max_iter = 3
"""


@pytest.mark.slow
def test_a_config_outside_the_folder_imports_ours(checkout):
    (checkout / "projects/mine/configs").mkdir(parents=True)
    (checkout / "projects/mine/configs/mine.py").write_text(IMPORTS)
    script = "sys_path = __import__('sys').path; sys_path.insert(0, '.')" + OUTSIDE + ALONE
    assert re.search(r"warm-up: \S+ <class .*Mapper'>", python(checkout, script))


@pytest.mark.slow
def test_what_learns_there_is_evaluated_alike_here(checkout, monkeypatch):
    options = {
        "train.max_iter": 120,
        "train.eval_period": 1000,
        "train.checkpointer.period": 1000,
        "optimizer.lr": 3e-3,
        "lr_multiplier.scheduler.milestones": "[90,95]",
        "model.backbone.frozen_modules": "[]",
        "dataloader.train.total_batch_size": 4,
        "dataloader.train.mapper.augmentations": "[]",
    }
    name, trained = "stageinteractor_lite0_trees", checkout / "learned/model_final.pth"
    evaluation = {**options, "train.init_checkpoint": trained}
    printed = python(
        checkout, TRAIN_NET, arguments(checkout, name, "learned", **options),
        arguments(checkout, name, "there", "--eval-only", **evaluation),
    )
    logged = metrics(checkout / "learned")[-1]
    assert logged["bbox/AP"] > 20
    assert same_figures(printed_figures(printed), logged)
    monkeypatch.chdir(ROOT)
    here = json.loads(arguments(checkout, name, checkout / "here", "--eval-only", **evaluation))
    cfg, _ = train_net.load_run_config(train_net.parse_arguments(here))
    assert same_figures(train_net.evaluate_only(cfg)["bbox"], logged)
