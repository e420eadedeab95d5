"""Pages for newcomers: what they name is there, what they link to too, and their overrides work."""

import copy
import re
import sys

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.visualizer import Visualizer
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from projects.stageinteractor.config.overrides import apply_override, current_value, load_config
from support.pages import ROOT, code_spans, links, read, table
from support.runs import CONFIG, overrides

PAGES = [
    "docs/from_image_to_detections.md",
    "docs/from_mmdet_and_detrex.md",
    "docs/troubleshooting.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs/ideas").glob("*.md"))),
]
TRANSLATION = PAGES[1]
R50 = str(ROOT / "projects/stageinteractor/configs/stageinteractor_r50_12ep.py")
FOLDERS = ("", "projects/stageinteractor/", "projects/stageinteractor/configs/")
KEY = re.compile(r"(model|train|dataloader|optimizer|lr_multiplier|dataset)\.[\w.]+")
# Of other projects, or of a shell, and said to be so.
ELSEWHERE = {
    "stageinteractor_r50_1x_coco.py", "which python",
    "tools/analyze_model.py", "tools/visualize_data.py",  # detrex's
}


@pytest.fixture(scope="module")
def sources():
    """Every word of the code, and of the names of its files."""
    files = [path for folder in ("projects", "tools", "configs")
             for path in (ROOT / folder).rglob("*.py")]
    text = " ".join(path.read_text() + f" {path.stem} {path.name}" for path in files)
    return {*re.findall(r"\w+", text)}


@pytest.fixture(scope="module")
def cfg():
    return load_config(R50, [])


def spans(page):
    """Code of a page, without the column that says what things are called elsewhere."""
    text = read(page)
    if page == TRANSLATION:
        text = re.sub(r"(?m)^\|.*?(?<!\\)\|", "", text)
    return code_spans(text)


def is_override(span):
    """Whether it is one or several ``key=value``."""
    return all(re.match(r"\+?[a-z_]+(\.\w+)+=", word) for word in span.split())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    assert [str(path) for path in links(page) if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_overrides_are_accepted(page, cfg):
    for span in filter(is_override, spans(page)):
        fresh = copy.deepcopy(cfg)
        for text in span.split():
            apply_override(fresh, text)
            override = OverridesParser.create().parse_override(text)
            value = current_value(fresh, override.key_or_group, is_new=False)
            assert callable(value) or value == override.value(), text


def test_half_of_the_translation_can_be_tried():
    """A page without overrides would pass the test above."""
    rows = table(TRANSLATION, "here")
    with_override = [row for row in rows if any(map(is_override, code_spans(row["here"])))]
    assert len(rows) > 60 and len(with_override) > 30


@pytest.mark.parametrize("page", PAGES)
def test_keys_and_files_and_names_exist(page, cfg, sources):
    for span in spans(page):
        if is_override(span) or span in ELSEWHERE:
            continue
        if re.fullmatch(r"[\w/.]+\.(py|md|sh|cfg)", span):
            assert any((ROOT / folder / span).exists() for folder in FOLDERS) or (
                span.startswith("detectron2/")), span
        elif KEY.fullmatch(span):
            current_value(cfg, span, is_new=False)
        elif re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", span):
            assert {*span.split(".")} <= sources or (ROOT / span).exists(), span


def test_one_picture_is_predicted_as_the_page_says(tmp_path, monkeypatch, capsys):
    options = overrides(tmp_path / "no.json", tmp_path)
    cfg = load_config(str(ROOT / CONFIG), options)
    LazyConfig.save(cfg, str(tmp_path / "tiny.yaml"))
    names = ["rectangle", "circle", "triangle"]
    weights = {"model": instantiate(cfg.model).state_dict(), "class_names": names}
    torch.save(weights, tmp_path / "model.pth")
    Image.new("RGB", (96, 64)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    [code] = re.findall(r"^```python\n(.*?)^```$", read(TRANSLATION), re.M | re.S)
    variables = {}
    exec(code.replace("CONFIG", "tiny.yaml"), variables)
    found = variables["found"]
    assert found.image_size == (64, 96) and len(found) == 10
    picture = Visualizer(np.zeros((64, 96, 3)), variables["detector"].metadata)
    assert picture.draw_instance_predictions(found).get_image().shape == (64, 96, 3)
    assert any(name in capsys.readouterr().out for name in names)
