"""A CUDA device that is not there: its tensors are torch's fake ones, those of the CPU are real.

What is computed on the device has a shape, a type and a device, but no values. An operation that
mixes devices or types fails as on a GPU, and so does whatever makes the host wait for the device,
unless the test allows it to the function that does it.
"""

import re
import traceback
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("_to_copy", "copy_")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
LIBRARIES = re.compile(r"/torch/|/detectron2/structures/")  # what they do is done for their caller


class HostWaits(Exception):
    """The host would wait for the device here."""


class PretendedGPU(TorchDispatchMode):
    """Run what is inside ``with`` as if there was a GPU.

    Args:
        allowed: functions that may wait for the device, as "file.py:function". A copy to the host
            gives them zeros, a mask takes everything, and a number that is read is 1.
    """

    def __init__(self, *allowed):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.allowed, self.waits = allowed, []

    def __enter__(self):
        self.fake.__enter__()  # below this mode; it also keeps torch from looking for a driver
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def place(self, model):
        """Move a model to the device; that may wait."""
        with self.fake:
            return model.to("cuda")

    def wait(self, what):
        """Note who makes the host wait. Raises HostWaits if that is not allowed."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__
                  and not LIBRARIES.search(frame.filename) and frame.name[0] != "<"]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].name}"
        if place not in self.allowed:
            raise HostWaits(f"{what} in {place}")
        self.waits.append(place)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [isinstance(tensor, FakeTensor) for tensor in tensors]
        goes = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not any(there) and not goes:
            with no_dispatch():
                return function(*args, **kwargs)
        if name in COPIES:
            source = there[-1] if name == "copy_" else there[0]
            target = there[0] if name == "copy_" else goes or "device" not in kwargs
            blocks = not kwargs.get("non_blocking", args[2:] == (True,))
            if source and not target:
                self.wait("a copy to the host")
                with no_dispatch():
                    dtype = kwargs.get("dtype") or tensors[-1].dtype
                    zeros = torch.zeros(tensors[-1].shape, dtype=dtype)
                    return args[0].copy_(zeros) if name == "copy_" else zeros
            if target and not source and blocks:
                self.wait("a blocking copy to the device")
        elif any(tensor.dim() for tensor, is_there in zip(tensors, there) if not is_there):
            raise AssertionError(f"{name} mixes devices: {[(t.device, t.shape) for t in tensors]}")
        if name in PRODUCTS and len({tensor.dtype for tensor in tensors}) > 1:
            raise AssertionError(f"{name} mixes types: {[tensor.dtype for tensor in tensors]}")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.wait("a mask as an index")
            return args[0].clone()
        if name == "_local_scalar_dense":
            self.wait("reading a number")
            return True
        if name in ("nonzero", "masked_select", "_unique2", "equal"):
            self.wait(name)
        return function(*args, **kwargs)


def backward(loss):
    """What ``loss.backward()`` does. Autograd's own engine asks the driver for the device."""
    pending, ready = {}, [loss.grad_fn]
    while ready:  # count what each node waits for
        for node, _ in ready.pop().next_functions:
            if node is not None:
                pending[node] = pending.get(node, 0) + 1
                if pending[node] == 1:
                    ready.append(node)
    gradients, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        run = getattr(node, "apply", node)
        inputs = [given.get(index) for index in range(len(node._input_metadata))]
        # As in autograd, a function of ours runs without a gradient too: it may have its own way.
        results = run(*inputs) if given or hasattr(node, "apply") else ()
        results = results if isinstance(results, tuple) else (results,)
        following = [edge for edge in node.next_functions if edge[0] is not None]
        if hasattr(node, "needs_input_grad"):  # a function of ours, which may take no tensors too
            results = [r for r, needed in zip(results, node.needs_input_grad) if needed]
        else:
            results = [r for r, edge in zip(results, node.next_functions) if edge[0] is not None]
        results = results or [None] * len(following)
        for result, (target, index) in zip(results, following):
            if result is not None:
                expected = target._input_metadata[index]
                result = result.sum_to_size(expected.shape).to(expected.dtype)
                held = gradients.setdefault(target, {})
                held[index] = held[index] + result if index in held else result
            pending[target] -= 1
            if not pending[target]:
                ready.append(target)
