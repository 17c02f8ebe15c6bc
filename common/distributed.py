"""Processes and what they gather, without gradient: momentum features and identities (ITC's keys), student
features (to sample negatives) and captions (for ITM); never image tokens."""
import atexit
import contextlib
import ctypes
import datetime
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
import torch.distributed as dist
import torch.distributed.nn  # unused; a later import, with a process group, would keep gloo's threads alive
from tqdm import tqdm


def init_child(_=0, ignored=(signal.SIGINT,), at_parents_end=signal.SIGKILL):
    """Have this process ignore signals, and receive another one when its parent ends (on Linux), however."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, at_parents_end)          # PR_SET_PDEATHSIG


@contextlib.contextmanager
def parallel_map(function, jobs, title: str, chunk_size: int = 1):
    """Yield an iterator over function(job) for each job, computed on all cores, with a progress bar. Raises
    ValueError if a worker process is killed. (multiprocessing.Pool would wait for its result for ever.)"""
    if len(jobs) == 1:                              # in this process: the results need not be pickled
        yield map(function, jobs)
        return
    with ProcessPoolExecutor(initializer=init_child) as pool:
        try:
            yield tqdm(pool.map(function, jobs, chunksize=chunk_size), title, len(jobs))
        except BrokenProcessPool:
            raise ValueError(f"{title}: a worker process was killed, perhaps because memory ran out; start "
                             f"again") from None
        finally:
            pool.shutdown(cancel_futures=True)


def init_distributed() -> torch.device:
    """Join the process group if torchrun started this process; return the device of this process."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        init_child(ignored=(), at_parents_end=signal.SIGTERM)   # if torchrun is killed, stop and save
        # a long timeout: the other ranks wait while rank 0 draws faces or validates the data set
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
        if not cuda:        # a gloo thread that frees a tensor during Python's shutdown aborts the process
            atexit.register(dist.destroy_process_group)
    return torch.device("cuda" if cuda else "cpu")


def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """x (B, ...) of all processes -> (A, ...), in rank order, without gradient."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return x.detach()
    chunks = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(chunks, x.detach().contiguous())
    return torch.cat(chunks)


def all_gather_objects(obj) -> list:
    """The `obj` of every process (any object that can be pickled), in rank order."""
    objects = [None] * rank_and_world_size()[1]
    dist.all_gather_object(objects, obj)
    return objects


def autocast(config, device: torch.device):
    enabled = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
