"""Training and evaluation through the real command line, on drawn shapes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from shapes import make_shapes

from projects.stageinteractor.engine import Trainer
from projects.stageinteractor.errors import UserError
from tools import train_net

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "projects/stageinteractor/configs/stageinteractor_lite0_trees.py"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), images=6, size=(64, 96), empty=True)


def overrides(annotations, output, **extra):
    """The small configuration made tiny, on the shapes, without pretrained weights."""
    options = {
        "train.output_dir": output,
        "train.init_checkpoint": "''",
        "train.max_iter": 6,
        "train.eval_period": 3,
        "train.checkpointer.period": 2,
        "train.log_period": 1,
        "train.device": "cpu",
        "model.decoder.num_classes": 3,
        "model.decoder.points_per_stage": "[8,8,8]",
        "model.decoder.embed_dim": 32,
        "model.decoder.feature_dim": 16,
        "model.query_generator.num_queries": 10,
        "dataloader.train.total_batch_size": 2,
        **{
            f"dataloader.{split}.dataset.{key}": value
            for split in ("train", "test")
            for key, value in (
                ("json_file", annotations),
                ("image_root", annotations.parent / "images"),
            )
        },
        **extra,
    }
    return [f"{key}={value}" for key, value in options.items()]


def command(*arguments, launcher=(sys.executable,)):
    return [*launcher, "tools/train_net.py", "--config-file", CONFIG, *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(*arguments, launcher=(sys.executable,), expect=0):
    done = subprocess.run(
        command(*arguments, launcher=launcher),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_train_kill_resume_evaluate(shapes, tmp_path):
    """A killed run goes on where its last checkpoint was; its result evaluates alone."""
    options = overrides(shapes, tmp_path, **{"train.max_iter": 1000, "train.eval_period": 0})
    process = subprocess.Popen(
        command(*options), cwd=ROOT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "model_0000003.pth").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()

    checkpoint = tmp_path / (tmp_path / "last_checkpoint").read_text()
    done = torch.load(checkpoint, weights_only=True)["trainer"]["iteration"] + 1
    options = overrides(shapes, tmp_path, **{"train.max_iter": done + 3})
    text = run("--resume", *options)
    assert f"Starting training from iteration {done}" in text
    assert "eta: " in text
    last = metrics(tmp_path)[-1]
    assert last["iteration"] >= done + 2 and "bbox/AP" in last
    assert (tmp_path / "model_final.pth").exists() and (tmp_path / "model_best.pth").exists()

    text = run(
        "--eval-only",
        *overrides(shapes, tmp_path / "eval", **{
            "train.init_checkpoint": tmp_path / "model_final.pth"
        }),
    )
    evaluated = text[text.index("copypaste: AP,"):].splitlines()[1].split("copypaste: ")[1]
    assert float(evaluated.split(",")[0]) == pytest.approx(last["bbox/AP"], abs=1e-3)
    assert (tmp_path / "eval" / "coco_instances_results.json").exists()


def test_fast_dev_run_does_everything_with_every_option(shapes, tmp_path):
    """Training, evaluation, checkpoints; mixed precision, accumulation, clipping, EMA."""
    text = run(
        *overrides(shapes, tmp_path, **{
            "train.max_iter": 100000,
            "train.fast_dev_run.enabled": "true",
            "train.amp.enabled": "true",
            "train.accumulation_steps": 2,
            "train.model_ema.enabled": "true",
            "optimizer.params.lr_factor_func.factor": 0.5,
        })
    )
    assert "Starting training from iteration 0" in text
    recorded = metrics(tmp_path)
    assert recorded[-1]["iteration"] == 4 and "bbox/AP" in recorded[-1]
    for key in ("total_loss", "stage2_loss_giou", "lr", "grad_norm", "labels/kept", "data_time"):
        assert key in recorded[0], key
    assert list(tmp_path.glob("events.out.tfevents*"))
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert {"model", "model_ema", "trainer"} <= state.keys()
    options = {"train.init_checkpoint": tmp_path / "model_final.pth"}
    ema = {**options, "train.model_ema.enabled": "true"}
    for extra in (options, ema):
        assert "copypaste" in run("--eval-only", *overrides(shapes, tmp_path / "eval", **extra))


@pytest.mark.parametrize("launch", ["--num-gpus", "torchrun"])
def test_two_processes(shapes, tmp_path, launch):
    """Both ways to start them; each process works on its share of the batch."""
    options = overrides(shapes, tmp_path, **{"train.max_iter": 3, "train.eval_period": 3})
    if launch == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        text = run(*options, launcher=[*torchrun, "--nproc-per-node=2"])
    else:
        text = run("--num-gpus", 2, *options)
    assert "World size: 2" in text
    assert "bbox/AP" in metrics(tmp_path)[-1]
    assert (tmp_path / "log.txt.rank1").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.max_itr=3"], "error: unknown config key train.max_itr: did you mean"),
        (["train.amp.dtype=half"], "error: train.amp.dtype=half: choose bfloat16 or float16"),
        (["model.decoder.num_classes=4"], "has 3 classes: rectangle, circle, triangle"),
        (["--eval-only", "train.init_checkpoint=no.pth"], "error: no checkpoint no.pth"),
        (["dataloader.train.dataset.json_file=no.json"], "error: no annotation file no.json"),
    ],
)
def test_mistakes_end_without_a_traceback(shapes, tmp_path, arguments, message):
    flags = [argument for argument in arguments if argument.startswith("--")]
    keys = [argument for argument in arguments if not argument.startswith("--")]
    text = run(*flags, *overrides(shapes, tmp_path), *keys, expect=1)
    assert message in text and "Traceback" not in text


def test_missing_coco_says_where_it_was_looked_for(tmp_path):
    config = "projects/stageinteractor/configs/stageinteractor_r50_12ep.py"
    done = subprocess.run(
        [sys.executable, "tools/train_net.py", "--config-file", config],
        cwd=ROOT, env={**environment(), "DETECTRON2_DATASETS": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"DETECTRON2_DATASETS={tmp_path} must hold coco/annotations" in done.stderr


def test_wandb_gets_what_tensorboard_gets(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **k: calls.append(k)))
    options = OmegaConf.create({"wandb": {"params": {"project": "p", "name": None}}})
    train_net.start_wandb(options)
    assert calls == [{"sync_tensorboard": True, "project": "p", "name": None}]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train_net.start_wandb(options)


def test_an_average_that_is_not_in_the_checkpoint_is_not_evaluated(shapes, tmp_path):
    """Rather than weights that were never trained."""
    torch.save({"model": {}}, tmp_path / "plain.pth")
    extra = {"train.init_checkpoint": tmp_path / "plain.pth", "train.model_ema.enabled": "true"}
    text = run("--eval-only", *overrides(shapes, tmp_path, **extra), expect=1)
    assert "plain.pth has no moving average" in text and "Traceback" not in text


# ---- the trainer's step


class Scalar(torch.nn.Module):
    """loss = weight * mean(batch)."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return {"loss": (self.weight * torch.tensor(batch)).mean()}


def one_step(batches, lr=0.1, **options):
    model = Scalar()
    trainer = Trainer(model, batches, torch.optim.SGD(model.parameters(), lr), **options)
    trainer.train(0, 1)
    return model.weight.item()


def test_accumulated_batches_step_like_one_large_batch():
    whole = one_step([[1.0, 2.0, 3.0, 6.0]])
    assert one_step([[1.0, 2.0], [3.0, 6.0]], accumulation_steps=2) == pytest.approx(whole)
    assert whole == pytest.approx(1 - 0.1 * 3)


def test_gradients_are_clipped():
    clipped = one_step([[100.0]], clip_grad=dict(max_norm=2.0, norm_type=2))
    assert clipped == pytest.approx(1 - 0.1 * 2, rel=1e-4)


def test_float16_scales_the_loss_and_keeps_tiny_gradients():
    assert one_step([[1e-6]], lr=1e5, amp_dtype=torch.float16) == pytest.approx(0.9, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = Scalar()
    trainer = Trainer(model, [[float("nan")]], torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(FloatingPointError, match="iteration=0"):
        trainer.train(0, 1)
    assert model.weight.item() == 1
