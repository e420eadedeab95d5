"""The end of a run on one screen: its results, its files, and the next commands."""

import datetime
import shlex
import time
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from omegaconf import DictConfig

from ..config.overrides import path_override
from ..config.preflight import dataset_names
from .hooks import BestCheckpointer
from .progress import LOGGER, describe_labels, peak_memory, short

FILES = {
    "model_best.pth": "weights and state of the trainer at the best evaluation",
    "model_final.pth": "the same after the last iteration",
    "metrics.json": "all numbers, one JSON object per line",
    "events.out.tfevents.*": "the same numbers and images of predictions, for TensorBoard",
    "coco_instances_results.json": "detections of the last evaluation, in COCO's result format",
    "instances_predictions.pth": "the same detections, for torch.load",
    "detections_*_stageinteractor_results.zip": "a submission to COCO's server",
    "config.yaml": "the whole config, for --config-file",
    "log.txt": "what was printed here, and details",
}


class RunSummary(HookBase):
    """Logs a summary after the last iteration, unless training failed.

    Register it in the main process, after all hooks that record numbers.

    Args:
        output_dir: folder of the run.
        best: the hook that knows the best evaluation.
    """

    def __init__(self, output_dir: str, best: BestCheckpointer):
        self.folder, self.best = Path(output_dir), best
        self.started = time.perf_counter()

    def before_train(self):
        self.started = time.perf_counter()

    def after_train(self):
        trainer, storage = self.trainer, self.trainer.storage
        if trainer.iter < trainer.max_iter:
            return
        wall_time = datetime.timedelta(seconds=int(time.perf_counter() - self.started))
        steps = max(trainer.max_iter - trainer.start_iter, 0)
        now = f", {steps} of them now," if trainer.start_iter else ""
        lines = [f"Finished: {trainer.max_iter} iterations{now} in {wall_time}"]
        speeds = storage.histories().get("images_per_second")
        if speeds:
            lines.append(f"speed: {short(speeds.median(len(speeds.values())))} img/s")
        memory = peak_memory()
        if memory is not None:
            lines.append(f"peak memory: {memory:.0f} MiB")
        lines += filter(None, [self.best.describe(), describe_labels(storage)])
        LOGGER.info(
            "\n  ".join(lines) + describe_files(self.folder) + describe_next(self._next_commands())
        )

    def _next_commands(self) -> list[str]:
        commands = []
        checkpoints = [self.folder / name for name in ("model_best.pth", "model_final.pth")]
        checkpoint = next(filter(Path.exists, checkpoints), None)
        config, metrics = self.folder / "config.yaml", self.folder / "metrics.json"
        if checkpoint and config.exists():
            commands.append(
                f"python tools/train_net.py --config-file {quoted(config)} --eval-only "
                + path_override("train.init_checkpoint", checkpoint)
            )
        if metrics.exists():
            commands.append(
                f"python tools/visualize.py training --metrics {quoted(metrics)} "
                f"--output {quoted(self.folder / 'training.png')}"
            )
        if any(self.folder.glob("events.out.tfevents.*")):
            commands.append(f"tensorboard --logdir {quoted(self.folder)}")
        return commands


def summarize_evaluation(output_dir: str, dataset: DictConfig, has_truth: bool):
    """Log the files of an evaluation and the command that draws its detections.

    Args:
        output_dir: folder of the evaluation.
        dataset: the config's data set.
        has_truth: whether it has annotations.
    """
    folder, names = Path(output_dir), dataset_names(dataset)
    results, commands = folder / "coco_instances_results.json", []
    if has_truth and len(names) == 1 and results.exists():
        metadata = MetadataCatalog.get(names[0])
        annotations, images = metadata.get("json_file"), metadata.get("image_root")
        if annotations and images:
            commands.append(
                f"python tools/visualize.py results --annotations {quoted(annotations)} "
                f"--images {quoted(images)} --predictions {quoted(results)} "
                f"--output {quoted(folder / 'results.png')}"
            )
    LOGGER.info("Evaluated" + describe_files(folder) + describe_next(commands))


def describe_files(folder: Path) -> str:
    """A line for each known file in a folder; empty if there is none."""
    lines = []
    for pattern, meaning in FILES.items():
        found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        if found:
            lines.append(f"\n  {found[-1].name}: {meaning}")
    return f"\nFiles in {folder}:" + "".join(lines) if lines else ""


def describe_next(commands: list[str]) -> str:
    """The next commands, one a line; empty if there are none."""
    return "\nNext:" + "".join(f"\n  {command}" for command in commands) if commands else ""


def quoted(path) -> str:
    """A path, quoted for a shell."""
    return shlex.quote(str(path))
