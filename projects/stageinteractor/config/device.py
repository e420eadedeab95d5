"""Which device to use, and how a CPU's memory is managed."""

import ctypes
import platform

import torch

from ..errors import UserError

CPU_ALLOCATOR, MPS_ALLOCATOR = "DefaultCPUAllocator", "MPS backend out of memory"


def select_device(name: str) -> str:
    """The device for ``train.device``; ``auto`` is the first available of cuda, mps and cpu.

    Raises:
        UserError: this machine does not have the device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, is_there in available.items() if is_there)
    if not available.get(name.split(":")[0], False):
        there = ", ".join(device for device, is_there in available.items() if is_there)
        raise UserError(f"train.device={name} is not available here; available: {there}")
    return name


def keep_freed_memory():
    """Let glibc, if it is the allocator, keep freed memory for the next allocation.

    By default it returns large buffers to the system and gets them back page by page, which takes a
    fifth of the decoder's time on a CPU (docs/performance.md).
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # the maximum
        libc.mallopt(trim_threshold, 2**31 - 1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the allocator of any device raised this error."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        name in str(error) for name in (CPU_ALLOCATOR, MPS_ALLOCATOR)
    )
