#!/usr/bin/env python
"""Draw pictures of data, training, detections, features and decoder stages.

    python tools/visualize.py data --config-file CONFIG --output data.png [key=value ...]
    python tools/visualize.py training --metrics RUN/metrics.json ... --output curves.png
    python tools/visualize.py results --annotations datasets/trees/val.json \\
        --images datasets/trees/images --predictions RUN/eval/coco_instances_results.json \\
        --output results.png
    python tools/visualize.py tsne --checkpoint RUN/model_best.pth ... --output tsne.png
    python tools/visualize.py stages --checkpoint RUN/model_best.pth --image IMAGE \\
        --annotations COCO_FILE --output FOLDER

`COMMAND --help` explains each command and its options.
"""

import argparse
from pathlib import Path

import _start
from matplotlib.figure import Figure
from PIL import Image

from projects.stageinteractor.errors import UserError

SOFTWARE = "stageinteractor tools/visualize.py"  # noted in its pictures, to recognise them later

# Each command imports what it needs: curves of training are drawn without torch.


def data(args) -> Figure:
    """Draw images as the model sees them after augmentation, several times each."""
    from projects.stageinteractor.analysis.augmented_images import draw_data
    from projects.stageinteractor.config.building import load_resolved

    cfg = load_resolved(args.config_file, args.overrides, training=args.split == "train")
    return draw_data(cfg, args.split, args.count, args.repeats, args.seed)


def training(args) -> Figure:
    """Draw losses, AP and learning rate of one or several runs."""
    from projects.stageinteractor.drawing.curves import draw_training

    return draw_training(args.metrics)


def results(args) -> Figure:
    """Draw detections beside the ground truth, and count the mistakes."""
    from projects.stageinteractor.analysis import result_pictures
    from projects.stageinteractor.analysis.mistakes import judge
    from projects.stageinteractor.analysis.result_files import read_detections, read_truth

    truth = read_truth(args.annotations)
    detections = read_detections(args.predictions, truth, args.annotations)
    judged = judge(truth, [d for d in detections if d["score"] >= args.threshold], args.iou)
    print(result_pictures.describe_results(truth, judged, args.iou))
    chosen = result_pictures.choose(judged, args.count, args.order)
    return result_pictures.draw_results(truth, judged, chosen, args.images, args.threshold)


def tsne(args) -> Figure:
    """Draw features of objects' queries by class (t-SNE), of one or several checkpoints."""
    from projects.stageinteractor.analysis.query_features import draw_features
    from projects.stageinteractor.checkpoint.model_file import fetch
    from projects.stageinteractor.config.building import load_resolved

    labels = args.labels or ["/".join(Path(file).parts[-2:]) for file in args.checkpoint]
    if len(labels) != len(args.checkpoint):
        raise UserError(f"{len(labels)} of --labels, but {len(args.checkpoint)} of --checkpoint")
    for file in args.checkpoint:
        fetch(file)  # which names a missing one
    files = [args.config_file or Path(file).with_name("config.yaml") for file in args.checkpoint]
    cfgs = [load_resolved(str(file), args.overrides, training=False) for file in files]
    return draw_features(cfgs, args.checkpoint, labels)


def stages(args):
    """Show what every decoder stage does with the queries of one picture; --output is a folder."""
    from projects.stageinteractor.analysis.stages.inspection import inspect_picture
    from projects.stageinteractor.inference import load_detector
    from projects.stageinteractor.inference.opening import require_stages

    detector = load_detector(args.checkpoint, args.config_file, args.overrides)
    require_stages(detector.model)
    files = args.image, args.checkpoint, args.config_file
    queries = inspect_picture(
        detector, args.image, args.output, annotations=args.annotations, queries=args.queries,
        count=args.count, title=", ".join(Path(file).name for file in files if file),
    )
    if not args.annotations:
        print("no labels: --annotations FILE shows what the picture's objects teach each stage")
    numbers = ", ".join(map(str, queries))
    print(f"queries {numbers} in {len(detector.model.decoder.stages)} stages")
    print(f"{Path(args.output, 'stages.html')} and query_N.png of each written")


def is_replaceable(path: Path) -> bool:
    """Return whether there is no such file, or one that this tool has written."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == SOFTWARE
    except FileNotFoundError:
        return True
    except OSError:  # not a PNG file
        return False


def number(least: float, most: float = float("inf"), kind: type = int):
    """Make a type for argparse: numbers of a kind from ``least`` to ``most``."""
    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    return number


def query_numbers(text: str) -> list[int]:
    """Parse whole numbers with commas between them, for argparse."""
    return [int(part) for part in text.split(",")]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(draw, output: str = "the PNG file to write"):
        text = draw.__doc__
        command = commands.add_parser(draw.__name__, help=text, description=text)
        command.set_defaults(draw=draw)
        command.add_argument("--output", required=True, help=output)
        return command.add_argument

    option = add(data)
    option("--config-file", required=True, metavar="FILE")
    option("--split", choices=["train", "test"], default="train")
    option("--count", type=number(1), default=6, help="images to draw (%(default)s)")
    option("--repeats", type=number(1), default=4, help="versions of an image (%(default)s)")
    option("--seed", type=number(0), default=0, help="of the augmentation (%(default)s)")
    option("overrides", nargs="*", metavar="key=value")

    option = add(training)
    option("--metrics", type=Path, nargs="+", required=True, help="metrics.json of each run")

    option = add(results)
    option("--annotations", type=Path, required=True, help="COCO file")
    option("--images", type=Path, required=True, help="folder of its images")
    option("--predictions", type=Path, required=True, help="COCO results")
    option("--count", type=number(1), default=6, help="images to draw (%(default)s)")
    option("--threshold", type=number(0, 1, float), default=0.3, help="least score (%(default)s)")
    option("--iou", type=number(0.01, 1, float), default=0.5,
           help="least IoU to be found (%(default)s)")
    option("--order", choices=["error", "spread"], default="error",
           help="images with most errors first, or spread over the data set (%(default)s)")

    option = add(tsne)
    option("--checkpoint", nargs="+", required=True, metavar="FILE")
    option("--config-file", metavar="FILE", help="of all; default: config.yaml beside each")
    option("--labels", nargs="+", metavar="NAME", help="name of each checkpoint in the picture")
    option("overrides", nargs="*", metavar="key=value",
           help="not directly after an option that takes several values")

    option = add(stages, "the folder to write to")
    option("--checkpoint", required=True, metavar="FILE")
    option("--config-file", metavar="FILE", help="default: the checkpoint's own")
    option("--image", required=True, metavar="FILE")
    option("--annotations", metavar="FILE", help="COCO file that lists the picture")
    option("--queries", type=query_numbers, default=[], metavar="N,N", help="instead of the best")
    option("--count", type=number(1, 12), default=6, metavar="N",
           help="how many of the best, and of those that borrow labels (%(default)s)")
    option("overrides", nargs="*", metavar="key=value")
    return parser


@_start.command
def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    if args.draw is stages:  # writes several files itself
        return stages(args)
    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: a PNG file is written, so its name must end in .png")
    if not is_replaceable(output):
        raise UserError(f"{output} is not a picture of this tool: choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    args.draw(args).savefig(output, format="png", metadata={"Software": SOFTWARE})
    print(f"{output} written")


if __name__ == "__main__":
    main()
