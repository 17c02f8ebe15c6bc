"""Compare and time the kernels: is it right, how long does it take, how much memory does it need?

    python -m kernels.bench                     everything that runs here, as Markdown tables
    python -m kernels.bench attention           one of the two
    python -m kernels.bench --compile-only      compile every row of the kernels' tables for compute capability 8.0 (A100) and
                                                9.0 (H100), which needs no GPU, and show what it takes of registers and memory

On a CUDA GPU "ours" is the Triton kernel, elsewhere the PyTorch path of the same function. Times are medians and include the
launch, as a model sees it; memory is what is allocated beyond the inputs at its peak. All of a table is measured in one run:
compare within it.
"""
import argparse
import datetime
import itertools
import os
import platform
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kernels import attention as attention_file
from kernels import contrastive as contrastive_file
from kernels import triton
from kernels.attention import Sequences, attention, padded_attention
from kernels.contrastive import contrastive_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def setting():
    """One line that says where figures come from."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    version = getattr(triton, "__version__", "none")
    return f"{name}, torch {torch.__version__}, Triton {version}, {datetime.date.today():%d %B %Y}"


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


# ---- measuring -----------------------------------------------------------------------------------------------------
def milliseconds(run, repeats=15):
    """Median time of `run`, and the smallest and largest."""
    times = []
    for repeat in range(repeats + 3):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if repeat >= 3:                             # the first ones compile, and fill caches
            times.append(1000 * (time.perf_counter() - begin))
    times.sort()
    return times[len(times) // 2], times[0], times[-1]


def megabytes(run):
    """Most memory that `run` has allocated at any time, beyond what was there before."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    changes = sorted((event.start_ns(), event.nbytes()) for event in profile.kineto_results.events() if event.name() == "[memory]")
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak / 1e6


def measured(name, forward, backward):
    """A row of a table: forward, forward and backward, memory; or why it does not run here."""
    try:
        both = lambda: backward(forward())
        with torch.no_grad():
            alone = milliseconds(forward)
        return [name, *(f"{middle:.2f} ({least:.2f} to {most:.2f})" for middle, least, most in (alone, milliseconds(both))),
                f"{megabytes(both):.1f}"]
    except Exception as error:                      # a backend that does not take this input, a compiler that is not there
        return [name, f"does not run: {str(error).strip().splitlines()[0][:60]}", "", ""]


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


# ---- attention -----------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    """One of the three uses of attention at base size: 12 heads of 64 channels."""
    name: str
    queries: Sequences
    keys: Sequences
    kv_of: torch.Tensor | None


def cases(images):
    lengths = torch.randint(12, 66, (images,), generator=torch.Generator().manual_seed(0))
    pictures, captions = Sequences.uniform(images, 197, DEVICE), Sequences.of(lengths, DEVICE)
    threefold = Sequences.of(lengths.repeat(3), DEVICE)
    return [Case(f"{images} images of 197 tokens", pictures, pictures, None),
            Case(f"{images} captions of 12 to 65 tokens", captions, captions, None),
            Case(f"{3 * images} captions reading {images} images", threefold, pictures,
                 torch.arange(3 * images, device=DEVICE) % images)]


def inputs_of(case, dtype, heads=12, channels=64):
    torch.manual_seed(0)
    shapes = [(case.queries.tokens, heads, channels)] + [(case.keys.tokens, heads, channels)] * 2
    return [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]


def attention_errors(case, dtype):
    """Relative errors of O, dQ, dK, dV against float64."""
    inputs = inputs_of(case, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = attention(*inputs, *case[1:])
    expected = padded_attention(*exact, *case[1:])
    grad = torch.randn_like(found)
    gradients = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, exact, grad.double()))
    return [relative_error(found, expected), *(relative_error(*pair) for pair in gradients)]


def attention_rows(case, dtype):
    """Ours beside PyTorch's scaled_dot_product_attention, with padding where sequences differ in length."""
    inputs = inputs_of(case, dtype)
    def backward(out):
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    yield measured("ours", lambda: attention(*inputs, *case[1:]), backward)
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        def forward():
            with sdpa_kernel(getattr(SDPBackend, name)):
                return padded_attention(*inputs, *case[1:])
        yield measured(f"SDPA, {name.lower().replace('_attention', '')}, padded", forward, backward)


def bench_attention():
    dtypes = [torch.float16, torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float32]
    rows = [[case.name, str(dtype).removeprefix("torch."), *(f"{error:.1e}" for error in attention_errors(case, dtype))]
            for case in cases(4) for dtype in dtypes]
    print("## Attention: relative error against float64\n")
    print(markdown(["use", "type", "O", "dQ", "dK", "dV"], rows))
    dtype = dtypes[-2:][0]                          # bfloat16, or float32 where there is nothing else
    for case in cases(80 if DEVICE == "cuda" else 8):
        rows = list(tqdm(attention_rows(case, dtype), case.name, total=5, leave=False))
        print(f"\n## Attention: {case.name}, 12 heads of 64, {str(dtype).removeprefix('torch.')}\n")
        print(markdown(["", "forward, ms (range)", "forward and backward, ms (range)", "memory, MB"], rows))


# ---- contrastive loss ----------------------------------------------------------------------------------------------
def contrastive_inputs(B, Q, E):
    """Features with gradient, momentum features, batch and queue, identities, temperature: all on DEVICE."""
    torch.manual_seed(0)
    def unit(rows):
        return F.normalize(torch.randn(rows, E), dim=-1).to(DEVICE)
    identity = torch.arange(B, device=DEVICE)
    return (unit(B).requires_grad_(), unit(B), [unit(B), unit(Q)], identity, [identity, torch.full((Q,), -100, device=DEVICE)],
            torch.tensor(0.07, device=DEVICE, requires_grad=True))


def contrastive_errors(B, Q, E, alpha=0.4):
    """Relative errors of loss, dq, dtau against float64."""
    feature, momentum, keys, identity, key_identity, temperature = contrastive_inputs(B, Q, E)
    exact = [feature.detach().double().requires_grad_(), temperature.detach().double().requires_grad_()]
    found = contrastive_loss(feature, momentum, keys, identity, key_identity, temperature, alpha)
    expected = contrastive_file.reference(exact[0], momentum.double(), torch.cat(keys).double(), identity, torch.cat(key_identity),
                                          exact[1], alpha)
    gradients = zip(torch.autograd.grad(found, (feature, temperature)), torch.autograd.grad(expected, exact))
    return [relative_error(found, expected), *(relative_error(*pair) for pair in gradients)]


def contrastive_rows(B, Q, E, alpha=0.4):
    """Ours beside the direct form, which is given batch and queue in one piece."""
    feature, momentum, keys, identity, key_identity, temperature = contrastive_inputs(B, Q, E)
    joined, joined_identity = torch.cat(keys), torch.cat(key_identity)
    def backward(loss):
        torch.autograd.grad(loss, (feature, temperature))
    def direct(loss):
        return lambda: loss(feature, momentum, joined, identity, joined_identity, temperature, alpha)
    yield measured("ours", lambda: contrastive_loss(feature, momentum, keys, identity, key_identity, temperature, alpha), backward)
    yield measured("direct", direct(contrastive_file.reference), backward)
    yield measured("direct, torch.compile", direct(torch.compile(contrastive_file.reference)), backward)


def bench_contrastive(B=80, Q=61_440, E=256):
    print("## Contrastive loss: relative error against float64\n")
    print(markdown(["rows, queue, features", "loss", "dq", "dtau"],
                   [[f"{b}, {q}, {e}", *(f"{error:.1e}" for error in contrastive_errors(b, q, e))]
                    for b, q, e in ((4, 100, 16), (B, Q, E))]))
    rows = list(tqdm(contrastive_rows(B, Q, E), "contrastive loss", total=3, leave=False))
    print(f"\n## Contrastive loss, one direction: {B} rows, {Q} entries in the queue, {E} features, float32\n")
    print(markdown(["", "forward, ms (range)", "forward and backward, ms (range)", "memory, MB"], rows))


# ---- compiling without a GPU ---------------------------------------------------------------------------------------
class Shipped(NamedTuple):
    """A kernel as it is launched somewhere: all that the compiler needs to know."""
    file: str
    kernel: str
    dtype: str
    constants: dict
    num_warps: int
    num_stages: int
    capability: int


# Shared memory that one program can have, bytes, by compute capability (CUDA C++ Programming Guide, technical specifications)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# Types of arguments that are not tensors of the kernel's own type.
TYPES = {name: "*fp32" for name in ("lse", "delta", "delta_out", "queries", "temperature", "peak_out", "mass_out", "key_out")}
TYPES |= {name: "*i32" for name in ("query_starts", "key_starts", "kv_of", "readers", "reader_starts")}
TYPES |= {name: "*i64" for name in ("identity", "key_identity")}
TYPES |= {name: "i32" for name in ("blocks", "H", "B", "K", "stretch", "threshold")}
TYPES |= {"scale": "fp32", "rescale": "fp32", "seed": "i64"}


# Head dimensions to compile for, one that is no power of two among them. float16 becomes the same code as bfloat16 but for the
# type of its products, so one of it will do.
HEAD_DIMENSIONS = {"bf16": (16, 32, 64, 80, 128), "fp16": (64,), "fp32": (16, 32, 64, 128)}


def shipped():
    """The configurations in the kernels' tables at these dimensions, with and without dropout."""
    found = []
    for capability in SHARED_LIMIT:
        for dtype, dimensions in HEAD_DIMENSIONS.items():
            for kernel, d, dropout in itertools.product(("forward", "query", "key"), dimensions, (False, True)):
                meta = attention_file.tiles(kernel, d, 4 if dtype == "fp32" else 2) | {"DROPOUT": dropout}
                warps, stages = meta.pop("num_warps"), meta.pop("num_stages")
                found.append(Shipped("attention", f"{kernel}_kernel", dtype, meta, warps, stages, capability))
        for dtype, E in itertools.product(("fp32", "bf16"), (32, 64, 128, 256)):
            found.append(Shipped("contrastive", "sums_kernel", dtype, dict(E=E, BLOCK_E=E, **contrastive_file.TILES),
                                 contrastive_file.WARPS, contrastive_file.STAGES, capability))
    return found


def compile_one(config):
    """Registers per thread, spilled bytes per thread, shared memory in bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel = getattr({"attention": attention_file, "contrastive": contrastive_file}[config.file], config.kernel)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in config.constants else TYPES.get(name, f"*{config.dtype}") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constants = {(names.index(name),): value for name, value in config.constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", config.capability, 32),
                              options=dict(num_warps=config.num_warps, num_stages=config.num_stages))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers, stack, compiled.metadata.shared


def compile_all():
    """The table; an error where a configuration spills or wants more shared memory than there is."""
    if not hasattr(triton, "compile"):
        raise SystemExit("error: Triton is not installed (it comes for Linux only), so there is nothing to compile")
    configs = shipped()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(tqdm(pool.map(compile_one, configs), "compiling", total=len(configs)))
    rows, bad = [], []
    for config, (registers, stack, shared) in zip(configs, results):
        c = config.constants
        size = c.get("d", c.get("E"))
        rows.append([config.file, config.kernel, config.dtype, size, {None: "", False: "no", True: "yes"}[c.get("DROPOUT")],
                     f"{config.capability / 10}", registers, stack, f"{shared / 1024:.1f}"])
        if stack or shared > SHARED_LIMIT[config.capability]:
            bad.append(rows[-1])
    print(markdown(["file", "kernel", "type", "d or E", "dropout", "capability", "registers", "spilled bytes", "shared KB"], rows))
    if bad:
        raise SystemExit(f"error: {len(bad)} configurations spill or want too much shared memory: {bad}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=("attention", "contrastive"), help="default: both")
    parser.add_argument("--compile-only", action="store_true", help="compile for GPUs that need not be here")
    args = parser.parse_args()
    if args.compile_only:
        return compile_all()
    print(f"{setting()}\n")
    if args.which != "contrastive":
        bench_attention()
        print()
    if args.which != "attention":
        bench_contrastive()


if __name__ == "__main__":
    main()
