"""The GPU hot path: one file per kernel, each with the mathematics, a reference in plain PyTorch, the kernel and the public
function. `python -m kernels.bench` compares and times them, `--compile-only` compiles them without a GPU."""
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ImportError:         # Triton comes for Linux only; elsewhere the kernels are text, and PyTorch does the work
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=lambda value: value)
