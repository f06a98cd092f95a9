"""Several processes for one model, one GPU each: what torchrun and accelerate launch set up.

Both start the same command once a GPU and say in RANK, WORLD_SIZE and LOCAL_RANK which process it is. Without these
variables everything here does nothing.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


def shard(model: nn.Module, blocks: Iterable[nn.Module], *, compiled: bool) -> None:
    """FSDP2: each process holds a part of every block's parameters; a block is gathered while it works."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block)
    fully_shard(model)


def state(model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool) -> dict[str, Any]:
    """Weights and optimizer state, whole; of a sharded model all processes must ask, and the first gets it."""
    if not sharded:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    weights, moments = get_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return {"model": weights, "optimizer": moments}


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, sharded: bool) -> None:
    """Load what ``state`` gave."""
    if not sharded:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )  # fmt: skip


def number(x: Tensor) -> float:
    """The value of a scalar that may be spread over processes."""
    return float(x.full_tensor() if hasattr(x, "full_tensor") else x)
