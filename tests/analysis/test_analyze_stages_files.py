"""Promises of tools/analyze.py stages: what it writes, and what its errors say."""

import itertools
import json

import analyze as tool
import pytest
import torch
from PIL import Image

from projects.stageinteractor.checkpoint import ModelFile
from projects.stageinteractor.config.building import build_model
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.engine.hooks import ModelEMA
from projects.stageinteractor.errors import UserError
from projects.stageinteractor.inference.opening import fill
from support.runs import CONFIG, ROOT, overrides
from support.shapes import make_shapes
from support.stage_models import save_model

RETINANET = str(ROOT / "projects/stageinteractor/configs/retinanet_lite0_bccd.py")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), images=2, size=(64, 96), empty=True)


@pytest.fixture(scope="module")
def saved(shapes, tmp_path_factory):
    """A folder with a checkpoint, one of another model, and a data set without annotations."""
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder / "model.pth", overrides(shapes, folder))
    other = {"model": {"query_generator.content.weight": torch.zeros(10, 32)}}
    torch.save(other, folder / "other.pth")
    coco = json.loads(shapes.read_text())
    del coco["annotations"]
    (folder / "secret.json").write_text(json.dumps(coco))
    return folder


@pytest.mark.parametrize("points", ["[8]", "[8,8]"])
def test_any_number_of_stages_without_any_object(tmp_path, capsys, points):
    """What has no value is null in the file and nan in the table."""
    annotations = make_shapes(tmp_path / "data", images=1, size=(64, 96), empty=True)
    options = overrides(annotations, tmp_path, **{"model.decoder.points_per_stage": points})
    save_model(tmp_path / "model.pth", options)
    arguments = ["--config-file", str(ROOT / CONFIG), "--checkpoint", str(tmp_path / "model.pth")]
    tool.main(["stages", *arguments, *options])
    result = json.loads((tmp_path / "stages" / "stages.json").read_text())
    assert len(result["stages"]) == len(json.loads(points))
    for stage in result["stages"]:
        assert set(stage["labels"].values()) == {stage["metrics"]["AP"]} == {None}
    text = capsys.readouterr().out
    assert "nan" in text and ("from stage to stage" in text) == (len(result["stages"]) > 1)
    assert Image.open(tmp_path / "stages" / "stages.png").format == "PNG"


@pytest.mark.parametrize("name", ["stages.json", "stages.png"])
def test_a_result_is_not_overwritten(shapes, tmp_path, saved, name):
    """By default it is in the folder of the run."""
    file = tmp_path / "stages" / name
    file.parent.mkdir()
    file.write_text("mine")
    arguments = ["--config-file", str(ROOT / CONFIG), "--checkpoint", str(saved / "model.pth")]
    with pytest.raises(SystemExit, match=f"holds {name} already: choose another with --output"):
        tool.main(["stages", *arguments, *overrides(shapes, tmp_path)])
    assert file.read_text() == "mine" and len(list(file.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", RETINANET], "RetinaNet has no decoder stages"),
        (["--checkpoint", "no.pth"], "no checkpoint no.pth: check the path"),
        (["--checkpoint", "other.pth"], "does not fit the config"),
        (["--output", "other.pth/new"], "cannot write to"),
        (["model.decoder.num_heads=3"], "model: embed_dim=32"),
        (["model.decoder.num_classes=4"], "num_classes=4, but"),
        (["train.device=tpu"], "train.device=tpu is not available"),
        (["dataloader.test.dataset.json_file=no.json"], "data set no.json: no no.json"),
        (["dataloader.test.dataset.json_file=secret.json"], "secret.json has no annotations"),
    ],
)
def test_mistakes_end_with_one_line(shapes, tmp_path, monkeypatch, saved, arguments, message):
    options = overrides(shapes, tmp_path)
    monkeypatch.chdir(saved)
    given = {"--config-file": str(ROOT / CONFIG), "--checkpoint": "model.pth"}
    if arguments[0].startswith("--"):
        given[arguments[0]] = arguments[1]
        arguments = []
    if given["--config-file"] == RETINANET:
        options = [f"dataset.val={shapes}", f"dataset.images={shapes.parent / 'images'}"]
    with pytest.raises(SystemExit) as ended:
        tool.main(["stages", *itertools.chain(*given.items()), *options, *arguments])
    text = str(ended.value)
    assert message in text and text.startswith("error: ")
    assert not (tmp_path / "stages").exists()


def test_the_moving_average_is_taken_where_it_is_switched_on(shapes, tmp_path):
    options = overrides(shapes, tmp_path, **{"train.model_ema.enabled": "true"})
    cfg = load_config(str(ROOT / CONFIG), options)
    average = ModelEMA(save_model(tmp_path / "model.pth", options), 0.9).averaged
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(1)
    fresh = build_model(cfg)
    with pytest.raises(UserError, match="has no moving average"):
        fill(fresh, ModelFile.read(str(tmp_path / "model.pth")), cfg.train.model_ema)
    state = torch.load(tmp_path / "model.pth") | {"model_ema": average.state_dict()}
    torch.save(state, tmp_path / "model.pth")
    loaded = fill(fresh, ModelFile.read(str(tmp_path / "model.pth")), cfg.train.model_ema)
    assert all(map(torch.equal, loaded.parameters(), average.module.parameters()))
