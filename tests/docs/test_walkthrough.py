"""docs/from_image_to_detections.md: every shape in it is that of the running model."""

import functools
import inspect
import re
import sys

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, ImageList, Instances
from omegaconf import OmegaConf
from PIL import Image

from support.pages import PACKAGE, ROOT, resolve, table

PAGE = "docs/from_image_to_detections.md"
CONFIGS = ROOT / "projects/stageinteractor/configs"
# Config, height and width of the photograph, number of classes.
MODELS = {
    "R50": ("stageinteractor_r50_12ep", (427, 640), 80),
    "lite0": ("stageinteractor_lite0_bccd", (480, 640), 3),
}
WHERE = re.compile(r"`([\w/]+\.py)` `([\w.]+)`")
STEPS = table(PAGE, "step")


def shapes_of(output):
    """Shapes of all tensors in an output; of a dictionary also its length."""
    if isinstance(output, ImageList):
        yield from shapes_of(output.tensor)
    elif isinstance(output, Boxes):
        yield from shapes_of(output.tensor)
    elif isinstance(output, Instances):
        yield from shapes_of(output.get_fields())
    elif isinstance(output, (torch.Tensor, np.ndarray)):
        yield tuple(output.shape)
    elif isinstance(output, dict):
        yield (len(output),)
        yield from shapes_of(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from shapes_of(part)


def record(monkeypatch, path, symbol, outputs):
    """Have a function or method keep all that it returns in ``outputs``."""
    owner_name, _, name = symbol.rpartition(".")
    function = resolve(path, symbol)

    @functools.wraps(function)
    def call(*args, **kwargs):
        outputs.append(function(*args, **kwargs))
        return outputs[-1]

    if owner_name:
        owner = resolve(path, owner_name)
        kind = type(inspect.getattr_static(owner, name))
        call = staticmethod(call) if kind in (staticmethod, classmethod) else call
        return monkeypatch.setattr(owner, name, call)
    for module in [m for n, m in sys.modules.items() if n.startswith(PACKAGE)]:
        if getattr(module, name, None) is function:  # modules import functions by name
            monkeypatch.setattr(module, name, call)


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    """The name of a model, its config, and what every symbol of the page has returned in it."""
    name, (height, width), classes = MODELS[request.param]
    cfg = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    cfg.model.decoder.num_classes = classes
    photograph = tmp_path_factory.mktemp("walk") / "photograph.png"
    Image.new("RGB", (width, height), (90, 120, 60)).save(photograph)
    corner = torch.tensor([[10.0, 20], [60, 40], [100, 110]])
    found = {match: [] for row in STEPS for match in WHERE.findall(row["where"])}
    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        for (path, symbol), outputs in found.items():
            record(monkeypatch, path, symbol, outputs)
        model = instantiate(cfg.model).eval()
        mapper = instantiate(cfg.dataloader.test.mapper)
        image = mapper({"file_name": str(photograph), "height": height, "width": width})
        model([image])
        size = tuple(image["image"].shape[1:])
        objects = Instances(size, gt_boxes=Boxes(torch.cat([corner, corner + 40], dim=1)))
        objects.gt_classes = torch.tensor([0, 1, 2])
        modeling = sys.modules[f"{PACKAGE}.modeling.stageinteractor"]
        targets = modeling.gather_targets([objects], [size], torch.device("cpu"))
        decoded = found["modeling/decoder.py", "StageInteractorDecoder.forward"][-1]
        model.criterion(decoded, targets)
    return request.param, cfg, found


def symbols(column):
    """The page's symbols and their numbers of a model."""
    values = {}
    for row in table(PAGE, "symbol"):
        numbers = [int(number) for number in row[column].split(",")]
        values.update(zip(row["symbol"].split(", "), numbers))
    values["R"] = values["B"] * values["N"] * values["G"]
    return values


def evaluate(shape, values):
    """``(B N, G Dc, H/4)`` with numbers for symbols."""
    def number(text):
        product = 1
        for factor in text.split():
            factor, _, divisor = factor.partition("/")
            factor = int(factor) if factor.isdigit() else values[factor]
            assert factor % int(divisor or 1) == 0, text
            product *= factor // int(divisor or 1)
        return product

    return tuple(number(text) for text in shape.strip("()").split(",") if text.strip())


def test_every_shape_is_that_of_the_running_model(run):
    column, _, found = run
    returned = {where: {*shapes_of(outputs)} for where, outputs in found.items()}
    checked = 0
    for row in STEPS:
        if row[column] == "–":
            continue
        numbers = tuple(int(number) for number in re.findall(r"\d+", row[column]))
        [where] = WHERE.findall(row["where"])
        assert numbers in returned[where], (row["step"], sorted(returned[where]))
        checked += 1
    assert checked > 28


def test_symbols_give_the_same_numbers(run):
    column, _, _ = run
    values = symbols(column)
    for row in STEPS:
        if row[column] != "–" and row["step"] != "scaled image":  # before padding
            numbers = tuple(int(number) for number in re.findall(r"\d+", row[column]))
            assert evaluate(row["shape"], values) == numbers, row["step"]


def test_symbols_have_the_values_of_the_config(run):
    column, cfg, _ = run
    values = symbols(column)
    for row in table(PAGE, "symbol"):
        key = row["key of the config"].strip("`")
        if not key:
            continue
        value = OmegaConf.select(cfg, key)
        if row["symbol"] == "L":
            value = len(value)
        elif row["symbol"] == "Dc":
            value //= values["G"]
        assert value == values[row["symbol"]], key
    assert (values["T"], values["B"]) == (3, 1)
    assert values["S"] == sum(
        values["H"] // stride * (values["W"] // stride) for stride in cfg.model.decoder.strides
    )


def test_steps_are_in_the_order_of_the_code():
    source = inspect.getsource(resolve("modeling/stage.py", "DecoderStage.forward"))
    parts = ("attention(", "sample(", "mixing(", "ffn(", "refine(")
    calls = [source.index(part) for part in parts]
    assert calls == sorted(calls)
    order = [row["where"].split("`")[1] for row in STEPS]
    firsts = [order.index(f"modeling/{name}.py") for name in (
        "stageinteractor", "neck", "queries", "attention", "sampling", "mixing", "stage",
        "decoder", "targets", "matcher", "label_assigner", "criterion",
    )]
    assert firsts == sorted(firsts)
