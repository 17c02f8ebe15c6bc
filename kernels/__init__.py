"""The GPU hot path: the two places where time and memory go, each a file with the mathematics,
plain PyTorch, the Triton kernels and the public function. `python bench.py` compares and
times them, `--compile-only` compiles them without a GPU."""
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:         # Triton comes for Linux only; elsewhere the kernels are text that nobody runs
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=lambda value: value)


def triton_supports(tensor):
    """Whether Triton is here and the tensor on a GPU that we compile for: NVIDIA, 8.0 or more."""
    return (tensor.is_cuda and hasattr(triton, "compile") and torch.version.hip is None
            and torch.cuda.get_device_capability(tensor.device) >= (8, 0))
