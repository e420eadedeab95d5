#!/usr/bin/env python
"""Check the installation, what the model computes here, or a data set before training on it.

    python tools/check.py env
    python tools/check.py model [--device DEVICE] [--json]
    python tools/check.py data --train mine/train.json --val mine/val.json \\
        --images mine/images --output mine/check [--config-file CONFIG [key=value ...]]

env shows what is installed and ends with "no problems", or with each problem and its cure. It works
where torch, Detectron2 or anything else is missing or broken.

model compares what the model computes on this device, in every precision and mode that it has, with
recorded figures of the authors' code, and prints the largest differences; then speed and versions.
It needs no data, minutes on a CPU, seconds on a GPU.

data prints what a data set in COCO format holds and all that is wrong or remarkable, as training
does before it starts. --output writes report.txt (the same, in full) and contact_sheet.png (images
with their boxes). With --config-file, it also reports images with more objects than the config has
queries, and objects that are too small at its input size.

The exit code is 1 if there is a problem, a wrong figure, or a mistake that training refuses, and 0
otherwise.
"""

import argparse
import configparser
import importlib
import json
import os
import re
import shlex
import site
import sys
from importlib.util import find_spec
from pathlib import Path

import _start

# Only what needs no package is imported here: env explains which of them are missing.
from projects.stageinteractor.config import environment

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ["numpy", "torch", "torchvision", "timm", "detectron2", "projects.stageinteractor"]
CONFIG = "projects/stageinteractor/configs/stageinteractor_r50_12ep.py"
CONFIG_FOR_CPU = "projects/stageinteractor/configs/stageinteractor_lite0_bccd.py"
CLASSES_SHOWN = 20


def check_env(_args):
    """Print facts, then problems; return the exit code."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    requirements = re.findall(r"(?m)^\w.*", setup["options"]["install_requires"])
    problems = [environment.python_problem(sys.version_info)]
    problems += environment.requirement_problems(requirements, environment.installed_version)

    print(f"{'Python':<16}{sys.version.split()[0]}, {sys.executable}")
    for name in [*SHOWN, *filter(find_spec, ["detrex"])]:  # detrex is optional
        try:
            module, error = importlib.import_module(name), None
        except Exception as caught:  # a broken package may raise anything; it is printed below
            module, error = None, caught
        problems.append(environment.import_problem(name, error))
        print(f"{name.split('.')[-1]:<16}{getattr(module, '__version__', '-')}")
        if name in ("detectron2", "detrex") and getattr(module, "__file__", None):
            print(f"{'  folder':<16}{Path(module.__file__).parent}")
            print(f"{'  origin':<16}{environment.origin(name)}")
        if name == "torch" and module:
            print(f"{'  device':<16}{environment.describe_device(module)}")
            print(f"{'  threads':<16}{module.get_num_threads()} of {os.cpu_count()} cores")

    folders = [*site.getsitepackages(), site.getusersitepackages()]
    problems.append(environment.shadow_problem(folders))
    problems.append(environment.output_problem(Path("output").resolve()))
    problems = list(filter(None, problems))
    for problem in problems:
        print(f"\nproblem: {problem.what}\n   cure: {problem.cure}")
    print(f"\n{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    return 1 if problems else 0


def check_model(args):
    """Print differences from the recordings, speed and versions; return the exit code."""
    from detectron2.utils.collect_env import collect_env_info
    from tabulate import tabulate

    from projects.stageinteractor.analysis import reproduction
    from projects.stageinteractor.config.device import select_device

    device, names = select_device(args.device), reproduction.QUANTITIES
    rows = []
    for row in reproduction.check_model(ROOT / "tests/support/golden", device):
        print(f"{row.name}: {row.verdict}", file=sys.stderr)
        rows.append(row)
    speed, yardstick_ms = reproduction.measure_speed(device)
    tolerances, versions = reproduction.TOLERANCES, collect_env_info()
    is_wrong = any(row.wrong or row.missing.startswith("FAILED") for row in rows)
    if args.json:
        results = [{**row._asdict(), "verdict": row.verdict} for row in rows]
        print(json.dumps({"device": device, "rows": results, "quantities": names,
                          "tolerances": tolerances, "speed": speed,
                          "yardstick_ms": yardstick_ms, "versions": versions}, indent=1))
        return int(is_wrong)
    table = [[row.name, *map(row.differences.get, names), row.verdict] for row in rows]
    table += [[f"tolerance of {name}", *values] for name, values in tolerances.items()]
    print(tabulate(table, ["largest difference", *names, ""], floatfmt=".1e", missingval="-"))
    times = [[name, row["median_ms"], row["ratio"]] for name, row in speed.items()]
    print("\n" + tabulate(times, ["decoder", "ms", "yardsticks"], floatfmt=".3g"))
    print(f"yardstick on {device}: {yardstick_ms:.3g} ms\n\n{versions}\n")
    print("something is WRONG" if is_wrong else "nothing is wrong")
    return int(is_wrong)


def training_command(args, has_gpu):
    """The command that trains on the data set, quoted for a shell."""
    from projects.stageinteractor.config.overrides import path_override

    paths = {key: getattr(args, key) for key in ("train", "val", "images", "val_images")}
    words = [path_override(f"dataset.{key}", path) for key, path in paths.items() if path]
    config = CONFIG if has_gpu else CONFIG_FOR_CPU
    if args.config_file:
        config, words = shlex.quote(args.config_file), [*words, *map(shlex.quote, args.overrides)]
    return " ".join(
        ["python tools/train_net.py --config-file", config, *words, "train.output_dir=output/mine"]
    )


def check_data(args):
    """Print and draw what a data set holds and what is wrong with it; return the exit code."""
    import torch

    from projects.stageinteractor.config.overrides import load_config
    from projects.stageinteractor.config.own_data import check_capacity
    from projects.stageinteractor.data.coco_file import read_tables
    from projects.stageinteractor.data.dataset_checks import Split, check_splits, describe
    from projects.stageinteractor.drawing import dataset_overview

    roots = {"train": args.images, "val": args.val_images or args.images}
    splits = {}
    for name, file in (("train", args.train), ("val", args.val)):
        if file:
            splits[name] = Split(file, roots[name] or os.path.dirname(file) or ".")
    findings = check_splits(splits)
    if args.config_file:
        findings += check_capacity(load_config(args.config_file, args.overrides), splits)
    tables = {name: read_tables(split.json_file) for name, split in splits.items()}
    mistakes = sum(finding.is_mistake for finding in findings)
    count = f"{mistakes or 'no'} mistake{'s' * (mistakes != 1)}, {len(findings) - mistakes} remarks"

    def report(num_classes, **limit):
        contents = dataset_overview.describe_splits(tables, num_classes)
        sizes = dataset_overview.describe_sizes(tables)
        return "\n\n".join(filter(None, [contents, sizes, describe(findings, **limit), count]))

    print(report(CLASSES_SHOWN))
    if args.output:
        path = args.output / "report.txt"
        text = report(None, limit=len(findings)) + "\n"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        print(f"\n{path} written")
        path = args.output / "contact_sheet.png"
        folders = {name: split.image_root for name, split in splits.items()}
        figure = dataset_overview.draw_contact_sheet(tables, folders)
        if figure:
            figure.savefig(path)
        print(f"{path} written" if figure else f"{path} left out: no image can be read")
    if args.train and args.val and not mistakes:
        if not torch.cuda.is_available():
            print("\nFetch the weights that training starts from:\npython tools/prepare_trees.py")
        print(f"\nTrain with:\n{training_command(args, torch.cuda.is_available())}")
    return 1 if mistakes else 0


@_start.command
def main(argv=None):
    """Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{env,model,data}")
    env = commands.add_parser("env", help="what is installed, and the cure of each problem")
    env.set_defaults(check=check_env)
    model = commands.add_parser("model", help="whether the model computes what it should here")
    model.set_defaults(check=check_model)
    model.add_argument("--device", default="auto", help="cuda, mps or cpu; default: the first")
    model.add_argument("--json", action="store_true", help="print JSON, for a report of a fault")
    data = commands.add_parser("data", help="what a data set holds, and what is wrong with it")
    data.set_defaults(check=check_data)
    data.add_argument("--train", metavar="FILE", help="COCO file to train on")
    data.add_argument("--val", metavar="FILE", help="COCO file to evaluate on")
    data.add_argument("--images", metavar="DIR", help="images; default: the COCO file's folder")
    data.add_argument("--val-images", metavar="DIR", help="images of --val; default: --images")
    data.add_argument("--output", type=Path, metavar="DIR",
                      help="report and pictures; replaces those in it")
    data.add_argument("--config-file", metavar="CONFIG",
                      help="config to train: also report what its model cannot find")
    data.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    argv = sys.argv[1:] if argv is None else argv
    # Overrides may stand between options, which a subparser cannot parse by itself.
    command = {"env": env, "model": model, "data": data}[parser.parse_args(argv[:1]).command]
    args = command.parse_intermixed_args(argv[1:])
    if command is data:
        if args.overrides and not args.config_file:
            data.error(f"{args.overrides[0]} needs --config-file CONFIG")
        if not (args.train or args.val):
            data.error("give --train FILE, --val FILE or both")
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
    return args.check(args)


if __name__ == "__main__":
    sys.exit(main())
