"""What a run writes for TensorBoard."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_pictures(folder):
    """Names of the pictures in TensorBoard's file, with (step, width, height) of each."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {
        tag: [(image.step, image.width, image.height) for image in events.Images(tag)]
        for tag in events.Tags()["images"]
    }
