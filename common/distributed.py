"""Processes and what they gather, without gradient: momentum features and identities (ITC's keys), student
features (to sample negatives) and captions (for ITM); never image tokens."""
import atexit
import datetime
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # unused; a later import, with a process group, would keep gloo's threads alive


def init_distributed() -> torch.device:
    """Join the process group if torchrun started this process; return the device of this process."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
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
