"""One process or many: Accelerate says which, and wraps the model for it.

Every process takes its part of the same global batch, so that N processes with batch B compute what one process with
batch N * B does. Only the first one writes.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graph import QcError


class Processes:
    """The processes of a training, as ``accelerate launch`` started them; one if nothing did."""

    def __init__(self, folder: Path, trackers: Sequence[str]):
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, ProjectConfiguration, parse_flag_from_env

        places = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers"))
        bare = not torch.accelerator.is_available()  # told so, Accelerate makes launched processes a gloo group
        self.accelerator = Accelerator(cpu=bare, log_with=list(trackers) or None, project_config=places)
        self.count: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.main: bool = self.accelerator.is_main_process
        device = self.accelerator.device
        self.device = torch.device("cpu") if device.type == "cpu" else device  # not cpu:1
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
            raise QcError(f"training does not run under {kind.value}", fix="launch it with --multi_gpu or --use_fsdp")
        self.sharded = self.count > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise QcError("training does not run under FSDP 1", fix="launch it with --use_fsdp --fsdp_version 2")

    def wrap(self, module: nn.Module, blocks: Sequence[str]) -> nn.Module:
        """The module as it runs in this process. Its parameters keep their names, and, unless sharded, are the same."""
        if self.sharded:
            return self._shard(module, blocks)
        if self.count == 1:
            return module
        places = None if self.device.type == "cpu" else [self.device.index]
        kind = nn.parallel.DistributedDataParallel
        known = inspect.signature(kind).parameters  # torch 2.13 gave the option another name
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        said: dict[str, Any] = {"device_ids": places, "init_sync": False, "gradient_as_bucket_view": True, sync: False}
        return kind(module, **said)  # all processes have read the same artifact: nothing to send

    def _shard(self, module: nn.Module, blocks: Sequence[str]) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for name in blocks:
            fully_shard(module.get_submodule(name), mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """The context of one of several backwards of a step: gradients are exchanged in the last one only."""
        if self.sharded:
            module.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif self.count > 1 and not last:
            return module.no_sync()  # type: ignore[operator,no-any-return]
        return nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all processes."""
        if self.count == 1:
            return value
        total: Tensor = self.accelerator.reduce(value, "sum")
        return total

    def sum_shards(self, value: Tensor) -> Tensor:
        """The sum over processes that hold parts of the same tensors; ``value`` itself where all hold the whole."""
        return self.sum(value) if self.sharded else value

    def wait(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def agree(self, number: int) -> bool:
        """Whether all processes bring the same number."""
        if self.count == 1:
            return True
        found = torch.tensor([number, number * number], dtype=torch.float64, device=self.device)
        total, squares = self.sum(found).tolist()
        return bool(total == number * self.count and squares == number * number * self.count)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process goes ahead, then the first of each other machine, then the rest."""
        with self.accelerator.main_process_first(), self.accelerator.local_main_process_first():
            yield


def local(value: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, to be read or overwritten; others as they are."""
    part: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return part.detach()


def whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which must all ask for it; others as they are."""
    gathered: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered.detach()


def fill(target: Tensor, value: Tensor) -> None:
    """Put a whole tensor into ``target``, which may be sharded."""
    with torch.no_grad():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor laid out as ``target`` is."""
    new = torch.empty_like(target).detach()
    fill(new, value)
    return new
