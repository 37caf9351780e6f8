"""The device that a worker computes on: what it is called, what it can do, and how it fails."""

import os
import platform
import resource
import socket
from dataclasses import replace

import torch

from diffcolor_core import DiffColor, ModelError


def compiled(pipe: DiffColor) -> DiffColor:
    """The same with compiled steps of optimisation. Raises ModelError where PyTorch's compiler does not work."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=pipe.checkpoint.device))
    except RuntimeError as error:
        reason, node = str(error).strip().partition("\n")[0], socket.gethostname()
        raise ModelError(
            f"PyTorch's compiler does not work on {node} ({reason}): install a C++ compiler, or leave out --compile"
        ) from error
    return DiffColor(replace(pipe.checkpoint, compiled=True), pipe.settings)


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has an exception of its own for the GPU. Its CPU, NVIDIA's libraries and Triton have these words."""
    words = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def is_accelerator_fault(error: RuntimeError) -> bool:
    """An error of CUDA or of its libraries other than a lack of memory: the process's CUDA context is lost."""
    words = ("CUDA error", "cuDNN error", "CUDA driver error", "Triton Error [CUDA]")
    known = isinstance(error, torch.AcceleratorError) or any(word in str(error) for word in words)
    return known and not is_out_of_memory(error)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated GPU memory, or this process's peak resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
