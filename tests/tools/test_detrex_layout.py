"""`projects/stageinteractor/` in a detrex checkout trains and evaluates with its train_net.py.

`tests/support/detrex_checkout/` stands in for detrex 0.5.0, which cannot be installed everywhere:
the files that our folder and a run meet, with detrex's names, fields, defaults and order of calls.
"""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import convert
import numpy as np
import pytest
import torch
import train_net
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate

from projects.stageinteractor.config.overrides import load_config
from support.released_files import light_state, save_released
from support.runs import environment, metrics, overrides
from support.shapes import make_shapes
from support.zoo_names import detectron2_name

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = "projects/stageinteractor/configs"
SITE = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]

# At the end of every run there: of this repository, nothing is loaded or can be imported.
ALONE = f"""
import sys
from pathlib import Path
import projects
assert {{Path(folder).resolve() for folder in projects.__path__}} == {{Path("projects").resolve()}}
files = [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
places = map(Path.resolve, map(Path, [*files, *sys.path]))
ours = [p for p in places if Path({str(ROOT)!r}) in (p, *p.parents)
        and not {{"site-packages", "dist-packages"}} & {{*p.parts}}]
assert not ours, ours
"""

# As `python tools/train_net.py ARGUMENTS`, several times in one process.
TRAIN_NET = """
import json, runpy, sys
sys.path[0] = "tools"
for arguments in map(json.loads, sys.argv[1:]):
    sys.argv = ["tools/train_net.py", *arguments]
    runpy.run_path("tools/train_net.py", run_name="__main__")
""" + ALONE

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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A detrex checkout with our folder in it, and drawn shapes beside it."""
    folder = tmp_path_factory.mktemp("detrex")
    shutil.copytree(ROOT / "tests/support/detrex_checkout", folder, dirs_exist_ok=True)
    shutil.copytree(ROOT / "projects/stageinteractor", folder / "projects/stageinteractor")
    make_shapes(folder / "shapes")
    return folder


def python(checkout, script, *arguments, expect=0):
    """What a script prints that Python runs in the checkout, which is installed editably.

    Without `site`, which would make this repository importable where it is installed so.
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *arguments], cwd=checkout, text=True, timeout=300,
        env={**environment(), "PYTHONPATH": os.pathsep.join([*SITE, str(checkout)])},
        capture_output=True,
    )
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def arguments(checkout, name, output, *flags, **options):
    """Of detrex's train_net.py, for a tiny variant of a config."""
    keys = overrides(checkout / "shapes/annotations.json", output, **options)
    return json.dumps([*flags, "--config-file", f"{CONFIGS}/{name}.py", *keys])


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
    files = {f"dataloader.{split}.dataset.{key}": None
             for split in ("train", "test") for key in ("json_file", "image_root")}
    printed, rows = run_resume_evaluate(checkout, "mine", "mine", False, **files)
    check_run(checkout, "mine", printed, rows)


@pytest.mark.slow
def test_options_of_detrex_work_there(checkout):
    """float16, no clipping, the moving average, and the quick run."""
    name, average = "stageinteractor_lite0_trees", "train.model_ema"
    ema = {f"{average}.enabled": "true", f"{average}.device": "cpu"}
    last = {"train.init_checkpoint": "ema/model_final.pth"}
    python(
        checkout, TRAIN_NET,
        arguments(checkout, name, "amp", **{"train.amp.enabled": "true"}),
        arguments(checkout, name, "amp", "--resume",
                  **{"train.amp.enabled": "true", "train.max_iter": 8}),
        arguments(checkout, name, "unclipped", **{"train.clip_grad.enabled": "false"}),
        arguments(checkout, name, "ema", **ema),
        arguments(checkout, name, "ema", "--resume", **{"train.max_iter": 8, **ema}),
        arguments(checkout, name, "evaluated", "--eval-only", **{
            f"{average}.use_ema_weights_for_eval_only": "true", **ema, **last}),
        arguments(checkout, name, "quick", **{"train.fast_dev_run.enabled": "true"}),
    )
    for output, steps in {"amp": 8, "unclipped": 6, "ema": 8, "quick": 20}.items():
        rows = [row for row in metrics(checkout / output) if "lr" in row]
        assert [row["iteration"] for row in rows] == [*range(steps)]
        assert np.isfinite([row["total_loss"] for row in rows]).all()
    assert "grad_scaler" in load(checkout / "amp/model_final.pth")["trainer"]
    saved = load(checkout / "ema/model_final.pth")
    weight = "decoder.stages.0.class_head.3.weight"
    difference = (saved["ema_state"][weight] - saved["model"][weight]).abs().max()
    assert 0 < difference < 1


@pytest.mark.slow
def test_the_moving_average_needs_its_device_there(checkout):
    """detrex looks for `model.device` otherwise, which the docs say."""
    line = arguments(checkout, "stageinteractor_lite0_trees", "no_device",
                     **{"train.model_ema.enabled": "true"})
    assert "Missing key device" in python(checkout, TRAIN_NET, line, expect=1)


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


# ---- checkpoints, which detrex loads with Detectron2's own checkpointer


def load(file):
    return torch.load(file, map_location="cpu", weights_only=True)


def small_decoder(name):
    """The model of a config, whose backbone is whole."""
    options = ["points_per_stage=[4]", "out_points=4", "embed_dim=32", "feature_dim=32",
               "ffn_dim=8", "first_reuse_stage=1"]
    return instantiate(load_config(
        str(ROOT / CONFIGS / f"{name}.py"), [f"model.decoder.{option}" for option in options]
    ).model)


def not_loaded(model, expected, file, query=""):
    """Names of weights that are not what is expected after a file was loaded."""
    DetectionCheckpointer(model).load(f"{file}{query}")
    state = model.state_dict()
    return {name for name, value in expected.items() if not torch.equal(state[name], value)}


def drawn_backbone(model):
    """Other values for the weights of a backbone, by their names in the model."""
    return {name: torch.rand_like(value) for name, value in model.state_dict().items()
            if name.startswith("backbone.") and value.is_floating_point()}


def torchvision_name(name):
    """Of a weight in a ResNet of Detectron2."""
    name = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", name.removeprefix("stem."))
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    return re.sub(r"conv(\d)\.norm", r"bn\1", name)


def test_the_r50_of_the_model_zoo_fills_the_backbone(tmp_path):
    model = small_decoder("stageinteractor_r50_12ep")
    expected = drawn_backbone(model)
    weights = {name.removeprefix("backbone."): v.numpy() for name, v in expected.items()}
    weights |= {"stem.fc.weight": np.zeros((1000, 2048)), "stem.fc.bias": np.zeros(1000)}
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps(
        {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    ))
    assert not_loaded(model, expected, file) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["stageinteractor_lite0_trees", "stageinteractor_swin_s_300q_36ep"]
)
def test_timm_and_swin_fill_the_backbone_by_the_ends_of_their_names(name, tmp_path):
    model = small_decoder(name)
    expected = drawn_backbone(model)
    weights = {re.sub(r"^backbone\.(body\.)?", "", name): v for name, v in expected.items()}
    weights |= {"norm.weight": torch.zeros(768), "head.weight": torch.zeros(1000, 768)}
    torch.save({"model": weights}, tmp_path / "model.pth")
    assert not_loaded(model, expected, tmp_path / "model.pth", "?matching_heuristics=True") == set()
    # prepare_trees.py writes that into the file of the small model; Swin's has to be asked so.
    assert len(not_loaded(small_decoder(name), expected, tmp_path / "model.pth")) > 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["stageinteractor_r101_300q_36ep", "stageinteractor_x101_dcn_300q_36ep"]
)
def test_a_file_of_torchvision_has_to_be_renamed_first(name, tmp_path):
    """As Detectron2's `convert-torchvision-to-d2.py` does it."""
    model = small_decoder(name)
    expected = {name: value for name, value in drawn_backbone(model).items()
                if ".offset." not in name}
    weights = {torchvision_name(name.removeprefix("backbone.")): value
               for name, value in expected.items()}
    torch.save(weights, tmp_path / "raw.pth")
    for query in ("", "?matching_heuristics=True"):
        assert len(not_loaded(model, expected, tmp_path / "raw.pth", query)) > 400
    renamed = {"model": {detectron2_name(name): v.numpy() for name, v in weights.items()}}
    (tmp_path / "renamed.pkl").write_bytes(pickle.dumps(
        {**renamed, "__author__": "torchvision", "matching_heuristics": True}
    ))
    assert not_loaded(model, expected, tmp_path / "renamed.pkl") == set()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["r50", "swin_s"])
def test_a_released_checkpoint_loads_once_it_is_converted(backbone, tmp_path):
    released = save_released(tmp_path, light_state(backbone))
    file = tmp_path / "here.pth"
    convert.main(["checkpoint", released, str(file)])
    name = "r50_12ep" if backbone == "r50" else "swin_s_300q_36ep"
    cfg = load_config(str(ROOT / CONFIGS / f"stageinteractor_{name}.py"), [])
    model = instantiate(cfg.model)
    with pytest.raises(ValueError, match="Unsupported type found in checkpoint"):
        DetectionCheckpointer(model).load(released)
    expected = load(file)["model"]
    assert not_loaded(model, expected, file) == set()
    lost = set(model.state_dict()) - set(expected)
    assert all(name.endswith(("num_batches_tracked", "relative_position_index")) for name in lost)
