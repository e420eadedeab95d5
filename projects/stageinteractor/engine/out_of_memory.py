"""Running out of memory: what was being computed then, and what takes less."""

import contextlib
from collections.abc import Iterator

from ..config.device import is_out_of_memory
from ..errors import UserError


@contextlib.contextmanager
def explain_out_of_memory(batch: list[dict], is_training: bool) -> Iterator[None]:
    """Explain it, if what runs inside takes more memory than there is.

    Args:
        batch: what the model is given, a dictionary an image.
        is_training: whether there is a backward pass.

    Raises:
        UserError: in place of the allocator's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        shapes = [tuple(image["image"].shape[-2:]) for image in batch if "image" in image]
        height, width = (max(sides) for sides in zip(*shapes)) if shapes else (0, 0)
        first = (
            f"out of memory with {len(batch)} images a process, padded to {height} x {width} "
            f"pixels: {str(error).splitlines()[0]}"
        )
        smaller = "smaller images (short_edge_length and max_size in dataloader.{}.mapper)"
        if is_training:
            what = (
                "Take fewer images at once (a smaller dataloader.train.total_batch_size, with "
                "train.accumulation_steps for the same step), model.decoder.checkpoint_stages=true,"
                f" train.amp.enabled=true, or {smaller.format('train')}"
            )
        else:
            what = "Take fewer images at once (dataloader.test.batch_size), or "
            what += smaller.format("test")
        raise UserError(f"{first}\n{what}") from error
