"""The project's folder works in a detrex checkout: nothing else of this repository is there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What detrex has at these paths, reduced to the fields that a project may rely on.
DETREX = {
    "configs/common/train.py": """
train = dict(
    output_dir="./output",
    init_checkpoint="",
    max_iter=90000,
    amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    clip_grad=dict(enabled=False, params=dict(max_norm=0.1, norm_type=2)),
    seed=-1,
    fast_dev_run=dict(enabled=False),
    checkpointer=dict(period=5000, max_to_keep=100),
    eval_period=5000,
    log_period=20,
    wandb=dict(enabled=False, params=dict(dir="./wandb_output", project="detrex", name="x")),
    model_ema=dict(enabled=False, decay=0.999, device="", use_ema_weights_for_eval_only=False),
    device="cuda",
)
""",
    "configs/common/optim.py": """
import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

AdamW = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)
""",
    "configs/common/data/coco_detr.py": """
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator
from omegaconf import OmegaConf


class DetrDatasetMapper:
    def __init__(self, augmentation, augmentation_with_crop, is_train, mask_on, img_format):
        pass


def mapper(is_train):
    return L(DetrDatasetMapper)(
        augmentation=[], augmentation_with_crop=[], is_train=is_train, mask_on=False,
        img_format="RGB",
    )


dataloader = OmegaConf.create()
dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
    mapper=mapper(True), total_batch_size=16, num_workers=4,
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
    mapper=mapper(False), num_workers=4,
)
dataloader.evaluator = L(COCOEvaluator)(dataset_name="${..test.dataset.names}")
""",
}

CHECK = """
import sys
from detectron2.config import LazyConfig, instantiate
import projects.stageinteractor
cfg = LazyConfig.load(sys.argv[1])
assert cfg.train.device == "cuda", "the config is detrex's to choose"
model = instantiate(cfg.model)
cfg.optimizer.params.model = model
instantiate(cfg.optimizer), instantiate(cfg.lr_multiplier)
instantiate(cfg.dataloader.train.mapper), instantiate(cfg.dataloader.test.mapper)
assert cfg.train.max_iter == cfg.train.epochs * 7330 if cfg.train.epochs else cfg.train.max_iter
decay = {group["weight_decay"] for group in instantiate(cfg.optimizer).param_groups}
assert decay == ({0, 1e-4} if "swin" in sys.argv[1] else {1e-4}), decay
print(projects.stageinteractor.__file__)
"""


@pytest.mark.parametrize(
    "name",
    ["stageinteractor_r50_12ep", "adamixer_swin_s_300q_36ep", "stageinteractor_lite0_trees"],
)
def test_configs_load_from_a_foreign_root(tmp_path, name):
    for path, text in DETREX.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    folder = tmp_path / "projects/stageinteractor"
    shutil.copytree(ROOT / "projects/stageinteractor", folder)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, f"projects/stageinteractor/configs/{name}.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(done.stdout.split()[-1]).parent.resolve() == folder.resolve()
