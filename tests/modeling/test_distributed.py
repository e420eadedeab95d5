"""Two processes with one image each learn what one process learns from both images."""

import pytest
import torch
from detectron2.engine import launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from support.models import build, make_image, wake


def count_bytes(sent, bucket):
    """In place of DistributedDataParallel's own sum over processes, which it is as well."""
    sent.append(bucket.buffer().nbytes)
    return allreduce_hook(None, bucket)


def gradients(batches, path):
    """Run in every process: gradients of its share of each batch, saved by the first process."""
    torch.set_num_threads(1)
    results = []
    for images in batches:
        model, sent = create_ddp_model(wake(build()).train(), device_ids=None), []
        if comm.get_world_size() > 1:
            model.register_comm_hook(sent, count_bytes)
        losses = model(images[comm.get_rank()::comm.get_world_size()])
        total = sum(losses.values())
        total.backward()
        named = {
            name.removeprefix("module."): p.grad
            for name, p in model.named_parameters() if p.grad is not None
        }
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused, "DistributedDataParallel would wait for their gradients"
        totals = comm.gather(total.item())
        loss = sum(totals) / max(len(totals), 1)
        size = sum(gradient.nbytes for gradient in named.values())
        results.append({"gradients": named, "loss": loss, "sent": sum(sent), "size": size})
    if comm.is_main_process():
        torch.save(results, path)


def test_two_processes_equal_one(tmp_path):
    """Normalisers are those of all images together, also where a process has no objects."""
    counts = [(1, 5), (3, 0), (0, 0)]
    batches = [[make_image(96, 96, objects=count) for count in pair] for pair in counts]
    for processes in (1, 2):
        path = tmp_path / f"{processes}.pth"
        launch(gradients, processes, dist_url="auto", args=(batches, path))
    single, double = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in (1, 2))
    for pair, one, two in zip(counts, single, double):
        assert two["sent"] == two["size"] > 0  # the figure that docs/many_gpus.md starts from
        # Without any object the normaliser is 1 in both cases, and processes average.
        share = 1 if sum(pair) else 0.5
        assert two["loss"] == pytest.approx(share * one["loss"], rel=1e-4)
        assert one["gradients"].keys() == two["gradients"].keys()
        largest = max(gradient.abs().max() for gradient in one["gradients"].values())
        for name, gradient in one["gradients"].items():
            error = (share * gradient - two["gradients"][name]).abs().max()
            assert error <= 1e-4 * gradient.abs().max() + 1e-6 * largest, (pair, name)
