#!/usr/bin/env python
"""Pictures of data, training, detections and features.

    python tools/visualize.py data --config-file CONFIG --output data.png [key=value ...]
    python tools/visualize.py training --metrics RUN/metrics.json ... --output curves.png
    python tools/visualize.py results --annotations datasets/trees/val.json \\
        --images datasets/trees/images --predictions RUN/eval/coco_instances_results.json \\
        --output results.png
    python tools/visualize.py tsne --checkpoint RUN/model_best.pth ... --output tsne.png

Drawn by Detectron2's Visualizer and matplotlib. `COMMAND --help` says more about each.
"""

import argparse
from pathlib import Path

import _start
from matplotlib.figure import Figure
from PIL import Image

from projects.stageinteractor.errors import UserError

SOFTWARE = "stageinteractor tools/visualize.py"  # noted in the pictures, to know them again

# What a command needs is imported by it: curves of training do without torch.


def data(args) -> Figure:
    """Images as the model sees them after augmentation, several times each."""
    from projects.stageinteractor.config.building import load_resolved
    from projects.stageinteractor.analysis.augmented_images import draw_data

    at_least(1, count=args.count, repeats=args.repeats)
    at_least(0, seed=args.seed)
    cfg = load_resolved(args.config_file, args.overrides, training=args.split == "train")
    return draw_data(cfg, args.split, args.count, args.repeats, args.seed)


def training(args) -> Figure:
    """Losses, AP and learning rate of one or several runs."""
    from projects.stageinteractor.drawing.curves import draw_training

    return draw_training(args.metrics)


def results(args) -> Figure:
    """Detections beside the ground truth, images with most errors first; prints the errors."""
    from projects.stageinteractor.analysis import result_pictures as of_results
    from projects.stageinteractor.analysis.mistakes import judge

    at_least(1, count=args.count)
    if not 0 < args.iou <= 1:
        raise UserError(f"--iou is {args.iou:g}: more than 0, at most 1")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold:g}: 0 to 1")
    coco, detections = of_results.read_results(args.annotations, args.predictions)
    judged = judge(coco, [d for d in detections if d["score"] >= args.threshold], args.iou)
    print(of_results.describe_results(coco, judged, args.iou))
    chosen = of_results.choose(judged, args.count, args.order)
    return of_results.draw_results(coco, judged, chosen, args.images, args.threshold)


def tsne(args) -> Figure:
    """Features of the queries of objects by class, of one or several checkpoints."""
    from projects.stageinteractor.checkpoint.model_file import fetch
    from projects.stageinteractor.config.building import load_resolved
    from projects.stageinteractor.analysis import query_features as of_features

    at_least(1, count=args.count)
    at_least(2, per_class=args.per_class)
    at_least(0, seed=args.seed)
    number = len(args.checkpoint)
    files = args.config_file or [Path(file).with_name("config.yaml") for file in args.checkpoint]
    labels = args.labels or ["/".join(Path(file).parts[-2:]) for file in args.checkpoint]
    files = files * number if len(files) == 1 else files
    for option, given in (("--config-file", files), ("--labels", labels)):
        if len(given) != number:
            raise UserError(f"{len(given)} of {option}, but {number} of --checkpoint")
    for checkpoint in args.checkpoint:
        fetch(checkpoint)
    cfgs = [load_resolved(str(file), args.overrides, training=False) for file in files]
    names, found = of_features.compare_features(
        cfgs, args.checkpoint, classes=args.classes, count=args.count, per_class=args.per_class
    )
    separations = [of_features.separation(one.vectors, one.classes) for one in found]
    print(of_features.describe_features(found[0], separations, labels, names))
    return of_features.draw_features(found, separations, labels, names, args.seed)


def at_least(least: int, **options: int):
    """Raises UserError if an option is less."""
    for name, value in options.items():
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: at least {least}")


def check_output(path: Path):
    """Make the folder of the picture to write, which may take the place of an earlier one of ours.

    Raises:
        UserError: the name ends otherwise than in .png, or another file would be lost.
        OSError: the folder cannot be made.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path}: a PNG file is written, its name ends in .png")
    if path.exists():
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                is_ours = picture.info.get("Software") == SOFTWARE
        except OSError:  # no picture
            is_ours = False
        if not is_ours:
            raise UserError(f"{path} is no picture of this tool: choose another --output")
    path.parent.mkdir(parents=True, exist_ok=True)


def make_parser() -> argparse.ArgumentParser:
    """The command line, whose commands share what they have in common."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared, sampled, configured = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    shared.add_argument("--output", type=Path, required=True, help="the PNG file to write")
    sampled.add_argument("--count", type=int, default=6, help="images to draw (%(default)s)")
    configured.add_argument("--seed", type=int, default=0, help="of what is random (%(default)s)")
    configured.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="of the config; not right behind an option that takes several values",
    )

    def add(draw, *parents) -> argparse.ArgumentParser:
        command = commands.add_parser(
            draw.__name__, parents=[shared, *parents], help=draw.__doc__, description=draw.__doc__
        )
        command.set_defaults(draw=draw)
        return command

    command = add(data, sampled, configured)
    command.add_argument("--config-file", required=True, metavar="FILE")
    command.add_argument("--split", choices=["train", "test"], default="train")
    command.add_argument(
        "--repeats", type=int, default=4, help="versions of an image (%(default)s)"
    )
    command = add(training)
    command.add_argument("--metrics", type=Path, nargs="+", required=True, help="metrics.json")
    command = add(results, sampled)
    command.add_argument("--annotations", type=Path, required=True, help="COCO file")
    command.add_argument("--images", type=Path, required=True, help="folder of its images")
    command.add_argument("--predictions", type=Path, required=True, help="COCO results")
    command.add_argument("--threshold", type=float, default=0.3, help="least score (%(default)s)")
    command.add_argument(
        "--iou", type=float, default=0.5, help="with which a box is found (%(default)s)"
    )
    command.add_argument(
        "--order", choices=["error", "spread"], default="error",
        help="images with most errors first, or images spread over the data set (%(default)s)",
    )
    command = add(tsne, configured)
    command.add_argument("--checkpoint", nargs="+", required=True, metavar="FILE")
    command.add_argument(
        "--config-file", nargs="+", metavar="FILE",
        help="of each checkpoint, or of all; default: config.yaml beside each",
    )
    command.add_argument("--labels", nargs="+", metavar="NAME", help="of the checkpoints")
    command.add_argument(
        "--classes", nargs="+", default=[], metavar="NAME", help="default: the most frequent ones"
    )
    command.add_argument("--count", type=int, default=500, help="test images (%(default)s)")
    command.add_argument(
        "--per-class", type=int, default=200, help="objects of a class, at most (%(default)s)"
    )
    return parser


@_start.command
def main(argv: list[str] = None):
    args = make_parser().parse_args(argv)
    check_output(args.output)
    done = "replaced" if args.output.exists() else "written"
    args.draw(args).savefig(args.output, format="png", metadata={"Software": SOFTWARE})
    print(f"{args.output} {done}")


if __name__ == "__main__":
    main()
