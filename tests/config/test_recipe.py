"""The recipe: every configuration says what the release does, and fits itself to other data."""

import math
import re
from collections import Counter
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import pytest
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf
from torch import nn

from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.config.preflight import check_options
from projects.stageinteractor.config.schedule import fit_schedule, resolve_schedule
from projects.stageinteractor.errors import UserError

PROJECT = Path(__file__).resolve().parents[2] / "projects/stageinteractor"
CONFIGS = {path.stem: path for path in sorted((PROJECT / "configs").glob("*.py"))}
COCO = [name for name in CONFIGS if "lite0" not in name]
EPOCH = 7330

# queries, epochs, milestones, warm-up, how training images are made
PLANS = {
    "stageinteractor_r50_12ep": (100, 12, [8, 11], 500, "fixed"),
    "stageinteractor_r50_500q_12ep": (500, 12, [8, 11], 500, "fixed"),
    "stageinteractor_r50_mstrain_12ep": (100, 12, [8, 11], 500, "scales"),
    "stageinteractor_r50_mstrain_36ep": (100, 36, [27, 33], 500, "scales"),
    "stageinteractor_r50_300q_12ep": (300, 12, [8, 11], 500, "crops"),
    "stageinteractor_r50_300q_24ep": (300, 24, [16, 22], 500, "crops"),
    "stageinteractor_r50_300q_36ep": (300, 36, [24, 33], 500, "crops"),
    "stageinteractor_r50_900q_36ep": (900, 36, [24, 33], 500, "crops"),
    "stageinteractor_r101_300q_36ep": (300, 36, [24, 33], 500, "crops"),
    "stageinteractor_x101_dcn_300q_36ep": (300, 36, [24, 33], 500, "crops"),
    "stageinteractor_swin_s_300q_36ep": (300, 36, [24, 33], 1000, "crops"),
    "adamixer_r50_12ep": (100, 12, [8, 11], 500, "fixed"),
    "adamixer_r50_300q_12ep": (300, 12, [8, 11], 500, "crops"),
    "adamixer_r50_300q_24ep": (300, 24, [16, 22], 500, "crops"),
    "adamixer_r50_300q_36ep": (300, 36, [24, 33], 500, "crops"),
    "adamixer_r101_300q_36ep": (300, 36, [24, 33], 500, "crops"),
    "adamixer_x101_dcn_300q_36ep": (300, 36, [24, 33], 500, "crops"),
    "adamixer_swin_s_300q_36ep": (300, 36, [24, 33], 1000, "crops"),
}
SCALES = set(range(480, 801, 32))


def load(name):
    return LazyConfig.load(str(CONFIGS[name]))


def test_every_config_has_a_plan_and_a_row_in_the_readme():
    assert PLANS.keys() == set(COCO)
    rows = re.findall(r"^\| `(\w+)` \|", (PROJECT / "README.md").read_text(), re.M)
    assert sorted(rows) == sorted(CONFIGS)


@pytest.mark.parametrize("name", COCO)
def test_docstrings_say_what_and_how(name):
    """First line: model and the paper's AP, which is the README's too. Then the command."""
    text = CONFIGS[name].read_text().split('"""')[1]
    first = text.splitlines()[0]
    queries, epochs, *_ = PLANS[name]
    assert f"{queries} queries" in first and f"{epochs} epochs" in first
    assert f"--config-file projects/stageinteractor/configs/{name}.py" in text
    assert "16 images a step" in text and "Not run here" in text
    row = re.search(rf"^\| `{name}` \|.*$", (PROJECT / "README.md").read_text(), re.M)[0]
    cells = [cell.strip() for cell in row.split("|")]
    published = re.search(r"([\d.]+) AP in the paper \((table \d)\)", first)
    assert cells[4] == "not run"
    if published:
        assert cells[3].startswith(published[1]) and published[2] in cells[3]
    else:
        assert "no figure in the paper" in first and cells[3] == "–"


@pytest.mark.parametrize("name", COCO)
def test_schedule(name):
    """Method, section 12: linear warm-up by iteration, steps of a tenth, an evaluation an epoch."""
    queries, epochs, milestones, warmup, _ = PLANS[name]
    cfg = load(name)
    assert cfg.model.query_generator.num_queries == queries
    assert cfg.model.detections_per_image == queries
    assert cfg.train.max_iter == epochs * EPOCH and cfg.train.epochs == epochs
    assert cfg.train.eval_period == cfg.train.checkpointer.period == EPOCH
    assert cfg.dataloader.train.total_batch_size == 16
    assert cfg.train.output_dir == f"./output/{name}"
    factor = instantiate(cfg.lr_multiplier)
    for step in (0, 1, warmup // 2, warmup - 1):
        expected = 1 - (1 - step / warmup) * (1 - 0.001)
        assert factor(step / cfg.train.max_iter) == pytest.approx(expected, abs=1e-6)
    for epoch, expected in zip(milestones, (0.1, 0.01)):
        assert factor((epoch - 0.01) / epochs) == pytest.approx(10 * expected)
        assert factor((epoch + 0.01) / epochs) == pytest.approx(expected)
    assert factor((warmup + 1) / cfg.train.max_iter) == 1


def same(a, b):
    return OmegaConf.to_container(a, resolve=False) == OmegaConf.to_container(b, resolve=False)


@pytest.mark.parametrize("name", COCO)
def test_configs_share_what_does_not_differ(name):
    """One optimizer for all but Swin-S; the images of the first config of each kind."""
    cfg, kind = load(name), PLANS[name][-1]
    backbone = "swin_s_300q_36ep" if "swin" in name else "r50_12ep"
    assert same(cfg.optimizer, load(f"stageinteractor_{backbone}").optimizer)
    first = {"fixed": "12ep", "scales": "mstrain_12ep", "crops": "300q_12ep"}[kind]
    assert same(cfg.dataloader, load(f"stageinteractor_r50_{first}").dataloader)
    assert same(cfg.train.clip_grad, load("stageinteractor_r50_12ep").train.clip_grad)


@pytest.mark.parametrize(
    "name",
    ["stageinteractor_r50_12ep", "stageinteractor_x101_dcn_300q_36ep", "adamixer_r50_12ep",
     "stageinteractor_swin_s_300q_36ep", "adamixer_swin_s_300q_36ep"],
)
def test_optimizer(name):
    cfg = load(name)
    assert (cfg.optimizer.lr, cfg.optimizer.eps) == (2.5e-5, 1e-10)
    assert tuple(cfg.optimizer.betas) == (0.9, 0.999)
    assert cfg.train.clip_grad.enabled and cfg.train.clip_grad.params.max_norm == 1
    assert cfg.train.clip_grad.params.norm_type == 2
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    groups = instantiate(cfg.optimizer).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {group["lr"] for group in groups} == {2.5e-5}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert decay.keys() == {id(p) for p in trained.values()}
    exempt = {parameter for parameter, p in trained.items() if decay[id(p)] == 0}
    assert {decay[id(p)] for p in trained.values()} <= {0, 1e-4}
    if "swin" not in name:
        assert not exempt
        return
    # Released names that hold "norm" or "relative_position_bias_table"; neck.gn_out and the heads'
    # norms, cls_fcs.1 and reg_fcs.1, are not among them.
    for parameter in trained:
        head_or_neck = "_head.1." in parameter or parameter.startswith("neck.")
        expected = ("norm" in parameter or "bias_table" in parameter) and not head_or_neck
        assert (parameter in exempt) == expected, parameter
    # Several processes train it as a part called "module".
    cfg.optimizer.params.model = nn.ModuleDict({"module": model})
    groups = instantiate(cfg.optimizer).param_groups
    assert sum(len(group["params"]) for group in groups if not group["weight_decay"]) == len(exempt)


def test_the_learning_rate_on_the_command_line_reaches_every_group():
    for name in ("stageinteractor_r50_12ep", "stageinteractor_swin_s_300q_36ep"):
        cfg = load_config(str(CONFIGS[name]), ["optimizer.lr=0.5"])
        cfg.optimizer.params.model = instantiate(cfg.model.neck)
        assert {group["lr"] for group in instantiate(cfg.optimizer).param_groups} == {0.5}


@pytest.mark.parametrize(
    "name",
    ["stageinteractor_r50_12ep", "stageinteractor_r50_mstrain_12ep",
     "stageinteractor_r50_300q_12ep"],
)
def test_images_for_training(name):
    """Method, section 11: sizes as they are drawn, for a photograph of COCO's usual size."""
    np.random.seed(0)
    kind = PLANS[name][-1]
    cfg = load(name).dataloader
    assert cfg.train.mapper.image_format == cfg.test.mapper.image_format == "RGB"
    augmentations = T.AugmentationList(instantiate(cfg.train.mapper.augmentations))
    shorts, ratios, flips = Counter(), set(), 0
    for _ in range(300):
        transforms = augmentations(T.AugInput(np.zeros((480, 640, 3), np.uint8)))
        flips += any(isinstance(t, T.HFlipTransform) for t in transforms)
        height, width = transforms[-1].new_h, transforms[-1].new_w
        assert max(height, width) <= 1333
        shorts[min(height, width)] += 1
        ratios.add(round(width / height, 2))
        crops = [t for t in transforms if isinstance(t, T.CropTransform)]
        if crops:  # of an image resized to a short side of 400, 500 or 600
            whole, crop = (transforms[1].new_h, transforms[1].new_w), (crops[0].h, crops[0].w)
            assert min(whole) in (400, 500, 600)
            assert all(min(w, 384) <= side <= min(w, 600) for side, w in zip(crop, whole))
    assert 100 < flips < 200
    if kind == "fixed":
        assert set(shorts) == {800}
    elif kind == "scales":
        assert set(shorts) == SCALES and len(ratios) < 4
    else:
        assert SCALES <= set(shorts) and len(ratios) > 20
    wide = np.zeros((400, 1000, 3), np.uint8)
    last = [augmentations(T.AugInput(wide))[-1] for _ in range(50)]
    assert max(transform.new_w for transform in last) == 1333
    resize = T.AugmentationList(instantiate(cfg.test.mapper.augmentations))
    for shape, expected in (((480, 640, 3), (800, 1067)), (wide.shape, (533, 1333))):
        [transform] = resize(T.AugInput(np.zeros(shape, np.uint8)))
        assert (transform.new_h, transform.new_w) == expected


def test_crops_are_taken_of_half_the_images():
    np.random.seed(0)
    augmentations = T.AugmentationList(
        instantiate(load("stageinteractor_r50_300q_12ep").dataloader.train.mapper.augmentations)
    )
    image, sides = np.zeros((100, 100, 3), np.uint8), []
    for _ in range(1500):
        transforms = augmentations(T.AugInput(image))
        crops = [t for t in transforms if isinstance(t, T.CropTransform)]
        sides += [(transforms[1].new_h, side) for crop in crops for side in (crop.h, crop.w)]
    assert 680 < len(sides) / 2 < 820  # of 1500, 3.6 standard deviations
    for whole in (400, 500, 600):
        found = [side for resized, side in sides if resized == whole]
        assert min(found) >= 384 and min(found) < 384 + (whole - 384) // 10 + 2
        assert max(found) <= whole and max(found) > whole - (whole - 384) // 10 - 2


def fitted(images, *overrides, name="stageinteractor_r50_12ep"):
    cfg = load_config(str(CONFIGS[name]), list(overrides))
    resolve_schedule(cfg, {text.partition("=")[0].lstrip("+") for text in overrides})
    fit_schedule(cfg, images)
    return cfg


def test_coco_at_16_images_a_step_stays_as_it_is():
    for name in COCO:
        cfg, before = fitted(117266, name=name), load(name)
        assert OmegaConf.to_container(cfg.train) == OmegaConf.to_container(before.train)
        assert cfg.lr_multiplier.warmup_length == pytest.approx(before.lr_multiplier.warmup_length)
        assert cfg.optimizer.lr == before.optimizer.lr


@pytest.mark.parametrize(
    "images, overrides, epoch",
    [
        (117266, ["dataloader.train.total_batch_size=8"], 14659),
        (117266, ["dataloader.train.total_batch_size=2", "train.accumulation_steps=4"], 14659),
        (50000, [], 3125),
        (50001, ["dataloader.train.total_batch_size=4"], 12501),
    ],
)
def test_other_data_and_batches_keep_the_epochs_and_the_warm_up(images, overrides, epoch):
    cfg = fitted(images, *overrides)
    assert cfg.train.max_iter == 12 * epoch
    assert cfg.train.eval_period == cfg.train.checkpointer.period == epoch
    factor = instantiate(cfg.lr_multiplier)
    assert factor(250 / cfg.train.max_iter) == pytest.approx(0.5005)
    assert factor(501 / cfg.train.max_iter) == 1
    assert factor(8.01 / 12) == pytest.approx(0.1) and cfg.optimizer.lr == 2.5e-5


def test_a_short_run_warms_up_for_a_tenth_of_it():
    cfg = fitted(64)
    assert cfg.train.max_iter == 48 and cfg.train.eval_period == 4
    assert cfg.lr_multiplier.warmup_length == pytest.approx(0.1)
    assert fitted(3).train.eval_period == 1


def test_what_the_command_line_says_wins():
    cfg = fitted(1600, "train.eval_period=5", "train.checkpointer.period=6")
    assert (cfg.train.max_iter, cfg.train.eval_period) == (1200, 5)
    assert cfg.train.checkpointer.period == 6
    assert fitted(1600, "train.epochs=24").train.max_iter == 2400
    assert fitted(1600, "+train.epochs=24").train.max_iter == 2400
    assert fitted(1600, "lr_multiplier.warmup_length=0.2").lr_multiplier.warmup_length == 0.2
    assert fitted(1600, "train.warmup_steps=12").lr_multiplier.warmup_length == 0.01


@pytest.mark.parametrize("overrides", [["train.max_iter=2000"], ["train.epochs=null"]])
def test_iterations_instead_of_epochs(overrides):
    """The periods are still epochs of the data, and the warm-up keeps its steps."""
    cfg = fitted(1600, *overrides)
    assert cfg.train.max_iter in (2000, 12 * EPOCH)
    assert cfg.train.eval_period == cfg.train.checkpointer.period == 100
    expected = min(0.1, 500 / cfg.train.max_iter)
    assert cfg.lr_multiplier.warmup_length == pytest.approx(expected)


@pytest.mark.parametrize(
    "overrides",
    [[], ["train.epochs=3"], ["train.max_iter=77", "train.eval_period=5"],
     ["train.scale_lr.enabled=true", "dataloader.train.total_batch_size=8"]],
)
def test_a_recorded_config_starts_the_same_run(overrides, tmp_path):
    """config.yaml has the resolved config, before it is fitted to the data."""
    cfg = load_config(str(CONFIGS["stageinteractor_r50_12ep"]), overrides)
    resolve_schedule(cfg, {text.partition("=")[0] for text in overrides})
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = load_config(str(tmp_path / "config.yaml"), [])
    resolve_schedule(again, ())
    for config in (cfg, again):
        fit_schedule(config, 1600)
    assert same(cfg.train, again.train) and cfg.optimizer.lr == again.optimizer.lr
    assert cfg.lr_multiplier.warmup_length == again.lr_multiplier.warmup_length


def test_a_schedule_that_contradicts_itself_is_refused():
    cfg = load("stageinteractor_r50_12ep")
    cfg.train.max_iter = 5000
    with pytest.raises(UserError, match="train.epochs=null"):
        resolve_schedule(cfg, [])
    with pytest.raises(UserError, match="not both"):
        fitted(1600, "train.max_iter=5", "train.epochs=5")


@pytest.mark.parametrize(
    "override", ["train.epochs=0", "train.epochs=-3", "train.scale_lr.batch_size=0"]
)
def test_numbers_that_cannot_be_are_refused(override):
    cfg = load_config(str(CONFIGS["stageinteractor_r50_12ep"]), [override])
    with pytest.raises(UserError, match=override.partition("=")[0]):
        check_options(cfg)


@pytest.mark.parametrize("name", [name for name in COCO if name.startswith("adamixer")])
def test_adamixer_configs_are_adamixer_with_that_backbone(name):
    cfg, baseline = load(name), load("adamixer_r50_12ep")
    assert same(cfg.model.decoder, baseline.model.decoder)
    assert same(cfg.model.criterion, baseline.model.criterion)
    if "r50" not in name:
        ours = load(name.replace("adamixer", "stageinteractor"))
        assert same(cfg.model.backbone, ours.model.backbone)
        assert same(cfg.model.neck, ours.model.neck)


@pytest.mark.parametrize(
    "backbone, file",
    [
        ("r50", "R-50.pkl"),
        ("r101", "resnet101-63fe2227.pth"),
        ("x101_dcn", "resnext101_32x4d-a5af3160.pth"),
        ("swin_s", "swin_small_patch4_window7_224.pth"),
    ],
)
def test_initial_weights(backbone, file):
    for method in ("stageinteractor", "adamixer"):
        path = load(f"{method}_{backbone}_300q_36ep").train.init_checkpoint
        assert path.rpartition("/")[2] == file and "://" in path


def test_more_points_with_900_queries():
    cfg = load("stageinteractor_r50_900q_36ep").model.decoder
    assert list(cfg.points_per_stage) == [128] + [64] * 5


@pytest.mark.parametrize(
    "batch, steps, expected", [(16, 1, 1), (8, 1, 0.5), (8, 4, 2), (1, 1, 1 / 16)]
)
def test_linear_learning_rate(batch, steps, expected):
    cfg = fitted(1600, "train.scale_lr.enabled=true", f"train.accumulation_steps={steps}",
                 f"dataloader.train.total_batch_size={batch}")
    assert math.isclose(cfg.optimizer.lr, 2.5e-5 * expected)
    cfg = fitted(1600, "train.scale_lr.enabled=true", "train.scale_lr.batch_size=32")
    assert math.isclose(cfg.optimizer.lr, 2.5e-5 / 2)
