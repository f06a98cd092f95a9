"""Several processes for one model, one GPU each: what torchrun and accelerate launch set up.

Both start the same command once a GPU and say in RANK, WORLD_SIZE and LOCAL_RANK which process it is. Without these
variables everything here does nothing.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def join(device: str) -> None:
    """Join the group that the environment describes (NCCL on CUDA, else gloo); again does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def barrier() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()
