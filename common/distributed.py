"""Signals, worker processes, devices and ranks. Ranks exchange, without gradients, momentum features and
identities (ITC's keys), student features (to sample negatives) and captions (for ITM), not image tokens."""
import atexit
import contextlib
import ctypes
import datetime
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.nn  # unused; a later import, with a process group, would keep gloo's threads alive
from tqdm import tqdm


def end_with_parent(number=signal.SIGKILL):
    """Have this process receive a signal when its parent ends, even if that is killed (on Linux)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, number)                  # PR_SET_PDEATHSIG


# ---- signals and worker processes ----------------------------------------------------------------
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def stop_signals():
    """Yield a list of the signals received inside the block: Ctrl-C, SIGTERM and SIGHUP (a closed terminal)
    do not end the process, so look at the list. Signals that were ignored before (nohup) still are."""
    received = []
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        if previous[number] != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start_worker(_=0):
    """Called in each new worker process: signals to the whole group are for the process that started it, with
    which it ends."""
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def parallel_map(function, jobs, title: str, chunk_size: int = 1):
    """Yield an iterator over function(job) for each job, computed on all cores, with a progress bar."""
    if len(jobs) == 1:                              # in this process: the results need not be pickled
        yield map(function, jobs)
        return
    # multiprocessing.Pool would wait for the result of a killed worker for ever
    with ProcessPoolExecutor(initializer=start_worker) as pool:
        try:
            yield tqdm(pool.map(function, jobs, chunksize=chunk_size), title, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def iterate_with_workers(loader):
    """Yield an iterator over a DataLoader whose workers end with the block."""
    batches = iter(loader)
    if loader.num_workers and hasattr(signal, "SIGCHLD"):   # torch's handler raises anywhere in a step if a
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # worker is killed; without it, `next` raises
    try:
        yield batches
    finally:                                        # or Python's exit would wait for them for ever
        if loader.num_workers:
            batches._shutdown_workers()


# ---- devices and precision -----------------------------------------------------------------------
def choose_device(name: str) -> torch.device:
    """The device of --device; "auto" is CUDA if there is any, else the CPU. Raises ValueError if it cannot be
    used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:         # torch without CUDA fails with an assertion
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None


def use_device(name: str) -> torch.device:
    """`choose_device`, which becomes the current device."""
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32 is several times as fast as full float32
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """"bf16" or "float32" for a --precision; "auto" is bf16 where the hardware multiplies in it, if torch can
    tell: GPUs from compute capability 8.0 on, x86 CPUs with AVX512-BF16 or AMX. Elsewhere it is slower."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bf16 = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return "bf16" if has_bf16 else "float32"


def autocast(precision: str, device: torch.device):
    is_bf16 = choose_precision(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)


# ---- ranks ---------------------------------------------------------------------------------------
def init_distributed(device_name: str) -> torch.device:
    """Join the process group if torchrun started this process; return the device of this process."""
    is_launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    cuda = choose_device(device_name).type == "cuda"
    if cuda and is_launched:
        device_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = use_device(device_name)
    if is_launched and not dist.is_initialized():
        end_with_parent(number=signal.SIGTERM)      # if torchrun is killed, stop and save
        # a long timeout: the other ranks wait while rank 0 draws faces or validates the data set
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
        if not cuda:        # a gloo thread that frees a tensor during Python's shutdown aborts the process
            atexit.register(dist.destroy_process_group)
    return device


def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def rank_zero_first():
    """Run the block on rank 0, then on all others, which find what it has downloaded, drawn or indexed."""
    rank, world_size = rank_and_world_size()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world_size > 1:
        dist.barrier()


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """x (B, ...) of all processes -> (A, ...), in rank order, without gradient."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return x.detach()
    chunks = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(chunks, x.detach().contiguous())
    return torch.cat(chunks)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag of any process is True."""
    if rank_and_world_size()[1] == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def all_gather_objects(obj) -> list:
    """The `obj` of every process (any object that can be pickled), in rank order."""
    objects = [obj] * rank_and_world_size()[1]
    if len(objects) > 1:
        dist.all_gather_object(objects, obj)
    return objects
