"""Triton kernels for NVIDIA GPUs from A100 on. A first reading can skip this folder: on all other
devices, attention.py and losses.py compute the same in plain PyTorch. `python bench.py` checks and
times both."""
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:     # Triton is for Linux only; elsewhere the kernels are defined, but never run
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=lambda value: value)


def triton_supports(tensor: torch.Tensor) -> bool:
    """Whether Triton is installed and the tensor on an NVIDIA GPU of compute capability 8.0 or
    higher."""
    return (tensor.is_cuda and hasattr(triton, "compile") and torch.version.hip is None
            and torch.cuda.get_device_capability(tensor.device) >= (8, 0))
