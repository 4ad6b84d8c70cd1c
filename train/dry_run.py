"""What a distillation step needs, found by running it on the meta device, where nothing is stored.

Counted are the tensors that the networks and their optimizers hold, those saved for backward passes, and the
products of the step, which every layer adds the same number of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from asd_rt.config import ModelConfig
from asd_rt.schedule import MAX_STEPS
from train.config import TrainConfig
from train.data import Batch, Contexts, Data
from train.discriminator import Discriminator
from train.distill import DistillStage
from train.distill_task import Share
from train.model import WanModel
from train.parallel import Parallel
from train.real_config import ParallelConfig
from train.scoring import Networks, feature_layers

FLOAT, HALF = 4, 2  # bytes
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process's device.

    Attributes:
        parameters: float32 copies that are trained, and the frozen teacher.
        gradients: the most that are there at a time.
        optimizer, ema: of AdamW, and of the averaged student.
        gathered: weights whole for passes: the student's in rollouts, else a layer's at a time.
        kv_cache: of the n-step and the (n+1)-step rollout.
        activations: the most that is saved for backward passes at a time.
        activations_checkpointed: the same with checkpoint_activations, one layer's in full among them.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    kv_cache: int
    activations: int
    activations_checkpointed: int

    def total(self, checkpointed: bool) -> int:
        """All of it, with or without checkpointed activations."""
        values = asdict(self)
        del values["activations" if checkpointed else "activations_checkpointed"]
        return sum(values.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run asks of `processes` devices.

    Attributes:
        sizes: parameters of each network.
        memory: of one device.
        checkpointed: whether the configuration checkpoints activations.
        micro_batches: of a step, in all and of one process.
        tokens: of the clips that one step judges, all processes together.
        flops: of a step, all processes together: the mean over the tasks that the configuration draws.
        flops_of: the same by denoising steps n.
    """

    processes: int
    sizes: dict[str, int]
    memory: Memory
    checkpointed: bool
    micro_batches: tuple[int, int]
    tokens: int
    flops: float
    flops_of: dict[int, float]


class _Nothing(Data):
    """Prompts without content."""

    def __init__(self, config: TrainConfig, latent_hw: tuple[int, int]) -> None:
        self.config, self.latent_hw = config, latent_hw

    def teacher_batch(self, index: int, share: int, generator: torch.Generator) -> Batch:
        raise NotImplementedError

    init_batch = teacher_batch

    def ode_batch(self, index: int, share: int) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def draw_prompts(self, index: int, share: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(self.config.distill.batch, dtype=torch.int64)

    def contexts(self, drawn: Tensor, later: bool) -> Contexts:
        model = self.config.model
        context = torch.empty(len(drawn), model.text_len, model.text_dim, device=META)
        return Contexts(context, context, context)


class _MetaStage(DistillStage):
    """The distillation without what has no meaning on the meta device."""

    def _remember(self, share: Share, x: Tensor) -> None:
        self.replays[share.number].append(torch.zeros(x.shape), torch.zeros(()))

    def _update(self, name: str) -> Tensor:
        self.optimizers[name].zero_grad(set_to_none=True)
        return torch.zeros(())


class _Saved:
    """Bytes that are saved for backward passes, now and at most; weights do not count."""

    def __init__(self, networks: Networks) -> None:
        modules: list[nn.Module] = [networks.student, networks.critic, networks.discriminator]
        modules.append(networks.teacher)
        self._weights = {_storage(p) for module in modules for p in module.parameters()}
        self._held: dict[int, int] = {}
        self._now = self.most = 0

    def pack(self, tensor: Tensor) -> _Held:
        return _Held(tensor, self)

    def add(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key in self._weights:
            return
        self._held[key] = self._held.get(key, 0) + 1
        if self._held[key] == 1:
            self._now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self._now)

    def drop(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key in self._held:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                self._now -= tensor.untyped_storage().nbytes()


class _Held:
    """A saved tensor, which counts as long as something refers to it."""

    def __init__(self, tensor: Tensor, saved: _Saved) -> None:
        self.tensor, self._saved = tensor, saved
        saved.add(tensor)

    def __del__(self) -> None:
        self._saved.drop(self.tensor)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _saved_bytes(networks: Networks) -> Iterator[_Saved]:
    saved = _Saved(networks)
    with saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        yield saved


def _stage(
    config: TrainConfig,
    latent_hw: tuple[int, int],
    checkpointed: bool,
    layers: tuple[int, int] | None = None,
) -> _MetaStage:
    """The distillation of one micro-batch, in bfloat16 as under FSDP's policy, on the meta device.

    `layers` of student (and critic) and teacher; None = as configured.
    """
    student, teacher = config.model, config.teacher_model or config.model
    if layers is not None:
        student, teacher = (
            replace(model, num_layers=count)
            for model, count in zip((student, teacher), layers, strict=True)
        )
    with META:
        models = [WanModel(c).to(torch.bfloat16) for c in (student, student, teacher)]
        discriminator = Discriminator(teacher.dim, len(feature_layers(teacher.num_layers)))
    settings = ParallelConfig(checkpoint_activations=checkpointed)
    parallel = Parallel(settings, device=META)
    for model in models:
        parallel.prepare(model)
    networks = Networks(models[0], models[1], discriminator, models[2])
    return _MetaStage(config, 0, _Nothing(config, latent_hw), networks, parallel)


def _fixed(config: TrainConfig, n: int, enhanced: bool, long: bool) -> TrainConfig:
    """A configuration that draws only tasks of one kind."""
    weights = tuple(float(i + 1 == n) for i in range(MAX_STEPS))
    distill = replace(
        config.distill,
        step_weights=weights,
        first_steps_share=float(enhanced),
        long_share=float(long),
        asd_warmup=0,
    )
    return replace(config, distill=distill)


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Products(TorchDispatchMode):
    """Counts the operations of matrix products and attentions, two for a multiplication with its addition.

    FlopCounterMode does the same, and so much beside it that it takes ten times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out, packet = func(*args, **(kwargs or {})), func._overloadpacket
        if packet is _ATTENTION:
            self.total += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif packet is _ATTENTION_BACKWARD:
            self.total += sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def _step_flops(config: TrainConfig, latent_hw: tuple[int, int], checkpointed: bool) -> float:
    """Operations of one micro-batch of one step: a sum over layers, so a few shallow networks tell it."""

    def count(student: int, teacher: int) -> int:
        stage = _stage(config, latent_hw, checkpointed, (student, teacher))
        with Products() as products:
            stage.advance(0)
        return products.total

    # Two layers at least: the discriminator reads one in the middle and the last.
    base, layers = count(2, 2), config.model.num_layers - 2
    if config.one_shape:
        return base + layers * (count(3, 3) - base)
    teacher_layers = config.teacher_model.num_layers - 2
    return base + layers * (count(3, 2) - base) + teacher_layers * (count(2, 3) - base)


def _tasks(config: TrainConfig) -> dict[tuple[int, bool, bool], float]:
    """Chance of every kind of task: (n, first block enhanced, long rollout)."""
    settings, found = config.distill, {}
    total = sum(settings.step_weights)
    for n, enhanced, long in product(range(1, MAX_STEPS + 1), (False, True), (False, True)):
        first = settings.first_steps_share if n < MAX_STEPS else 0.0
        lasts = settings.long_share if settings.frames > config.clip_frames else 0.0
        chance = settings.step_weights[n - 1] / total
        chance *= first if enhanced else 1 - first
        chance *= lasts if long else 1 - lasts
        if chance:
            found[n, enhanced, long] = chance
    return found


def make_plan(config: TrainConfig, latent_hw: tuple[int, int], processes: int) -> Plan:
    """Measure a distillation step.

    Args:
        config: of the run.
        latent_hw: height and width of latents.
        processes: devices that share the networks and a step.
    """
    settings = config.parallel or ParallelConfig()
    checkpointed = settings.checkpoint_activations
    flops_of: dict[int, float] = {}
    chance_of: dict[int, float] = {}
    for (n, enhanced, long), chance in _tasks(config).items():
        flops = _step_flops(_fixed(config, n, enhanced, long), latent_hw, checkpointed)
        flops_of[n] = flops_of.get(n, 0.0) + chance * flops * settings.micro_batches
        chance_of[n] = chance_of.get(n, 0.0) + chance
    tokens = config.distill.batch * config.clip_frames * (latent_hw[0] * latent_hw[1] // 4)
    own = settings.micro_batches // processes
    stage = _stage(config, latent_hw, checkpointed)
    sizes = {
        "student": _count(stage.networks.student),
        "critic": _count(stage.networks.critic),
        "discriminator": _count(stage.networks.discriminator),
        "teacher": _count(stage.networks.teacher),
    }
    return Plan(
        processes=processes,
        sizes=sizes,
        memory=_memory(config, latent_hw, processes, sizes, own),
        checkpointed=checkpointed,
        micro_batches=(settings.micro_batches, own),
        tokens=tokens * settings.micro_batches,
        flops=sum(flops_of.values()),
        flops_of={n: flops_of[n] / chance_of[n] for n in flops_of},
    )


def _memory(
    config: TrainConfig,
    latent_hw: tuple[int, int],
    processes: int,
    sizes: dict[str, int],
    own: int,
) -> Memory:
    """Bytes of one device, of the task that needs the most."""
    trained = sizes["student"] + sizes["critic"] + sizes["discriminator"]
    asd = config.distill.asd_ratio > 0
    # Of several micro-batches ASD's pushes are summed apart from DMD's pulls.
    student = sizes["student"] * (2 if own > 1 and asd else 1)
    gradients = max(student + sizes["discriminator"], sizes["critic"])
    teacher_layer = _layer_size(config.teacher_model or config.model)
    frames, batch = config.distill.frames, config.distill.batch
    tokens = latent_hw[0] * latent_hw[1] // 4
    cache = batch * frames * tokens * config.model.num_layers * 2 * config.model.dim * HALF
    task = _fixed(config, 1, enhanced=False, long=False)
    return Memory(
        parameters=(FLOAT * trained + HALF * sizes["teacher"]) // processes,
        gradients=FLOAT * gradients // processes,
        optimizer=2 * FLOAT * trained // processes,
        ema=FLOAT * sizes["student"] // processes,
        gathered=HALF * (sizes["student"] + teacher_layer) if processes > 1 else 0,
        kv_cache=cache * (2 if asd else 1),
        activations=_saved(task, latent_hw, checkpointed=False),
        activations_checkpointed=_saved(task, latent_hw, checkpointed=True)
        + _layer_activations(task, latent_hw),
    )


def _saved(
    config: TrainConfig,
    latent_hw: tuple[int, int],
    checkpointed: bool,
    layers: tuple[int, int] | None = None,
) -> int:
    stage = _stage(config, latent_hw, checkpointed, layers)
    with _saved_bytes(stage.networks) as saved:
        stage.advance(0)
    return saved.most


def _layer_activations(config: TrainConfig, latent_hw: tuple[int, int]) -> int:
    """What one layer saves, the student's or the teacher's, whichever is more."""
    base, student, teacher = (
        _saved(config, latent_hw, checkpointed=False, layers=layers)
        for layers in ((2, 2), (3, 2), (2, 3))
    )
    return max(student, teacher) - base


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _layer_size(config: ModelConfig) -> int:
    with META:
        return _count(WanModel(replace(config, num_layers=1)).blocks[0])


def describe(plan: Plan) -> str:
    """The plan as text."""
    memory, gib = plan.memory, 1 << 30
    lines = [
        "networks       " + ", ".join(f"{k} {v / 1e9:.3f} B" for k, v in plan.sizes.items()),
        f"processes      {plan.processes}, micro-batches {plan.micro_batches[0]} a step, "
        f"{plan.micro_batches[1]} a process",
        f"tokens         {plan.tokens / 1e6:.3f} M a step (of the clips that are judged)",
        f"FLOPs          {plan.flops / 1e15:.3f} P a step, "
        f"{plan.flops / plan.processes / 1e15:.3f} P a process; by denoising steps: "
        + ", ".join(f"{n}: {v / 1e15:.3f} P" for n, v in sorted(plan.flops_of.items())),
        "memory         of one process, GiB",
    ]
    names = {"kv_cache": "KV cache of rollouts", "ema": "averaged student"}
    for key, value in asdict(memory).items():
        name = names.get(key, key.replace("_", " "))
        used = {"activations": not plan.checkpointed, "activations_checkpointed": plan.checkpointed}
        note = "" if used.get(key, True) else "   (not with this configuration)"
        lines.append(f"  {name:<25} {value / gib:9.3f}{note}")
    lines.append(f"  {'sum':<25} {memory.total(plan.checkpointed) / gib:9.3f}")
    lines.append(
        "               working memory of single operations and of the allocator comes on top"
    )
    return "\n".join(lines)


def as_document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON."""
    document = asdict(plan)
    document["memory"]["sum"] = plan.memory.total(plan.checkpointed)
    return document
