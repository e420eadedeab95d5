"""The commands in the documentation, as a person would type them, and how each is proven."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from support.pages import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [
        *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("projects/**/*.md")
    ]
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PROGRAM = re.compile(r"(python|make|torchrun|pip|git|sbatch|source|tensorboard) ")
VARIABLE = re.compile(r"([A-Z]+)=\(?(.*?)\)?$")


class Command(NamedTuple):
    """A command as it stands in a page, on one line and without its comment."""

    page: str
    text: str


def commands() -> Iterator[Command]:
    """Those in blocks of code, and those for this project's tools between backticks.

    A page's shell variables, such as DATA=(...), are inserted, except for $CONFIG.
    """
    for page in PAGES:
        variables = {}
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = [found[2] for found in BLOCK.finditer(text) if found[1] in ("", "bash", "sh")]
        for line in re.sub(r"\\\n\s*", "", "".join(blocks)).splitlines():
            line = re.sub(r"\s+#.*", "", line)
            if assigned := VARIABLE.match(line):
                variables[f'"${{{assigned[1]}[@]}}"'] = assigned[2]
            for name, value in variables.items():
                line = line.replace(name, value)
            if PROGRAM.match(line):
                yield Command(page, line)
        for span in re.findall(r"`(python tools/[^`]+)`", BLOCK.sub("", text)):
            yield Command(page, " ".join(span.split()))


def configs() -> Iterator[tuple[str, str]]:
    """What pages set CONFIG to: page and path."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        yield from ((page, path) for path in re.findall(r"^CONFIG=(.*)$", text, re.M))


def expand(text: str) -> str:
    """A command with everything that it says may be added, and nothing left to fill in.

    The names are those of `finished` in tests/docs/test_documentation.py.
    """
    text = text.replace("configs/CONFIG.py", "configs/stageinteractor_lite0_bccd.py")
    text = text.replace("configs/NAME.py", "configs/stageinteractor_lite0_trees.py")
    text = text.replace("--config-file ...", "--config-file CONFIG")
    text = text.replace("[ANOTHER/metrics.json ...]", "OTHER/metrics.json")
    text = text.replace(" OVERRIDES", "").replace("SEED", "1")
    text = re.sub(r"\[(?=-|key=)([^]]*)\]", r"\1", text)  # optional parts, but no lists
    text = text.replace("key=value ...", "train.seed=1").replace("key=value", "train.seed=1")
    values = {
        r"--num-gpus \d": "--num-gpus 1",
        r"--nproc-per-node \d": "--nproc-per-node 1",
        r"--(num-gpus|nproc-per-node) N": r"--\1 1",
        r"--annotations FILE": "--annotations mine/val.json",
        r"dataset\.(train|val)=FILE": r"dataset.\1=mine/\1.json",
        r"dataset\.images=FOLDER": "dataset.images=mine/images",
        r"--output FOLDER": "--output output/folder",
        r"\bCOCO_FILE\b": "mine/val.json",
        r"\bIMAGE\b": "mine/images/val/0001.png",
        r"\$?\bCONFIG\b": "small.yaml",
        r"\bFILE\b": "model.pth",
        r"\bRUN\b": "run",
        r"\bOTHER\b": "other",
    }
    for pattern, value in values.items():
        text = re.sub(pattern, value, text)
    return text


# What is not run, by what is in it, and where it is tried instead.
REASONS = {
    r"^make demo": "minutes: tests/docs/test_documentation.py makes it small",
    r"^make (install|test|audit|check|lint)": "CI calls it",
    r"check\.py model|make verify": "minutes: tests/analysis/test_reproduction.py",
    r"measure_gpu\.py": "needs a GPU, and hours",
    r"^pip |install_detectron2": "tests/tools/test_installation.py; CI tests what it installs",
    r"^git clone": "needs a network",
    r"^source ": "the tests run in this environment",
    r"^tensorboard": "serves until Ctrl-C",
    r"^sbatch": "needs Slurm: tests/engine/test_slurm.py has a stand-in",
    r"--nnodes 2": "needs two machines: tests/engine/test_machines.py makes them",
    r"--camera": "needs a camera: tests/analysis/test_detect_videos.py has a stand-in",
    r"web_demo\.py": "serves until Ctrl-C: tests/analysis/test_web_page.py",
    r"prepare_trees\.py": "downloads: tests/tools/test_demo_data.py has a stand-in for the network",
    r"benchmark\.py": "minutes: run small by their own tests",
    r"configs/stageinteractor_(r50|swin)": "needs COCO or hours",
    r"datasets/(bccd|BCCD)|output/bccd": "needs BCCD, and hours",
    r"lite0_(overfit|trees)\.py dataset|NAME\.py": "hours: tests/modeling/test_overfit.py",
    r"small_detr": "many minutes: tests/plugins/test_in_detectors.py runs it small",
    r"--num-gpus 8": "8 processes: tests/engine/test_processes.py runs two",
    r"\bfound/|\bcorrected\b|new/\*": "one loop: test_detections_are_corrected_and_learned runs it",
    r"\.\.\.$": "a beginning, not a command",
}


# A line that is printed, and shown in a page, by what is in the command.
PRINTED = {
    r"tools/demo\.py": r"\d+ (image|frame)s?(, \d+ frames?)?, \d+ detections? with score >= 0\.3",
    r"--check ": r"\d+ detections above 0\.05 in both, \d+ in one alone; boxes differ by \S+ p",
    r"clip\.mp4": r"clip\.mp4: \d+ frames at [\d.]+ a second -> \S+/clip\.webm",
    r"visualize\.py stages": r"queries [\d, ]+ in \d+ stages",
    r"check\.py data": r"no mistakes, \d+ remarks?",
    r"visualize\.py results": r"class +objects +found +confused +missed +false: duplicate",
    r"train_net(?!.*eval-only)": r"iter: \d+/\d+ +loss: .*labels: kept \d+% dropped \d+% gained",
    r"eval-only": r"bbox, % +AP +AP50 +AP75 +APs +APm +APl",
    r"analyze\.py results": r"\d+\.\d \(\d+\.\d to \d+\.\d\)",
    r"analyze\.py stages": r"stage +AP +AP50 +AP75 +AR +labels kept +labels dropped +labels gained",
    r"released\.pth here\.pth": r"\d+ entries converted, \d+ without effect left out",
}


def reason_not_to_run(command: Command) -> str | None:
    """Why no test runs a command as it stands; None for one that is run."""
    found = (why for pattern, why in REASONS.items() if re.search(pattern, command.text))
    return next(found, None)
