"""Where a run goes on, and what is different there from when it was saved."""

import os
from typing import Any, Dict, List

from detectron2.utils import comm
from omegaconf import DictConfig

from ..checkpoint import SafeCheckpointer
from ..errors import UserError


class RunSettings:
    """Goes into checkpoints; knows those of the checkpoint that was loaded.

    Args:
        cfg: the config, its schedule fitted to the data.
        num_images: images of the training set.
    """

    def __init__(self, cfg: DictConfig, num_images: int):
        self.in_epochs = cfg.train.epochs is not None
        self.now = {
            "images_a_step": cfg.dataloader.train.total_batch_size * cfg.train.accumulation_steps,
            "processes": comm.get_world_size(),
            "learning_rate": float(cfg.optimizer.lr),
            "max_iter": cfg.train.max_iter,
            "num_images": num_images,
        }
        self.saved: Dict[str, Any] = {}

    def state_dict(self) -> Dict[str, Any]:
        return self.now

    def load_state_dict(self, state: Dict[str, Any]):
        self.saved = dict(state)

    def first_iteration(self, iteration: int) -> int:
        """Where a run goes on that was saved after `iteration`, counted from 0.

        A schedule in epochs goes on at the same epoch, whatever the images a step are now. No
        further than the end, after which a run may have been saved once more.
        """
        done = min(iteration + 1, self.saved.get("max_iter", iteration + 1))
        before, now = self.saved.get("images_a_step"), self.now["images_a_step"]
        if self.in_epochs and before is not None:
            done = done * before // now
        return min(done, self.now["max_iter"])

    def changes(self, first: int) -> List[str]:
        """A line for each difference: what it changes.

        Args:
            first: iteration at which training goes on.
        """
        pairs = {name: (self.saved[name], self.now[name]) for name in self.saved}
        changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        lines = []
        if "images_a_step" in changed:
            before, now = changed["images_a_step"]
            count = "the same epoch, which is" if self.in_epochs else "as many steps, that is"
            lines.append(
                f"{now} images a step instead of {before}: training goes on after {count} "
                f"iteration {first}, with the images that are next; the learning rate stays"
            )
        if "processes" in changed:
            before, now = changed["processes"]
            lines.append(
                f"{now} processes instead of {before}: images come in the same order, but are "
                "grouped by wide and tall for another number of processes"
            )
        if "learning_rate" in changed:
            before, now = changed["learning_rate"]
            lines.append(
                f"the learning rate of the run, {before:g}, stays: optimizer.lr={now:g} takes "
                "effect with train.init_checkpoint=FILE in another train.output_dir"
            )
        if "max_iter" in changed and "images_a_step" not in changed:
            before, now = changed["max_iter"]
            lines.append(f"{now} iterations instead of {before}: the schedule is stretched to them")
        if "num_images" in changed:
            before, now = changed["num_images"]
            lines.append(f"{now} training images instead of {before}: they come in another order")
        return lines


def checkpoint_to_resume(checkpointer: SafeCheckpointer) -> str:
    """The file from which a run goes on, as the main process finds it; nothing without one.

    Raises:
        UserError: it cannot be read, or a process does not see it.
    """
    found, problem = "", ""
    if comm.is_main_process():
        try:
            found = checkpointer.get_checkpoint_file()
        except UserError as error:
            problem = str(error)
    found, problem = comm.all_gather((found, problem))[0]
    if problem:
        raise UserError(problem)
    if found and not all(comm.all_gather(os.path.isfile(found))):
        raise UserError(
            f"not all machines see {found}: train.output_dir has to be a folder that they share"
        )
    return found
