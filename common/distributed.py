"""One process or many."""
import atexit
import datetime
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported once a process group is there, it would keep that alive for good


def init_distributed():
    """Join the other processes when started by torchrun; returns this one's device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        # the others wait while the first process draws or checks the data
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
        if not cuda:        # a thread of gloo that frees a tensor while Python ends aborts the process
            atexit.register(dist.destroy_process_group)
    return torch.device("cuda" if cuda else "cpu")


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(x):
    """x (B, ...) of every process in the order of their ranks, (A, ...); without gradient."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def all_gather_objects(thing):
    """A list of every process's `thing`, which is pickled."""
    everyone = [None] * rank_and_world_size()[1]
    dist.all_gather_object(everyone, thing)
    return everyone


def autocast(config, device):
    enabled = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
