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

from projects.stageinteractor.analysis.own_png import prepare_png, save_png
from projects.stageinteractor.errors import UserError

# Each command imports what it needs: curves of training are drawn without torch.


def data(args) -> Figure:
    """Draw images as the model sees them after augmentation, several times each."""
    from projects.stageinteractor.analysis.augmented_images import draw_data
    from projects.stageinteractor.config.building import load_resolved

    at_least(1, count=args.count, repeats=args.repeats)
    at_least(0, seed=args.seed)
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

    at_least(1, count=args.count)
    if not 0 < args.iou <= 1:
        raise UserError(f"--iou is {args.iou:g}: it must be more than 0 and at most 1")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold:g}: it must be between 0 and 1")
    truth = read_truth(args.annotations)
    detections = read_detections(args.predictions, truth, args.annotations)
    judged = judge(truth, [d for d in detections if d["score"] >= args.threshold], args.iou)
    print(result_pictures.describe_results(truth, judged, args.iou))
    chosen = result_pictures.choose(judged, args.count, args.order)
    return result_pictures.draw_results(truth, judged, chosen, args.images, args.threshold)


def tsne(args) -> Figure:
    """Draw features of objects' queries by class (t-SNE), of one or several checkpoints."""
    from projects.stageinteractor.analysis import query_features
    from projects.stageinteractor.checkpoint.model_file import fetch
    from projects.stageinteractor.config.building import load_resolved

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
    names, found = query_features.compare_features(
        cfgs, args.checkpoint, classes=args.classes, count=args.count, per_class=args.per_class
    )
    separations = [query_features.separation(one.vectors, one.classes) for one in found]
    print(query_features.describe_features(found[0], separations, labels, names))
    return query_features.draw_features(found, separations, labels, names, args.seed)


def stages(args):
    """Show what every decoder stage does with the queries of one picture; --output is a folder."""
    from projects.stageinteractor.analysis.stages.inspection import check_number, inspect_picture
    from projects.stageinteractor.inference import load_detector
    from projects.stageinteractor.inference.opening import require_stages

    check_number(args.queries, args.count)
    detector = load_detector(args.checkpoint, args.config_file, args.overrides)
    require_stages(detector.model)
    files = args.image, args.checkpoint, args.config_file
    queries = inspect_picture(
        detector, args.image, args.output, annotations=args.annotations, queries=args.queries,
        count=args.count, title=", ".join(Path(file).name for file in files if file),
    )
    if not args.annotations:
        print("no labels: --annotations FILE shows what the picture's objects teach each stage")
    num_stages = len(detector.model.decoder.stages)
    print(f"{'queries' if len(queries) > 1 else 'query'} {', '.join(map(str, queries))} in "
          f"{num_stages} stage{'s' if num_stages > 1 else ''}")
    print(f"{Path(args.output, 'stages.html')} and query_N.png of each written")


def at_least(least: int, **options: int):
    """Raises UserError if an option is less."""
    for name, value in options.items():
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")


def query_numbers(text: str) -> list[int]:
    """Parse whole numbers with commas between them, for argparse."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        message = f"{text} is not a list of query numbers, such as 3,57"
        raise argparse.ArgumentTypeError(message) from None


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
    option("--count", type=int, default=6, help="images to draw (%(default)s)")
    option("--repeats", type=int, default=4, help="versions of an image (%(default)s)")
    option("--seed", type=int, default=0, help="of the augmentation (%(default)s)")
    option("overrides", nargs="*", metavar="key=value")

    option = add(training)
    option("--metrics", type=Path, nargs="+", required=True, help="metrics.json of each run")

    option = add(results)
    option("--annotations", type=Path, required=True, help="COCO file")
    option("--images", type=Path, required=True, help="folder of its images")
    option("--predictions", type=Path, required=True, help="COCO results")
    option("--count", type=int, default=6, help="images to draw (%(default)s)")
    option("--threshold", type=float, default=0.3, help="least score (%(default)s)")
    option("--iou", type=float, default=0.5, help="least IoU to be found (%(default)s)")
    option("--order", choices=["error", "spread"], default="error",
           help="images with most errors first, or spread over the data set (%(default)s)")

    option = add(tsne)
    option("--checkpoint", nargs="+", required=True, metavar="FILE")
    option("--config-file", nargs="+", metavar="FILE",
           help="one for each checkpoint, or one for all; default: config.yaml beside each")
    option("--labels", nargs="+", metavar="NAME", help="name of each checkpoint in the picture")
    option("--classes", nargs="+", default=[], metavar="NAME", help="default: the most frequent")
    option("--count", type=int, default=500, help="test images (%(default)s)")
    option("--per-class", type=int, default=200, help="most objects of a class (%(default)s)")
    option("--seed", type=int, default=0, help="of t-SNE (%(default)s)")
    option("overrides", nargs="*", metavar="key=value",
           help="not directly after an option that takes several values")

    option = add(stages, "the folder to write to")
    option("--checkpoint", required=True, metavar="FILE")
    option("--config-file", metavar="FILE", help="default: the checkpoint's own")
    option("--image", required=True, metavar="FILE")
    option("--annotations", metavar="FILE", help="COCO file that lists the picture")
    option("--queries", type=query_numbers, default=[], metavar="N,N", help="instead of the best")
    option("--count", type=int, default=6, metavar="N",
           help="how many of the best, and of those that borrow labels (%(default)s)")
    option("overrides", nargs="*", metavar="key=value")
    return parser


@_start.command
def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    if args.draw is stages:  # writes several files itself
        return stages(args)
    output = Path(args.output)
    prepare_png(output)
    save_png(args.draw(args), output)


if __name__ == "__main__":
    main()
