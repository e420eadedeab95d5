#!/usr/bin/env python
"""Analyze a model's size, its decoder stages, or the detections of several models.

    python tools/analyze.py model
    python tools/analyze.py model --config-file FILE [--size 800 1280] [key=value ...]
    python tools/analyze.py stages --config-file FILE --checkpoint FILE [--output FOLDER] \\
        [key=value ...]
    python tools/analyze.py results --annotations datasets/bccd/test.json \\
        --predictions A/coco_instances_results.json B/coco_instances_results.json ...

model    Without a config, the list of all configs with the paper's AP. With one, its parameters and
         multiply-adds by part and by stage. The model runs once, on the CPU with random weights.
stages   Each stage's own metrics on the test set of the config, how much boxes change to the next
         stage, and which labels training would give with this checkpoint (the shares during
         training are labels/* in metrics.json). Of the last stage also the metrics after
         non-maximum suppression (supplement, section D). Writes stages.json and stages.png.
results  AP, AP50 and AP75 of each file, and the differences from the first, with the 95 % intervals
         that the choice of the test images leaves (paired bootstrap). They leave out the variation
         between trainings, which takes several seeds to measure.
"""

import argparse
from pathlib import Path

import _start
from tabulate import tabulate

from projects.stageinteractor.errors import UserError

# Each command imports what it needs.


def model(args):
    """Count parameters and multiply-adds of a config, or list all configs."""
    from detectron2.config import instantiate

    from projects.stageinteractor.analysis import counting
    from projects.stageinteractor.config.overrides import load_config
    from projects.stageinteractor.config.building import explain_misfits
    from projects.stageinteractor.modeling import StageInteractor

    file, size = args.config_file, tuple(args.size)
    if not (file or args.overrides):
        return show("Configs in projects/stageinteractor/configs", counting.config_table())
    if min(size) < 1:
        raise UserError("--size takes the height and the width of the image in pixels")
    cfg = load_config(file, args.overrides, ["model"])
    with explain_misfits("model"):
        built = instantiate(cfg.model)
    if not isinstance(built, StageInteractor):  # one of Detectron2's
        show(f"{file}: multiply-adds are counted in StageInteractor and AdaMixer only",
             counting.parameter_table(built))
        return
    counts, num_stages = counting.count(built, size), len(built.decoder.stages)
    show(f"{file}, an image of {size[0]} x {size[1]}", counting.part_table(built, counts))
    for title, found, unit in (
        ("Parameters by stage, M", counts.parameters, 1e6),
        ("Multiply-adds by stage, G", counts.multiply_adds, 1e9),
    ):
        show(title, counting.stage_table(found, num_stages, unit))
    names = sorted(name.partition("::")[2] for name in counts.not_counted)
    print(f"\nNot counted: norms, {', '.join(names)}")


def stages(args):
    """Evaluate each decoder stage alone, and measure how boxes and labels change."""
    from detectron2.config import instantiate
    from tqdm import tqdm

    from projects.stageinteractor.analysis.stages import stage_metrics, stage_report
    from projects.stageinteractor.config import building
    from projects.stageinteractor.files import prepare_output
    from projects.stageinteractor.inference.opening import open_model, require_stages

    cfg = building.load_resolved(args.config_file, args.overrides, training=False)
    require_stages(cfg)
    dataset = building.load_dataset(cfg, "test")
    evaluator = instantiate({
        **cfg.dataloader.evaluator, "_target_": stage_metrics.StageEvaluator, "output_dir": None,
    })
    built, *_ = open_model(args.checkpoint, cfg)
    for name in stage_report.FILES:
        output = prepare_output(args.output or f"{cfg.train.output_dir}/stages", name)
    loader = tqdm(building.build_test_loader(cfg, dataset), "images", disable=None)
    result = {
        "config": args.config_file, "checkpoint": args.checkpoint,
        "least_score": stage_metrics.LEAST_SCORE, "quantiles": stage_metrics.QUANTILES,
        **stage_metrics.analyze_stages(built, loader, evaluator),
    }
    stage_report.write_report(result, output)


def results(args):
    """Compare detections of several models on the same images, with bootstrap intervals."""
    from projects.stageinteractor.analysis import bootstrap
    from projects.stageinteractor.analysis.result_files import read_detections, read_truth
    from projects.stageinteractor.data.numbered import NumberedCOCO

    if args.resamples < 2:
        raise UserError(f"--resamples is {args.resamples}: draw at least twice")
    truth = read_truth(args.annotations)
    if not truth["annotations"]:
        raise UserError(f"{args.annotations} has no annotations to compare with")
    numbered, evaluations = NumberedCOCO(truth), []
    for path in args.predictions:
        if not (detections := read_detections(path, truth, args.annotations)):
            raise UserError(f"{path} holds no detections")
        evaluations.append(bootstrap.match_detections(numbered, detections, args.max_dets))
    full, drawn = bootstrap.bootstrap(evaluations, args.resamples, args.seed)
    print(bootstrap.describe_intervals([str(path) for path in args.predictions], full, drawn))


def show(title: str, table: list[list]):
    """Print a table whose first row is its header."""
    print(f"\n{title}\n\n{tabulate(table, 'firstrow', floatfmt='.3f', intfmt=',')}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(run):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        return command.add_argument

    option = add(model)
    option("--config-file", default="", metavar="FILE")
    option("--size", type=int, nargs=2, default=(800, 1280), metavar=("H", "W"))
    option("overrides", nargs="*", metavar="key=value")

    option = add(stages)
    option("--config-file", required=True, metavar="FILE")
    option("--checkpoint", required=True, metavar="FILE")
    option("--output", metavar="FOLDER", help="default: stages/ in train.output_dir")
    option("overrides", nargs="*", metavar="key=value")

    option = add(results)
    option("--annotations", type=Path, required=True, help="COCO file")
    option("--predictions", type=Path, required=True, nargs="+", help="COCO results")
    option("--resamples", type=int, default=1000, help="draws of images (%(default)s)")
    option("--seed", type=int, default=0, help="of the draws (%(default)s)")
    option("--max-dets", type=int, default=100, metavar="N",
           help="detections of an image and class that count (%(default)s, as in COCO)")
    return parser


@_start.command
def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
