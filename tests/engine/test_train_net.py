"""Training and evaluation through the real command line, on drawn shapes."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import train_net
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.config.building import load_dataset
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.config.portable_config import portable_config
from projects.stageinteractor.config.preflight import check_dataset
from projects.stageinteractor.engine.progress import start_wandb
from projects.stageinteractor.engine.training_parts import build_distributed_model, build_loader
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference.export import writers
from projects.stageinteractor.inference.export.graph import DetectionGraph
from support.models import wake
from support.runs import (
    CONFIG,
    ROOT,
    checkpoint_of,
    command,
    environment,
    metrics,
    overrides,
    run,
)
from support.tensorboard import read_pictures


@pytest.fixture
def in_process(monkeypatch):
    """The command's main() in this process, without its log: that would outlive the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train_net, "start_log", lambda cfg, args: None)

    def main(*arguments):
        with pytest.raises(SystemExit) as caught:
            arguments = ["--config-file", CONFIG, *map(str, arguments)]
            train_net.main(train_net.parse_arguments(arguments))
        assert caught.value.code == 1

    return main


def test_train_kill_resume_evaluate(shapes, tmp_path, capfd, in_process):
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

    checkpoint = SafeCheckpointer(torch.nn.Module(), str(tmp_path)).get_checkpoint_file()
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
        *overrides(shapes, tmp_path, **{"train.init_checkpoint": tmp_path / "model_final.pth"}),
    )
    table = text[text.index("bbox, %"):].splitlines()
    assert float(table[2].split()[1]) == pytest.approx(last["bbox/AP"], abs=0.005)
    assert text.count("AP75") == 1 and "Average Precision" not in text and "copypaste" not in text
    assert "d2.evaluation" not in text
    assert "Preparing results for COCO format" in (tmp_path / "eval" / "log.txt").read_text()
    assert (tmp_path / "eval" / "coco_instances_results.json").exists()

    before = (tmp_path / "model_best.pth").read_bytes()
    in_process(*options)
    assert f"{tmp_path} holds a run: continue it with --resume" in capfd.readouterr().err
    assert (tmp_path / "model_best.pth").read_bytes() == before


def test_fast_dev_run_does_everything_with_every_option(shapes, tmp_path, in_process):
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
    folder = tmp_path / "fast_dev_run"
    recorded = metrics(folder)
    assert recorded[-1]["iteration"] == 4 and "bbox/AP" in recorded[-1]
    for key in ("total_loss", "stage2_loss_giou", "lr", "grad_norm", "labels/kept", "data_time"):
        assert key in recorded[0], key
    assert list(folder.glob("events.out.tfevents*"))
    state = torch.load(folder / "model_final.pth", weights_only=True)
    assert {"model", "model_ema", "trainer"} <= state.keys()
    for ema in ("false", "true"):
        options = {
            "train.init_checkpoint": folder / "model_final.pth", "train.model_ema.enabled": ema,
            "train.output_dir": tmp_path / ema,
        }
        options = overrides(shapes, tmp_path, **options)
        arguments = ["--config-file", CONFIG, "--eval-only", *options]
        train_net.main(train_net.parse_arguments(arguments))
        assert (tmp_path / ema / "eval/coco_instances_results.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.max_itr=3"], "unknown config key train.max_itr: did you mean train.max_iter"),
        (["train.amp.dtype=half"], "train.amp.dtype=half: choose bfloat16 or float16"),
        (["train.accumulation_steps=0"], "train.accumulation_steps=0: a whole number, at least 1"),
        (["train.output_dir=/proc/nope"], "cannot write to /proc/nope"),
        (["train.init_checkpoint=no.pth"], "no checkpoint no.pth"),
        (["dataloader.train.total_batch_size=0"], "total_batch_size=0: a whole number, at least 1"),
        (["dataloader.train.num_workers=-1"], "dataloader.train.num_workers=-1: "),
        (["dataloader.test.num_workers=-1"], "dataloader.test.num_workers=-1: "),
        (["train.max_iter=0"], "train.max_iter=0: "),
        (["train.eval_period=-1"], "train.eval_period=-1: "),
        (["train.log_period=0"], "train.log_period=0: "),
        (["train.checkpointer.period=0"], "train.checkpointer.period=0: "),
        (["train.checkpointer.max_to_keep=0"], "max_to_keep=0: a whole number, at least 1"),
        (["train.model_ema.decay=1.0"], "train.model_ema.decay=1.0: "),
        (["optimizer.lr=0"], "optimizer.lr=0: a finite number above 0"),
        (["optimizer.lr=-1e-4"], "optimizer.lr=-0.0001: "),
        (["optimizer.lr=nan"], "optimizer.lr=nan: "),
        (["train.clip_grad.params.max_norm=-1"], "train.clip_grad.params.max_norm=-1: "),
        (["optimizer.weight_decay=-1"], "optimizer: Invalid weight_decay value: -1"),
        (["+dataloader.train.foo=1"], "dataloader.train: TypeError: "),
        (["train.init_checkpoint=tests"], "tests is a folder without checkpoints"),
        (["dataloader.train.dataset.json_file=no.json"], "data set no.json: no no.json"),
        (["dataloader.test.dataset.image_root=no/"], "annotations.json: no no/"),
        (["model.decoder.num_classes=4"], "has 3 classes: rectangle, circle, triangle"),
        (["model.decoder.embed_dim=100"], "model: embed_dim=100 must be a multiple of 8"),
        (["--eval-only"], "--eval-only needs a checkpoint"),
    ],
)
def test_mistakes_are_one_line(shapes, tmp_path, capfd, in_process, arguments, message):
    flags = [argument for argument in arguments if argument.startswith("--")]
    keys = [argument for argument in arguments if not argument.startswith("--")]
    in_process(*flags, *overrides(shapes, tmp_path), *keys)
    errors = capfd.readouterr().err
    assert message in errors and "Traceback" not in errors


def test_a_traceback_can_be_asked_for(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEINTERACTOR_TRACEBACK", "1")
    options = overrides(shapes, tmp_path, **{"model.decoder.num_classes": 4})
    with pytest.raises(UserError, match="num_classes=4"):
        train_net.main(train_net.parse_arguments(["--config-file", CONFIG, *options]))


def test_overrides_in_the_form_of_options(capsys):
    with pytest.raises(SystemExit):
        train_net.parse_arguments(["--config-file", CONFIG, "--dataset.train=a.json"])
    assert "write dataset.train=a.json" in capsys.readouterr().err


def test_the_help_speaks_of_this_command(capsys):
    with pytest.raises(SystemExit):
        train_net.parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert "optimizer.lr=1e-4" in said and "Yacs" not in said and "DefaultTrainer" not in said


def test_a_newcomer_sees_few_lines_before_the_first_iteration(shapes, tmp_path):
    """With ImageNet weights, and a schedule in epochs. What was left out is in the log.

    5 images with objects, 2 a step: 3 iterations an epoch. config.yaml has the epochs.
    """
    model = instantiate(load_config(CONFIG, overrides(shapes, tmp_path)).model)
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "imagenet.pth")
    options = overrides(shapes, tmp_path / "run", **{
        "train.init_checkpoint": tmp_path / "imagenet.pth", "train.max_iter": None,
        "train.epochs": 2, "train.eval_period": 0, "train.checkpointer.period": 100,
    })
    environ = {k: v for k, v in environment().items() if k != "PYTHONWARNINGS"}
    done = subprocess.run(
        command(*options), cwd=ROOT, env=environ, timeout=300, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    shown = done.stdout[:done.stdout.index("iter: 1/6")].splitlines()
    assert len(shown) <= 25, done.stdout
    missing = len(model.state_dict()) - len(backbone)
    assert f"{missing} weights are not in the checkpoint" in "\n".join(shown)
    assert "2 epochs of 5 images, 2 a step: 6 iterations" in "\n".join(shown)
    assert "warning" not in "\n".join(shown).lower()
    log = (tmp_path / "run/log.txt").read_text()
    for detail in ("PyTorch built with", "Distribution of instances", "decoder.stages.2.ffn.norm"):
        assert detail in log and detail not in done.stdout
    assert metrics(tmp_path / "run")[-1]["iteration"] == 6
    recorded = LazyConfig.load(str(tmp_path / "run/config.yaml")).train
    assert (recorded.max_iter, recorded.epochs) == (2 * 7330, 2)
    names = checkpoint_of(tmp_path / "run")["class_names"]
    assert names == ["rectangle", "circle", "triangle"]


def test_a_checkpoint_of_another_model_is_not_evaluated(shapes, tmp_path, capfd, in_process):
    """Rather than a model that is half random."""
    torch.save({"model": {}}, tmp_path / "other.pth")
    other = {"train.init_checkpoint": tmp_path / "other.pth"}
    in_process("--eval-only", *overrides(shapes, tmp_path, **other))
    assert "the checkpoint does not fit the config" in capfd.readouterr().err


def test_a_mistake_in_two_processes_is_printed_once(shapes, tmp_path):
    options = overrides(shapes, tmp_path, **{"model.decoder.num_classes": 4})
    text = run("--num-gpus", 2, *options, expect=1)
    assert text.count("error: model.decoder.num_classes=4, but") == 1 and "Traceback" not in text


def test_an_unknown_data_set_is_named():
    dataset = OmegaConf.create({"names": "coco_2017_trian"})
    with pytest.raises(UserError, match="registered as coco_2017_trian, did you mean coco_2017_tr"):
        check_dataset(dataset)


def test_missing_coco_says_where_it_was_looked_for(tmp_path, monkeypatch, capfd):
    config = ROOT / "projects/stageinteractor/configs/stageinteractor_r50_12ep.py"
    monkeypatch.chdir(tmp_path)  # the default root is a relative path
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(SystemExit):
        options = ["train.device=cpu", f"train.output_dir={tmp_path}"]
        train_net.main(train_net.parse_arguments(["--config-file", str(config), *options]))
    said = capfd.readouterr().err
    assert f"{tmp_path}/coco (annotations/" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_run_of_two_processes_and_the_commands_that_it_suggests(shapes, tmp_path):
    """Shared buffers would make a process wait that evaluates or draws alone."""
    folder = tmp_path / "ein Lauf"
    options = overrides(shapes, folder, **{
        "train.max_iter": 4, "train.eval_period": 2, "train.log_period": 2,
        "train.ddp.broadcast_buffers": "true",
    })
    text = run("--num-gpus", 2, *options)
    log = (folder / "log.txt").read_text()
    line = re.compile(
        r"eta: 0:\d\d:\d\d  iter: 4/4  loss: \S+ \(stages \S+ \S+ \S+\)  labels: kept \d+% "
        r"dropped \d+% gained \d+%  grad: \S+  lr: \S+  speed: \S+ img/s  data: \d+%  mem: \d+ MiB"
    )
    for shown in (text, log):
        assert len(line.findall(shown)) == 1
        assert shown.count("bbox, %") == 2
    assert "Finished" not in (folder / "log.txt.rank1").read_text()
    recorded = metrics(folder)
    expected = {"grad_norm", "images_per_second", "memory", "data_time", "lr", "eta_seconds",
                "labels/kept", "labels/dropped", "labels/gained", "stage0_loss_cls", "time"}
    training = [row for row in recorded if "total_loss" in row]
    assert len(training) == 2 and expected <= training[-1].keys()
    assert "bbox/AP-circle" in recorded[-1]
    assert read_pictures(folder) == {
        f"predictions/{i}": [(1, 192, 64), (4, 192, 64)] for i in range(1, 5)
    }
    suggested = re.findall(r"^  python (tools/\S+ .*)$", log, re.M)
    assert len(suggested) == 2
    for arguments in suggested:
        done = subprocess.run(
            [sys.executable, *shlex.split(arguments)],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "eval/coco_instances_results.json").exists()
    assert (folder / "training.png").exists()


def test_wandb_gets_what_tensorboard_gets(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **k: calls.append(k)))
    options = OmegaConf.create({"enabled": True, "params": {"project": "p", "name": None}})
    start_wandb(options)
    assert calls == [{"sync_tensorboard": True, "project": "p", "name": None}]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        start_wandb(options)
    start_wandb(OmegaConf.create({"enabled": False}))


def test_an_exported_file_has_the_figures_of_its_checkpoint(
    shapes, tmp_path, capfd, in_process, monkeypatch
):
    """In every format; what would not be comparable is refused in one line."""
    options = overrides(shapes, tmp_path)
    names = ["rectangle", "circle", "triangle"]
    cfg = load_config(CONFIG, options)
    cfg.dataloader.test.mapper.augmentations = []
    plain = "dataloader.test.mapper.augmentations=[]"
    torch.manual_seed(0)
    model = wake(instantiate(cfg.model)).eval()
    classes = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    description = {
        "config": portable_config(cfg, classes), "size_divisibility": "32",
        "class_names": json.dumps(names), "categories": json.dumps(classes),
    }
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    program = writers.trace(DetectionGraph(model))
    content = writers.openvino_files(program, description)
    content |= writers.program_files(program, description)
    for name, file in content.items():
        (tmp_path / name).write_bytes(file)

    def arguments(name, *others):
        return "--eval-only", *options, plain, f"train.init_checkpoint={tmp_path / name}", *others

    def refusal(*others):
        in_process(*arguments("model.xml", *others))
        return capfd.readouterr().err

    found, evaluate_only = [], train_net.evaluate_only
    monkeypatch.setattr(train_net, "evaluate_only", lambda cfg: found.append(evaluate_only(cfg)))

    def evaluate(*others):
        train_net.main(train_net.parse_arguments(["--config-file", CONFIG, *arguments(*others)]))

    evaluate("model.pth")
    truth = json.loads(shapes.read_text())  # of which random weights find nothing
    truth["annotations"] = [
        {**one, "id": number, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0}
        for number, one in enumerate(
            json.loads((tmp_path / "eval/coco_instances_results.json").read_text()), 1
        )
        if number % 7 == 1 and min(one["bbox"][2:]) > 2
    ]
    (tmp_path / "own.json").write_text(json.dumps(truth))
    in_process(*arguments("model.pt2"))
    assert "train.trust_program=true" in capfd.readouterr().err
    options.append("train.trust_program=true")
    for name in ("model.pth", "model.xml", "model.pt2"):
        evaluate(name, f"dataloader.test.dataset.json_file={tmp_path / 'own.json'}")
    expected = found[1]["bbox"]
    assert 1 < expected["AP"] < 99
    for each in found[2:]:
        assert each["bbox"] == pytest.approx(expected, abs=0.01, nan_ok=True)
    message = "model.xml takes RGB images, and dataloader.test.mapper.image_format is BGR"
    assert message in refusal("dataloader.test.mapper.image_format=BGR")
    assert "export it with model.decoder.num_stages=2" in refusal("model.decoder.num_stages=2")
    message = "keeps 10 detections of an image, and here 200 count: export it with model.detec"
    assert message in refusal("dataloader.evaluator.max_dets_per_image=200")
    graph = (tmp_path / "model.xml").read_text()
    (tmp_path / "model.xml").write_text(graph.replace("circle", "ring"))
    assert "other classes: number 1 is ring there and circle in" in refusal()


def test_a_missing_average_is_not_evaluated(shapes, tmp_path, capfd, in_process):
    """Rather than weights that were never trained."""
    plain = {"train.init_checkpoint": tmp_path / "plain.pth", "train.model_ema.enabled": "true"}
    options = overrides(shapes, tmp_path, **plain)
    model = instantiate(load_config(CONFIG, options).model)
    torch.save({"model": model.state_dict()}, tmp_path / "plain.pth")
    in_process("--eval-only", *options)
    assert "plain.pth has no moving average" in capfd.readouterr().err


def test_a_model_without_stages_is_not_compiled():
    path = "projects/stageinteractor/configs/retinanet_lite0_bccd.py"
    cfg = load_config(path, ["train.compile.enabled=true", "train.device=cpu"])
    with pytest.raises(UserError, match="no stages to compile"):
        build_distributed_model(cfg)


@pytest.mark.parametrize("device, pinned", [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_images_for_cuda_come_in_pinned_memory(shapes, tmp_path, device, pinned):
    cfg = load_config(CONFIG, overrides(shapes, tmp_path))
    cfg.train.device = device
    dataset = load_dataset(cfg, "train")
    assert build_loader(cfg, "train", dataset).loader.pin_memory == pinned
    assert not build_loader(cfg, "test", dataset).pin_memory
