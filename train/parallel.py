"""Processes that train together: their group, each one's part of a step, and networks in shards.

A step consists of `micro_batches`, each with a random stream of its own, and process r of R computes the r-th
run of them. So the samples of a step, and up to rounding its result, are the same whatever the number of
processes. Under torchrun networks are sharded by FSDP2; a process on its own keeps plain modules.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from asd_rt.errors import ConfigError
from train.model import Block, WanModel
from train.precision import has_bf16
from train.real_config import ParallelConfig

# FSDP warns of results that are views, on which nothing may be done in place; nothing here is.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
# Others wait this long for process 0, which alone writes the student, and for slow disks.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Parallel:
    """This process among those that train together; by default it is alone.

    Attributes:
        settings: of the configuration.
        rank, ranks: number of this process, and how many there are.
        device: where its networks are.
        mesh: of all processes; None = not under torchrun.
    """

    settings: ParallelConfig = field(default_factory=ParallelConfig)
    rank: int = 0
    ranks: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None

    @property
    def shares(self) -> range:
        """The micro-batches of a step that this process computes."""
        own = self.settings.micro_batches // self.ranks
        return range(self.rank * own, (self.rank + 1) * own)

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports and writes what all share."""
        return self.rank == 0

    # --- precision

    @property
    def bf16(self) -> bool:
        """Whether products are computed in bfloat16: where it is faster, unless the configuration says."""
        wish = self.settings.precision
        if wish == "auto":
            return has_bf16() if self.device.type == "cpu" else True
        return wish == "bf16"

    def autocast(self) -> Any:
        """A context for passes of plain modules; shards have a precision of their own."""
        if self.mesh is not None or self.device.type == "meta":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    # --- networks

    def prepare(self, network: nn.Module) -> None:
        """Move a network to its device and set it up: in shards, one a transformer block, under torchrun.

        A network on the meta device stays there; fill it with `fill`.
        """
        if isinstance(network, WanModel):
            for block in network.blocks:
                block.checkpointing = self.settings.checkpoint_activations
        on_meta = next(network.parameters()).is_meta
        if self.mesh is None:
            if not on_meta:
                network.to(self.device)
            return
        policy = MixedPrecisionPolicy()
        if self.bf16 and isinstance(network, WanModel):
            # Inputs are cast where the network takes them: timesteps must not be rounded.
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for module in network.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=self.mesh, mp_policy=policy)
                register_fsdp_forward_method(module, "embed_prompt")
        fully_shard(network, mesh=self.mesh, mp_policy=policy)
        if isinstance(network, WanModel):
            for method in ("embed_prompt", "embed_time", "denoise"):
                register_fsdp_forward_method(network, method)

    def fill(self, network: nn.Module, weights: Mapping[str, Callable[[], Tensor]]) -> None:
        """Give a prepared network on the meta device its weights, one by one.

        Each process reads all of them and keeps its own part, in the network's type.
        """
        placed = {}
        for name, parameter in network.named_parameters():
            # A copy: optimizers write into it, and files stay mapped.
            weight = weights[name]().to(self.device, parameter.dtype, copy=True)
            placed[name] = placed_like(weight, parameter)
        network.load_state_dict(placed, assign=True)

    @contextmanager
    def kept_whole(self, network: nn.Module) -> Iterator[None]:
        """Keep the weights of a sharded network whole for many passes without gradients."""
        shards = [m for m in network.modules() if isinstance(m, FSDPModule)]
        if not shards:
            yield
            return
        network.set_reshard_after_forward(False)  # type: ignore[operator]
        try:
            yield
        finally:
            for module in shards:
                module.set_reshard_after_forward(module is not network, recurse=False)
                module.reshard()

    def clip(self, network: nn.Module, limit: float) -> Tensor:
        """Scale gradients down to a norm of `limit`, taken over all shards; returns what it was."""
        norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def reshard(self, network: nn.Module) -> None:
        """Drop gathered weights, which are out of date after an update."""
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # --- figures

    def norm(self, norms: Sequence[Tensor]) -> Tensor:
        """The norm of all micro-batches' values together, from those of this process's micro-batches."""
        total = torch.stack(list(norms)).norm()
        if self.mesh is not None:
            total = total.square()
            dist.all_reduce(total)
            total = total.sqrt()
        return total

    def average(self, figures: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures (float64 scalars, means over this process's micro-batches) averaged over all."""
        values = torch.stack([value.double() for value in figures.values()])
        if self.mesh is not None:
            dist.all_reduce(values)
            values /= self.ranks
        return dict(zip(figures, values.tolist(), strict=True))

    def agree(self, wish: bool) -> bool:
        """What process 0 wants."""
        if self.mesh is None:
            return wish
        said = torch.tensor([int(wish)], device=self.device)
        dist.broadcast(said, 0)
        return bool(said.item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.mesh is not None:
            dist.barrier()


SINGLE = Parallel()


@contextmanager
def processes(settings: ParallelConfig | None) -> Iterator[Parallel]:
    """This process's place among those that torchrun started, or on its own without it.

    Raises:
        ConfigError: micro-batches that the processes cannot share evenly.
    """
    settings = settings or ParallelConfig()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Parallel(settings, device=device)
        return
    ranks = int(os.environ["WORLD_SIZE"])
    check_ranks(settings, ranks)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        mesh = init_device_mesh(device.type, (ranks,))
        yield Parallel(settings, dist.get_rank(), ranks, device, mesh)
    finally:
        dist.destroy_process_group()


def check_ranks(settings: ParallelConfig, ranks: int) -> None:
    """Raise ConfigError unless `ranks` processes can share the micro-batches of a step evenly."""
    if ranks < 1 or settings.micro_batches % ranks:
        raise ConfigError(
            f"parallel.micro_batches {settings.micro_batches} cannot be shared evenly by {ranks} processes; "
            f"start a number that divides it, or set micro_batches to a multiple of {ranks}"
        )


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All parts of a tensor; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that all processes have alike, in the same parts as `other`."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(other.dtype), other.device_mesh, other.placements, src_data_rank=None
    )


def whole(tensor: Tensor) -> Tensor:
    """As `gathered`, on the CPU."""
    return gathered(tensor).cpu()
