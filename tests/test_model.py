"""The whole model: gradients reach everything, batches mix, odd input works, configs build."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "projects/stageinteractor/configs").glob("*.py"))
TREES = ROOT / "projects/stageinteractor/configs/stageinteractor_lite0_trees.py"
R50 = ROOT / "projects/stageinteractor/configs/stageinteractor_r50_12ep.py"


def tiny_config():
    """The small configuration, smaller still."""
    cfg = LazyConfig.load(str(TREES)).model
    cfg.query_generator.num_queries = 12
    cfg.decoder.update(embed_dim=32, feature_dim=16, ffn_dim=32, num_classes=5)
    cfg.backbone.frozen_modules = []
    return cfg


def build(seed=0):
    torch.manual_seed(seed)
    return instantiate(tiny_config())


def wake(model):
    """Give the layers that start at zero random weights: they block most gradients otherwise."""
    for parameter in model.decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def make_image(height, width, objects=2):
    corner = torch.rand(objects, 2) * torch.tensor([width, height]) / 2
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([corner, corner + 12], dim=1))
    instances.gt_classes = torch.randint(5, (objects,))
    return {"image": torch.rand(3, height, width) * 255, "instances": instances}


def test_every_parameter_gets_a_gradient():
    model = wake(build()).train()
    losses = model([make_image(96, 128), make_image(96, 96, objects=4)])
    sum(losses.values()).backward()
    without = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ]
    # The first boxes are all the same, so that the attention bias of stage 0 is constant.
    assert without == ["decoder.stages.0.attention.iof_tau"] or without == []


@pytest.mark.parametrize(
    "images",
    [
        [make_image(64, 64, objects=0)],
        [make_image(97, 131, objects=0), make_image(33, 250, objects=3)],
        [make_image(1, 1, objects=0)],
        [make_image(75, 41, objects=1)],
        [make_image(64, 96, objects=30)],
    ],
    ids=["no objects", "mixed sizes", "one pixel", "one object", "more objects than queries"],
)
def test_any_image_trains_and_detects(images):
    model = wake(build())
    losses = model.train()(images)
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        outputs = model.eval()(images)
    for image, output in zip(images, outputs):
        found = output["instances"]
        assert found.image_size == tuple(image["image"].shape[1:])
        assert (found.scores.diff() <= 0).all()
        assert found.pred_boxes.tensor.min() >= 0 if len(found) else True
        assert ((found.pred_classes >= 0) & (found.pred_classes < 5)).all()


def test_detections_are_scaled_to_the_size_that_was_asked_for():
    model = wake(build()).eval()
    image = make_image(64, 96)
    with torch.no_grad():
        small = model([image])[0]["instances"]
        large = model([{**image, "height": 128, "width": 288}])[0]["instances"]
    assert large.image_size == (128, 288)
    scale = torch.tensor([3.0, 2, 3, 2])
    torch.testing.assert_close(
        large.pred_boxes.tensor, small.pred_boxes.tensor * scale, atol=1e-3, rtol=0
    )


def test_uint8_and_float_images_are_the_same():
    model = wake(build()).eval()
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        a, b = (model([{"image": i}])[0]["instances"].scores for i in (image, image.float()))
    torch.testing.assert_close(a, b)


def test_images_of_one_padded_size_do_not_see_each_other():
    """The same detections alone and in a batch."""
    model = wake(build()).eval()
    images = [make_image(90, 120), make_image(96, 128), make_image(70, 100)]
    with torch.no_grad():
        together = model(images)
        for image, output in zip(images, together):
            alone = model([image])[0]["instances"]
            torch.testing.assert_close(
                alone.pred_boxes.tensor, output["instances"].pred_boxes.tensor, atol=1e-3, rtol=0
            )
            torch.testing.assert_close(alone.scores, output["instances"].scores)


def test_padding_shows_because_the_backbone_and_the_shared_norm_see_it():
    """Released behaviour, documented in the project's README: more padding, other numbers."""
    model = wake(build()).eval()
    image = make_image(64, 64)
    with torch.no_grad():
        alone = model([image])[0]["instances"].scores
        padded = model([image, make_image(64, 160)])[0]["instances"].scores
    difference = (alone - padded).abs().max()
    assert 1e-6 < difference < 0.5


def test_frozen_parts_and_batch_norm_statistics_stay_in_training():
    cfg = tiny_config()
    cfg.backbone.frozen_modules = ["conv_stem", "bn1"]
    model = wake(instantiate(cfg)).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items() if "running" in k}
    sum(model([make_image(64, 64)]).values()).backward()
    after = model.backbone.state_dict()
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert model.backbone.body.conv_stem.weight.grad is None
    assert model.backbone.body.bn1.weight.grad is None
    assert model.backbone.body.blocks[3][0].bn1.weight.grad is not None


def test_resnet_norms_train_their_affine_parameters_from_res3_on():
    model = instantiate(LazyConfig.load(str(R50)).model)
    names = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert "res3.0.conv1.norm.weight" in names
    assert not any(name.startswith(("stem", "res2")) for name in names)
    assert not any(module.training for module in model.train().backbone.res3.modules()
                   if isinstance(module, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_close_to_float32(dtype):
    model = wake(build()).train()
    images = [make_image(64, 96)]
    full = sum(model(images).values())
    with torch.autocast("cpu", dtype):
        mixed = sum(model(images).values())
    mixed.backward()
    assert mixed.item() == pytest.approx(full.item(), rel=0.05)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_instantiates(path):
    """Model, optimizer and schedule; data loaders need their data sets."""
    cfg = LazyConfig.load(str(path))
    with torch.device("meta"):
        cfg.model.backbone = None  # Detectron2's ResNet initialises in numpy
        model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    schedule = instantiate(cfg.lr_multiplier)
    assert optimizer.param_groups and schedule(0.5) > schedule(0.999) > 0
    assert cfg.train.device == "auto"
    assert cfg.dataloader.train.total_batch_size > 0
    assert path.read_text().startswith('"""') and "train_net.py" in path.read_text()


def test_initial_values():
    """Method, section 8: what starts at zero, at ones, at the prior; and bounds of the rest."""
    cfg = LazyConfig.load(str(TREES)).model
    stage = instantiate(cfg).decoder.stages[2]
    zero = [stage.points.first_offsets, stage.points.sub_offsets, stage.mixing.filter_generator]
    zero += [stage.mixing.bias_generator, stage.mixing.out_proj, stage.box_head[-1]]
    zero += [stage.mixing.channel_adapter.gates, stage.mixing.channel_adapter.biases]
    zero += [stage.mixing.spatial_adapter.row_gate, stage.mixing.static_mixings[0].across]
    assert not any(layer.weight.any() for layer in zero)
    assert not stage.mixing.channel_adapter.gates.bias.any()
    assert not stage.mixing.static_mixings[0].within.bias.any()
    assert stage.mixing.filter_generator.bias.abs().max() <= 1 / cfg.decoder.embed_dim**0.5
    assert stage.mixing.filter_generator.bias.std() > 0.01
    assert stage.class_head[-1].bias.tolist() == pytest.approx([-4.59512])
    assert 0 <= stage.attention.iof_tau.min() and stage.attention.iof_tau.max() <= 4
    fan = cfg.decoder.embed_dim + cfg.decoder.ffn_dim
    assert stage.ffn.layers[0].weight.abs().max() <= (6 / fan) ** 0.5
    assert stage.ffn.layers[0].bias.any() and not stage.attention.in_proj.bias.any()
