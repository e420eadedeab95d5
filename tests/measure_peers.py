"""Time this project's detectors beside other ones, for docs/performance.md.

    pip install transformers ultralytics
    python tests/measure_peers.py [--runs R]

Whole detectors with random weights take turns on one image of 640 x 640, on one CPU thread. The
figures are CPU time as a multiple of tools/benchmark.py's yardstick. A detector whose library is
missing is not run.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tools", "")]

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports its start and stop

# ruff: noqa: E402
import _start  # noqa: F401  (silences warnings)
import torch
import torchvision
from tabulate import tabulate

from projects.stageinteractor.analysis.benchmarks import randomize_zero_weights
from projects.stageinteractor.analysis.timing import Work, measure_rows
from projects.stageinteractor.config.device import keep_freed_memory
from projects.stageinteractor.inference import open_model

SIZE = 640
CONFIGS = ROOT / "projects/stageinteractor/configs"


def ours(config):
    def make():
        options = ["train.device=cpu"]
        model = open_model(None, CONFIGS / f"{config}.py", options).model
        randomize_zero_weights(model)
        image = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)
        return model, lambda: model([{"image": image}])

    return make


def of_transformers(name, **options):
    def make():
        import transformers

        config = getattr(transformers, f"{name}Config")(**options)
        model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
        image = torch.rand(1, 3, SIZE, SIZE)
        return model, lambda: model(pixel_values=image)

    return make


def faster_rcnn():
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=SIZE, max_size=SIZE
    ).eval()
    image = torch.rand(3, SIZE, SIZE)
    return model, lambda: model([image])


def yolo():
    import ultralytics

    model = ultralytics.YOLO("yolo26m.yaml").model.eval().fuse(verbose=False)
    image = torch.rand(1, 3, SIZE, SIZE)
    return model, lambda: model(image)


RESNET = {"use_pretrained_backbone": False}
PEERS = {  # with the AP of COCO's val2017 that their authors publish
    "StageInteractor R50, 100 queries": (ours("stageinteractor_r50_12ep"), 44.8),
    "StageInteractor R50, 300 queries": (ours("stageinteractor_r50_300q_36ep"), 48.9),
    "AdaMixer R50, 100 queries": (ours("adamixer_r50_12ep"), 42.7),
    "RT-DETRv2 R50": (of_transformers("RTDetrV2"), 53.4),
    "D-FINE-L": (of_transformers("DFine"), 54.0),
    "YOLO26m": (yolo, 53.1),
    "DAB-DETR R50": (of_transformers("DabDetr", **RESNET), 42.2),
    "Conditional DETR R50": (of_transformers("ConditionalDetr", **RESNET), 40.9),
    "Deformable DETR R50": (of_transformers("DeformableDetr", **RESNET), 44.5),
    "Faster R-CNN R50-FPN, torchvision": (faster_rcnn, 37.0),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    keep_freed_memory()
    works, parameters = {}, {}
    for name, (make, _) in PEERS.items():
        try:
            model, run = make()
        except ImportError as error:
            print(f"{name}: not run, {error.name} is missing")
            continue
        works[name] = Work(run)
        parameters[name] = sum(value.numel() for value in model.parameters()) / 1e6
    rows, yardstick_ms = measure_rows(works, runs, "cpu")
    print(f"torch {torch.__version__}, yardstick: {yardstick_ms:.1f} ms\n")
    table = [
        [name, parameters[name], row["ratio"],
         " to ".join(f"{value / yardstick_ms:.1f}" for value in row["spread_ms"]), PEERS[name][1]]
        for name, row in rows.items()
    ]
    header = ["", "M parameters", "time, yardsticks", "quartiles", "published AP"]
    print(tabulate(table, header, floatfmt=".1f"))


if __name__ == "__main__":
    main()
