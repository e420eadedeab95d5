"""Promises of the documentation: its commands can be typed, its links and pictures are there."""

import argparse
import configparser
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import export
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

from projects.stageinteractor.checkpoint import SafeCheckpointer
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.config.portable_config import portable_config
from projects.stageinteractor.data import ResizeShortestEdgeBilinear
from projects.stageinteractor.inference import load_detector
from support.annotated import make_voc, make_yolo
from support.documented import PAGES, PRINTED, commands, configs, expand, reason_not_to_run
from support.pages import ROOT, links, read
from support.released_files import light_state, save_released
from support.runs import CONFIG, environment, overrides
from support.shapes import make_shapes

COMMANDS = list(dict.fromkeys(commands()))
# Those that several pages have, once.
RUN = {expand(c.text): c for c in COMMANDS if reason_not_to_run(c) is None}.values()

TILE = "2019_YELL_2_541000_4977000_image_crop_x0499_y0000.png"  # of the demo, in the README


def name_of(command):
    return f"{command.page}: {command.text[:60]}"


# ---- every command can be typed


class Parsed(Exception):
    """Carries what a command line was read as."""


@functools.cache
def build(config, model_overrides):
    """Instantiate a config's model; done once for each."""
    instantiate(load_config(config, list(model_overrides)).model)


def parse(words, monkeypatch, root):
    """Read the arguments of a tool as the tool does; its config has to make a model."""
    # By its own name: `tools` is detrex's in an environment that has detrex.
    module = importlib.import_module(Path(words[0]).stem)
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    if not inspect.signature(module.main).parameters:  # it has no arguments at all
        assert len(words) == 1
        return
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            args = getattr(module, "parse_arguments", module.main)(words[1:])
        except Parsed as parsed:
            args = parsed.args[0]
    assert isinstance(args, argparse.Namespace)
    configs = getattr(args, "config_file", None) or []
    for config in [configs] if isinstance(configs, str) else configs:
        if re.fullmatch("output/(demo|mine)/config.yaml", config):
            continue  # a run writes it
        path = str(root / config if config == "small.yaml" else ROOT / config)
        options = list(getattr(args, "overrides", getattr(args, "opts", [])))
        load_config(path, options)
        build(path, tuple(text for text in options if text.startswith("model.")))


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    write_tiny_config(folder / "small.yaml", folder / "none.json")
    return folder


def write_tiny_config(path, annotations):
    """The configuration of the demo, made tiny, as a run writes its own."""
    config = load_config(str(ROOT / CONFIG), overrides(annotations, "output/run"))
    LazyConfig.save(config, str(path))


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_every_command_can_be_typed(command, monkeypatch, tiny_config):
    words = shlex.split(expand(command.text))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", read("Makefile"), re.M)
    elif words[0] == "torchrun":
        args = torchrun_parser().parse_args(words[1:])
        parse([args.training_script, *args.training_script_args], monkeypatch, tiny_config)
    elif words[0] == "sbatch":
        assert (ROOT / words[2]).is_file()
        parse(["tools/train_net.py", *words[3:]], monkeypatch, tiny_config)
    elif words[0] == "pip" and "[" in words[-1]:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert re.search(r"\[(.*)\]", words[-1])[1] in setup["options.extras_require"]
    elif words[0] == "python" and not command.text.endswith("..."):
        parse(words[1:], monkeypatch, tiny_config)


@pytest.mark.parametrize("page, path", [*configs()])
def test_config_variables_name_files(page, path):
    assert (ROOT / path).is_file()


def test_the_documentation_has_commands():
    """Else the tests here would prove nothing."""
    old_names = {"check_dataset.py", "convert_dataset.py"}  # the changelog alone names these
    tools = {path.name for path in (ROOT / "tools").glob("[!_]*.py")} - old_names
    named = {name for name in tools for command in COMMANDS if f"tools/{name}" in command.text}
    assert named == tools, "every tool has a documented command"
    assert len(COMMANDS) > 50 and len(RUN) > 20


# ---- those that need no COCO, GPU or hours work


def run_shell(text, folder):
    """Run a line in a shell whose python is this one."""
    variables = environment()
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, env=variables, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkout in which someone has data and two runs behind them; see `expand` for the names."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "projects", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for split in ("train", "val"):
        made = make_shapes(folder / split, images=4, seed=len(split))
        shutil.copytree(folder / split / "images", folder / "mine/images" / split)
        coco = json.loads(made.read_text())
        for image in coco["images"]:
            image["file_name"] = f"{split}/{image['file_name']}"
        (folder / f"mine/{split}.json").write_text(json.dumps(coco))
    write_tiny_config(folder / "small.yaml", folder / "mine/val.json")
    images = "dataloader.{}.dataset.image_root=mine/images"
    places = " ".join(map(images.format, ("train", "test")))
    train = "python tools/train_net.py --config-file small.yaml"
    run_shell(f"{train} {places} train.output_dir=run", folder)
    run_shell(f"{train} --eval-only {places} "
              "train.output_dir=run train.init_checkpoint=run/model_best.pth", folder)
    for copy in ("other", "output/demo", "output/mine", "output/other"):
        shutil.copytree(folder / "run", folder / copy)
    for name in ("model.pth", "model_final.pth"):
        shutil.copy(folder / "run/model_best.pth", folder / name)
    trees = folder / "datasets/trees"
    shutil.copytree(folder / "mine/images", trees / "images")
    shutil.copy(folder / "mine/images/val/0001.png", trees / "images" / TILE)
    coco = json.loads((folder / "mine/val.json").read_text())
    coco["images"][0]["file_name"] = TILE
    (trees / "val.json").write_text(json.dumps(coco))
    make_voc(folder)
    (folder / "VOC/ImageSets/Main").mkdir(parents=True)
    for split in ("train.txt", "val.txt"):
        shutil.move(folder / "VOC" / split, folder / "VOC/ImageSets/Main")
    yolo = make_yolo(folder)
    shutil.copytree(yolo, folder, dirs_exist_ok=True)
    make_media(folder)
    return folder


def make_media(folder):
    """photo.jpg, aerial.png, folder/, many/ and clip.mp4."""
    picture = Image.open(folder / "mine/images/val/0001.png").convert("RGB")
    picture.save(folder / "photo.jpg")
    picture.resize((700, 600)).save(folder / "aerial.png")
    for name in ("folder/a.png", "many/deep/b.png"):
        (folder / name).parent.mkdir(parents=True)
        picture.save(folder / name)
    size = picture.size[0] // 2 * 2, picture.size[1] // 2 * 2
    video = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, size)
    for _ in range(3):
        video.write(np.ascontiguousarray(np.asarray(picture.resize(size))[:, :, ::-1]))
    video.release()


@pytest.mark.slow
def test_make_demo(finished, tmp_path):
    """As the Makefile has it, with a tiny model, and without the download."""
    folder, python = tmp_path / "checkout", tmp_path / "python"
    shutil.copytree(finished, folder, symlinks=True)
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    installed = folder / "venv/.stageinteractor-installed"
    installed.parent.mkdir()
    installed.touch()
    python.write_text(f"""#!/bin/sh
        [ "$1" = tools/prepare_trees.py ] || exec {sys.executable} "$@"
    """)
    python.chmod(0o755)
    config = LazyConfig.load(str(folder / "small.yaml"))
    for part, name in (("train", "mine/train.json"), ("test", "mine/val.json")):
        config.dataloader[part].dataset.update(
            json_file=name, image_root="datasets/trees/images"
        )
    LazyConfig.save(config, str(folder / "demo.yaml"))
    run_shell(f"make demo VENV=venv PY={python} CONFIG=demo.yaml TREES=datasets/trees OUTPUT=made",
              folder)
    for name in ("model_best.pth", "training.png", "results.png",
                 "eval/coco_instances_results.json"):
        assert (folder / "made" / name).stat().st_size > 1000, name


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=name_of)
def test_commands_that_need_no_coco_gpu_or_hours_run(command, finished, tmp_path):
    folder = tmp_path / "checkout"
    shutil.copytree(finished, folder, symlinks=True)
    text = expand(command.text)
    if "convert.py checkpoint" in text:
        make_released(folder)
        (folder / shlex.split(text)[4]).unlink(missing_ok=True)
    if "convert.py dataset" in text:
        shutil.rmtree(folder / "mine")
    if "init_checkpoint=model.onnx" in text:
        run_shell("python tools/export.py --checkpoint model.pth --format onnx --output exported "
                  "&& mv exported/model.onnx .", folder)
    if "output_dir=output/mine" in text:  # it begins the run that the others look at
        shutil.rmtree(folder / "output/mine")
    # Its config has another model than the released file, whose place one of ours takes.
    text = re.sub(r"init_checkpoint=released\.pth", "init_checkpoint=model.pth", text)
    if re.search(r"train_net|analyze\.py stages|tsne", text) and "dataset." not in text:
        text += " dataset.train=mine/train.json dataset.val=mine/val.json"
        text += " dataset.images=mine/images"
    printed = run_shell(text, folder)
    for part, line in PRINTED.items():
        assert not re.search(part, text) or re.search(line, printed), printed[-2000:]
    for option in re.findall(r"--output (\S+)|output_dir=(\S+)", text):
        assert (folder / "".join(option)).exists()


@pytest.mark.slow
def test_detections_are_corrected_and_learned(finished, tmp_path):
    """The commands of docs/correct_detections.md in their order, with detections for labels."""
    folder = tmp_path / "checkout"
    shutil.copytree(finished, folder, symlinks=True)
    shutil.copytree(folder / "mine/images/train", folder / "new")
    detected, *others = [c.text for c in COMMANDS if c.page == "docs/correct_detections.md"]
    loop, voc = others[:3], others[-1]
    run_shell(f"{detected} --threshold 0", folder)
    found = json.loads((folder / "found/detections.json").read_text())
    assert len(found["images"]) == 4 and len(found["annotations"]) > 4
    for text in loop:
        run_shell(text, folder)
    assert (folder / "output/corrected/model_final.pth").is_file()
    compare_boxes(found, json.loads((folder / "corrected/train.json").read_text()))
    run_shell(f"{detected} --threshold 0".replace("yolo", "voc").replace("found", "found_voc"),
              folder)
    run_shell(voc.replace("found", "found_voc").replace("corrected", "corrected_voc"), folder)
    compare_boxes(found, json.loads((folder / "corrected_voc/all.json").read_text()))
    places = "dataset.train=found/detections.json dataset.images=."  # in the page's table
    run_shell(f"{loop[-1]} train.output_dir=output/coco {places}", folder)


def compare_boxes(found, converted):
    """Detections and the labels that were made from them: the same boxes of the same classes."""
    def boxes(coco):
        names = {item["id"]: item["name"] for item in coco["categories"]}
        files = {item["id"]: Path(item["file_name"]).name for item in coco["images"]}
        return sorted(
            (files[item["image_id"]], names[item["category_id"]], *item["bbox"])
            for item in coco["annotations"] if min(item["bbox"][2:]) > 0
        )

    for expected, box in zip(boxes(found), boxes(converted), strict=True):
        assert box[:2] == expected[:2]
        assert box[2:] == pytest.approx(expected[2:], abs=0.03)


def make_released(folder):
    """released.pth as the authors publish it, and here.pth converted from it."""
    save_released(folder, light_state("swin_s"))
    run_shell("python tools/convert.py checkpoint released.pth here.pth", folder)


@pytest.mark.parametrize("line", PRINTED.values(), ids=PRINTED)
def test_a_page_shows_what_is_printed(line):
    assert any(re.search(line, read(page)) for page in PAGES)


# ---- links


def anchors(page):
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S),
                          re.M)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {word.strip().replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert [str(path) for path in links(page) if not path.exists()] == []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", read(page)):
        if "://" not in target:
            other = (ROOT / page).parent / target if target else ROOT / page
            assert anchor in anchors(other.relative_to(ROOT) if target else page), (target, anchor)


def test_every_page_is_linked():
    """From the README, over other pages."""
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            ahead += links(page.relative_to(ROOT))
    pages = {(ROOT / page).resolve() for page in PAGES}
    assert pages - seen - {ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"} == set()


@pytest.mark.parametrize("page", PAGES)
def test_pictures_can_be_shown(page):
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", read(page)):
        file = (ROOT / page).parent / target
        assert file.stat().st_size < 2**20
        Image.open(file).load()


def python_of(page):
    return re.findall(r"^```python\n(.*?)^```$", read(page), re.M | re.S)


def test_the_python_of_the_readme_runs(tiny_config, monkeypatch, tmp_path):
    """With a checkpoint, which has its config, and a picture in their places."""
    make_detector_files(tiny_config, tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(python_of("README.md")[0].replace("FILE", "model.pth"), names)
    assert len(names["instances"]) == 10 and names["instances"].image_size == (300, 200)
    assert [found["height"] for found in names["several"]] == [300, 300]


def make_detector_files(tiny_config, folder):
    """A checkpoint with its config, one without, and pictures."""
    cfg = load_config(str(tiny_config / "small.yaml"), [])
    resize = LazyCall(ResizeShortestEdgeBilinear)(short_edge_length=80, max_size=100)
    cfg.dataloader.test.mapper.augmentations = [resize]
    names = [{"id": i, "name": str(i)} for i in range(3)]
    model = instantiate(cfg.model)
    SafeCheckpointer(model, str(folder), config=portable_config(cfg, names)).save("model")
    torch.save({"model": model.state_dict()}, folder / "other.pth")
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name in ("photo", "a", "b"):
        Image.fromarray(noise).save(folder / f"{name}.jpg", exif=turned)


@pytest.mark.slow
def test_the_python_of_deployment_runs(tiny_config, monkeypatch, tmp_path):
    """Its first lines with checkpoints and the exported file, then what needs no project."""
    make_detector_files(tiny_config, tmp_path)
    monkeypatch.chdir(tmp_path)
    export.main(["--checkpoint", "model.pth", "--format", "onnx", "--output", "out",
                 "--threshold", "0"])
    os.rename("out/model.onnx", "model.onnx")
    ours, plain, program, *_ = python_of("docs/deploy.md")
    names = {}
    exec(ours.replace("CONFIG", str(tiny_config / "small.yaml")), names)
    assert len(names["instances"]) == len(names["plain"]["scores"]) == 10
    exec(plain, names)
    assert names["image"].shape == (3, 100, 67)  # as the EXIF tag turns it, shrunk to a third
    detector = load_detector("model.onnx")
    seen = detector.prepare("photo.jpg")["image"].numpy().astype(int)
    assert np.abs(names["image"] - seen).max() <= 1  # grey levels
    expected = detector("photo.jpg", as_dicts=True)
    found = [[score, *box] for _, score, box in names["shown"]]
    in_rows = np.column_stack([expected["scores"], expected["boxes"]])
    assert np.array(found) == pytest.approx(in_rows, abs=0.02)
    export.main(["--checkpoint", "model.pth", "--format", "torch", "--output", "out"])
    os.rename("out/model.pt2", "model.pt2")
    exec(program, names)
    assert names["scores"].numpy().shape == (1, 10) and names["names"] == ["0", "1", "2"]
