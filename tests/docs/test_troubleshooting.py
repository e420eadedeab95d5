"""docs/troubleshooting.md: every message in it is real.

A block that begins with ``$`` is run here, in a folder that has what it needs, and must say what
the page says. Of the others, which take a broken installation, other processes or other hardware,
the message is made by the code that makes it, or its text is found in the source.
"""

import ast
import contextlib
import errno
import io
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import _start
import pytest
import torch
import train_net
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch.utils.data import DataLoader

from projects.stageinteractor.analysis.web import web_server
from projects.stageinteractor.checkpoint import SafeCheckpointer, checkpointer
from projects.stageinteractor.config import environment
from projects.stageinteractor.config.overrides import load_config
from projects.stageinteractor.engine import setup as run_setup
from projects.stageinteractor.engine.failures import explain_out_of_memory
from projects.stageinteractor.engine.processes import Interrupted
from projects.stageinteractor.engine.progress import describe_labels
from projects.stageinteractor.engine.resume import RunSettings
from projects.stageinteractor.errors import UserError
from support.pages import ROOT, read
from support.runs import CONFIG, overrides
from support.shapes import make_shapes

PAGE = "docs/troubleshooting.md"
BLOCKS = re.findall(r"^```text\n(.*?)^```$", read(PAGE), re.M | re.S)
RUN = [block for block in BLOCKS if block.startswith("$ ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands of the page are about: a tiny config, data and checkpoints."""
    root = tmp_path_factory.mktemp("here")
    train = make_shapes(root / "mine", images=6, size=(64, 96))
    coco = json.loads(train.read_text())

    def save(name, **changes):
        (root / "mine" / name).write_text(json.dumps({**coco, **changes}))

    train.rename(root / "mine/train.json")
    make_shapes(root / "other", images=3, size=(64, 96), seed=1)
    val = json.loads((root / "other/annotations.json").read_text())
    for image in val["images"]:  # beside those of training, under names of their own
        name = f"val_{image['file_name']}"
        shutil.move(root / "other/images" / image["file_name"], root / "mine/images" / name)
        image["file_name"] = name
    (root / "mine/val.json").write_text(json.dumps(val))
    corners = [
        {**a, "bbox": [*a["bbox"][:2], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]}
        for a in coco["annotations"]
    ]
    save("corners.json", annotations=corners)
    missing = [{**image, "file_name": f"no/{image['file_name']}"} for image in coco["images"]]
    save("missing.json", images=missing)
    flat = {**coco["annotations"][0], "bbox": [10, 10, 0, 5]}
    save("flat.json", annotations=[flat, *coco["annotations"][1:]])
    shutil.copytree(root / "mine/images", root / "mine/damaged")
    for name in ("0002.png", "val_0001.png"):
        damaged = root / "mine/damaged" / name
        damaged.write_bytes(damaged.read_bytes()[:3000])

    cfg = load_config(str(ROOT / CONFIG), overrides(root / "mine/train.json", "output/mine"))
    for part, name in (("train", "train"), ("test", "val")):
        cfg.dataloader[part].dataset.update(json_file=f"mine/{name}.json", image_root="mine/images")
    LazyConfig.save(cfg, str(root / "tiny.yaml"))
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    names = ["rectangle", "circle", "triangle"]
    torch.save({"model": model.state_dict(), "class_names": names}, root / "model.pth")
    torch.save({"model": model.state_dict(), "class_names": [*names[:2], "star"]},
               root / "stars.pth")
    whole = (root / "model.pth").read_bytes()
    (root / "half.pth").write_bytes(whole[:len(whole) // 2])
    torch.save({"model": SimpleNamespace()}, root / "code.pth")
    for run in ("done", "damaged"):
        (root / "output" / run).mkdir(parents=True)
    shutil.copy(root / "model.pth", root / "output/done/model_final.pth")
    (root / "output/done/detections.json").touch()
    shutil.copy(root / "half.pth", root / "output/damaged/model_final.pth")
    return root


@pytest.fixture
def say(folder, monkeypatch, capfd):
    """Run a command in that folder, in this process, and return all that it says and logs."""
    monkeypatch.chdir(folder)
    shutil.rmtree("output/mine", ignore_errors=True)
    for name in [name for name in DatasetCatalog.list() if name.startswith("mine/")]:
        DatasetCatalog.remove(name)  # it knows the folder of the images that another command had
        MetadataCatalog.remove(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    # Its log would outlive the test.
    monkeypatch.setattr(run_setup, "start_log", lambda cfg, args: None)
    logged = logging.StreamHandler(io.StringIO())
    logged.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("detectron2")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(logged)

    def run(command):
        words = shlex.split(command.replace("CONFIG", "tiny.yaml"))
        assert words[0] == "python" and words[1].startswith("tools/")
        monkeypatch.setattr(sys, "argv", [str(ROOT / words[1]), *words[2:]])
        capfd.readouterr()
        code = None
        try:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        printed = capfd.readouterr()
        last = code if isinstance(code, str) else ""
        return "\n".join([logged.stream.getvalue(), printed.out, printed.err, last])

    yield run
    logger.removeHandler(logged)


def pattern(text):
    """A block as a regular expression: ``...`` stands for anything, alone in a line for lines."""
    lines = [r"(?:.*\n)*?.*" if line == "..." else ".*".join(map(re.escape, line.split("...")))
             for line in text.strip("\n").split("\n")]
    return "\n".join(lines)


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.splitlines()[1][:60])
def test_the_command_says_what_the_page_says(block, say):
    command, _, message = block.partition("\n")
    said = say(command.removeprefix("$ "))
    assert "Traceback" not in said
    assert re.search(f"(?m)^{pattern(message)}", said), said[-3000:]


def problem(found):
    """As ``check.py env`` prints it."""
    return f"problem: {found.what}\n   cure: {found.cure}"


def out_of_memory(_):
    batch = [{"image": torch.empty(3, 800, 1199)}, {"image": torch.empty(3, 640, 1216)}]
    with pytest.raises(UserError) as caught, explain_out_of_memory(batch, is_training=True):
        torch.empty(2**60)
    return f"error: {caught.value}"


def full_disk(folder):
    run = SafeCheckpointer(torch.nn.Linear(1, 1), "output/mine", trainer=torch.nn.Linear(1, 1))
    os.makedirs("output/mine", exist_ok=True)
    run.save("model_0000249", iteration=249)

    def write(data, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(UserError) as caught:
        monkeypatch.setattr(checkpointer, "write_checkpoint", write)
        run.save("model_0000499")
    return f"error: {caught.value}"


def another_batch(_):
    settings = RunSettings(LazyConfig.load("tiny.yaml"), num_images=6)
    settings.load_state_dict({**settings.now, "images_a_step": 16})
    settings.now["images_a_step"] = 8
    return settings.changes(2000)[0]


def no_labels(_):
    return describe_labels({"labels/kept": 0.0, "labels/dropped": 1.0, "labels/gained": 0.0})


def many_workers(_):
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.warns(UserWarning) as caught:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
        DataLoader([1], num_workers=64)
    return str(caught[0].message)


def wrong_python(_):
    """The line of the Makefile, as if Python were 3.9."""
    code = re.search(r"\$\(PYTHON\) -c '(.*?)'", (ROOT / "Makefile").read_text(), re.S)[1]
    code = code.replace("\\\n\t", "").replace("$(PYTHON)", "python3")
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as caught:
        monkeypatch.setattr(sys, "version_info", (3, 9, 0))
        exec(code)
    return caught.value.code


def stopped(_):
    """What the command says of a run that a signal has stopped."""
    def load_run_config(args):
        raise Interrupted

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as caught:
        monkeypatch.setattr(train_net, "load_run_config", load_run_config)
        with contextlib.redirect_stderr(said):
            train_net.main(None)
    assert str(caught.value.code) in said.getvalue()
    return said.getvalue()


def no_torch(_):
    """What a tool says in a Python without torch."""
    said, missing = io.StringIO(), ModuleNotFoundError("No module named 'torch'")
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(said):
        monkeypatch.setattr(_start, "find_spec", lambda name: None)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
        monkeypatch.setattr(sys, "prefix", "/usr")
        monkeypatch.setattr(sys, "argv", ["tools/train_net.py"])
        monkeypatch.setattr(Path, "exists", lambda path: path == ROOT / ".venv/bin/python")
        _start.explain_missing(ModuleNotFoundError, missing, None)
    return said.getvalue()


def no_gradio(folder):
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(UserError) as caught:
        monkeypatch.setitem(sys.modules, "gradio", None)
        web_server.import_gradio(str(folder))
    return f"error: {caught.value}"


def hidden_tools(folder):
    (folder / "site/tools").mkdir(parents=True, exist_ok=True)
    (folder / "site/tools/__init__.py").touch()
    return problem(environment.shadow_problem([folder / "site"]))


# By the beginning of a block: what makes its message.
MADE = {
    "problem: detectron2 cannot": lambda _: problem(environment.import_problem(
        "detectron2", ModuleNotFoundError("No module named 'detectron2'", name="detectron2"))),
    "problem: not installed": lambda _: problem(*environment.requirement_problems(
        ["timm>=1", "hotcoco>=1.3,<2"], lambda name: None)),
    "problem: setuptools": lambda _: problem(*environment.requirement_problems(
        ["setuptools<82"], lambda name: "82.0.0")),
    "problem: ...": hidden_tools,
    "Python 3.10 to": wrong_python,
    "error: .../python3 has no torch": no_torch,
    "error: out of memory": out_of_memory,
    "error: cannot save": full_disk,
    "error: the web page": no_gradio,
    "8 images a step": another_batch,
    "stopped and saved": stopped,
    "labels: kept": no_labels,
    "This DataLoader": many_workers,
}


@pytest.mark.parametrize("start", MADE)
def test_the_code_makes_the_message(start, folder, monkeypatch):
    monkeypatch.chdir(folder)
    [block] = [block for block in BLOCKS if block.startswith(start)]
    made = MADE[start](folder)
    assert re.match(pattern(block), made), made


def literals():
    """Every text of the sources, f-strings with ``...`` for what they insert."""
    files = [*(ROOT / "projects/stageinteractor").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%\w", "...", node.value)
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..."
                              for part in node.values)


def test_all_other_messages_are_in_the_source():
    others = [block for block in BLOCKS if block not in RUN and not block.startswith((*MADE,))]
    texts = [pattern(text) for text in literals() if len(text) > 30]
    for block in others:
        message = block.strip("\n").removeprefix("error: ")
        assert any(re.fullmatch(text, message) for text in texts), message
    assert len(others) <= 10 and len(BLOCKS) >= 30
