"""All attention and all ITC (contrastive loss) of this project, on CPUs as well as GPUs. Each file has the
mathematics, a plain PyTorch version, which CPUs run, Triton kernels for NVIDIA GPUs, and a public function
that picks one. `python bench.py` checks and times both."""
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:         # Triton is for Linux only; elsewhere the kernels are defined but never run
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=lambda value: value)


def triton_supports(tensor: torch.Tensor) -> bool:
    """Whether Triton is installed and the tensor on an NVIDIA GPU of compute capability 8.0 or higher."""
    return (tensor.is_cuda and hasattr(triton, "compile") and torch.version.hip is None
            and torch.cuda.get_device_capability(tensor.device) >= (8, 0))
