"""Signals, worker processes, devices and ranks.

Ranks exchange features and identities (ITC's keys, and to sample negatives) and captions (for ITM).
Only CLIP's loss sends gradients between ranks. Image tokens stay on their rank."""
import atexit
import contextlib
import ctypes
import datetime
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist

# at the top, because an import after `init_process_group` would keep gloo's threads alive
from torch.distributed.nn.functional import all_gather as differentiable_all_gather
from tqdm import tqdm


def end_with_parent(number=signal.SIGKILL):
    """On Linux, send this process a signal when its parent ends, even if the parent is killed."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, number)                  # PR_SET_PDEATHSIG


# ---- signals and worker processes ----------------------------------------------------------------
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):       # not on Windows
    STOP_SIGNALS.append(signal.SIGHUP)


@contextlib.contextmanager
def stop_signals():
    """Yield a list of the signals received inside the block. Ctrl-C, SIGTERM and SIGHUP (a closed
    terminal) are added to the list and do not end the process. Signals that were ignored before
    (nohup) are still ignored."""
    received = []
    previous = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start_worker(_=0):
    """Prepare a new worker process: it ignores signals, which are sent to the whole process group,
    and ends with the process that started it."""
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def parallel_map(function, jobs, title: str, chunk_size: int = 1):
    """Yield an iterator over function(job) for each job, computed on all cores, with a progress
    bar."""
    if len(jobs) == 1:                      # in this process, so that results need not be pickled
        yield map(function, jobs)
        return
    # multiprocessing.Pool would wait forever for the result of a killed worker
    with ProcessPoolExecutor(initializer=start_worker) as pool:
        try:
            yield tqdm(pool.map(function, jobs, chunksize=chunk_size), title, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def iterate_with_workers(loader):
    """Yield an iterator over a DataLoader whose workers end with the block."""
    batches = iter(loader)
    # if a worker is killed, torch's handler would raise anywhere in a step; without it, `next`
    # raises
    if loader.num_workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()     # otherwise, Python's exit would wait forever for them


# ---- devices and precision -----------------------------------------------------------------------
def choose_device(name: str) -> torch.device:
    """The device of a --device; "auto" is CUDA if available, else the CPU. Raises ValueError if the
    device cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:     # an assertion in torch without CUDA
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None


def use_device(name: str) -> torch.device:
    """`choose_device`, and make the device the current one."""
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32, several times as fast as float32
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """"bf16" or "float32" for a --precision. "auto" is bf16 on hardware that multiplies in bf16, as
    far as torch can tell: GPUs of compute capability 8.0 or higher, x86 CPUs with AVX512-BF16 or
    AMX. On other hardware, bf16 is slower than float32."""
    if name != "auto":
        return name
    has_bf16 = False
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):       # not in older torch
        cpu = torch.cpu.get_capabilities()
        has_bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return "bf16" if has_bf16 else "float32"


def autocast(precision: str, device: torch.device):
    """A context for computing in a --precision."""
    is_bf16 = choose_precision(precision, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)


# ---- ranks ---------------------------------------------------------------------------------------
def init_distributed(device_name: str) -> torch.device:
    """Join the process group if torchrun started this process; return the device of this
    process."""
    is_launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    is_cuda = choose_device(device_name).type == "cuda"
    if is_cuda and is_launched:
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = use_device(device_name)
    if is_launched:
        end_with_parent(number=signal.SIGTERM)      # if torchrun is killed, stop and save
        backend = "nccl" if is_cuda else "gloo"
        # a long timeout: the other ranks wait while rank 0 draws faces or validates the data set
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        if not is_cuda:     # a gloo thread that frees a tensor during Python's shutdown would abort
            atexit.register(dist.destroy_process_group)
    return device


def rank_and_world_size() -> tuple[int, int]:
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def rank_zero_first():
    """Run the block on rank 0 and then on all others, which reuse the files that rank 0 has
    written."""
    rank, world_size = rank_and_world_size()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world_size > 1:
        dist.barrier()


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """x (B, ...) of all processes -> (A, ...), in rank order. The gradient of x is the sum of those
    of all processes."""
    if not dist.is_initialized():
        return x
    return torch.cat(differentiable_all_gather(x.contiguous()))


def all_gather_objects(obj) -> list:
    """The `obj` of every process, in rank order; any object that can be pickled."""
    objects = [obj] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(objects, obj)
    return objects
