"""What a micro-batch of a distillation step takes, found by running it on the meta device.

Nothing is stored there, but every product and every tensor saved for a backward pass has its size. Each layer
adds the same, so a few shallow networks tell of every depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from asd_rt.config import ModelConfig
from asd_rt.kv_cache import attended_frames
from asd_rt.schedule import MAX_STEPS
from train.config import TrainConfig
from train.data import Batch, Contexts, Data
from train.discriminator import Discriminator
from train.distill import DistillStage
from train.distill_task import Share, Task
from train.model import KeyValue, WanModel, make_rope
from train.parallel import Parallel
from train.real_config import ParallelConfig
from train.rollout import Rollout
from train.scoring import Networks, feature_layers

META = torch.device("meta")


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
    """The distillation without what has no meaning on the meta device, and without rollouts.

    Rollouts are counted apart: they are many passes, all alike but for their past.
    """

    def _rollout(self, task: Task, share: Share, steps: int, prompt: Any) -> Rollout:
        """What a rollout leaves behind."""
        batch, _, *frame = self.clip
        noise = torch.empty(batch, len(task.positions), *frame, device=META)
        last = [self.schedule.steps(count)[-1] for count in task.plan(steps)]
        cached = len(task.positions) - task.block_frames
        student, dtype = self.networks.student.config, pass_dtype(self.config)
        kv = _cache(student, dtype, batch, cached, self.data.latent_hw)
        return Rollout(noise, noise, last, kv, task.positions)

    def _remember(self, share: Share, x: Tensor) -> None:
        self.replays[share.number].append(torch.zeros(x.shape), torch.zeros(()))

    def _update(self, name: str) -> Tensor:
        self.optimizers[name].zero_grad(set_to_none=True)
        return torch.zeros(())


def pass_dtype(config: TrainConfig) -> torch.dtype:
    """What passes compute in and the frozen teacher is stored in: bfloat16, unless fp32 is asked for."""
    precision = (config.parallel or ParallelConfig()).precision
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _cache(
    model: ModelConfig, dtype: torch.dtype, batch: int, frames: int, latent_hw: tuple[int, int]
) -> list[KeyValue]:
    """A KV cache without content."""
    tokens = frames * (latent_hw[0] * latent_hw[1] // 4)
    shape = (tokens, batch, model.num_heads, model.head_dim)
    layer = torch.empty(shape, dtype=dtype, device=META)
    return [KeyValue(layer, layer)] * model.num_layers


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


def _stage(
    config: TrainConfig,
    latent_hw: tuple[int, int],
    checkpointed: bool,
    layers: tuple[int, int],
) -> _MetaStage:
    """The distillation of one micro-batch on the meta device, its passes in the type of FSDP's policy.

    `layers` of student (and critic) and teacher.
    """
    student, teacher = (
        replace(model, num_layers=count)
        for model, count in zip(
            (config.model, config.teacher_model or config.model), layers, strict=True
        )
    )
    with META:
        models = [WanModel(c).to(pass_dtype(config)) for c in (student, student, teacher)]
        discriminator = Discriminator(teacher.dim, len(feature_layers(teacher.num_layers)))
    settings = ParallelConfig(checkpoint_activations=checkpointed)
    parallel = Parallel(settings, device=META)
    for model in models:
        parallel.prepare(model)
    networks = Networks(models[0], models[1], discriminator, models[2])
    stage = _MetaStage(config, 0, _Nothing(config, latent_hw), networks, parallel)
    stage.separation = dict.fromkeys(stage.separation, 1.0)  # so that ASD pushes, which takes more
    return stage


def only_steps(config: TrainConfig, n: int) -> TrainConfig:
    """A configuration that draws only steps of n denoising steps, of one clip's length."""
    weights = tuple(float(i + 1 == n) for i in range(MAX_STEPS))
    distill = replace(
        config.distill, step_weights=weights, first_steps_share=0.0, long_share=0.0, asd_warmup=0
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


@dataclass(frozen=True, slots=True)
class Measured:
    """What a micro-batch takes; every figure grows by the same with every layer.

    Attributes:
        asd, plain: products of a step but for its rollouts, with ASD and without (n = 4).
        critic: products of one critic update, of which these have one.
        passes: products of a denoising pass of each block of the longest rollout.
        saved: bytes saved for backward passes, at most.
    """

    asd: float
    plain: float
    critic: float
    passes: tuple[float, ...]
    saved: float

    def grown(self, other: Measured, layers: int) -> Measured:
        """Carried on from `other`, which has one layer less, to `layers` more than that."""

        def carry(more: float, less: float) -> float:
            return less + layers * (more - less)

        return Measured(
            *(carry(getattr(self, n), getattr(other, n)) for n in ("asd", "plain", "critic")),
            tuple(carry(*pair) for pair in zip(self.passes, other.passes, strict=True)),
            carry(self.saved, other.saved),
        )

    def flops(self, task: Task, updates: int) -> float:
        """Products of a step."""
        rollouts = [task.plan(task.n), *([task.plan(task.n + 1)] if task.use_asd else [])]
        passes = sum(
            # A pass a denoising step, and one that fills the cache for the blocks after it.
            (n + (block + 1 < len(plan))) * self.passes[block]
            for plan in rollouts
            for block, n in enumerate(plan)
        )
        return passes + (self.asd if task.use_asd else self.plain) + (updates - 1) * self.critic


def _shallow(
    config: TrainConfig, latent_hw: tuple[int, int], checkpointed: bool, layers: tuple[int, int]
) -> Measured:
    """Measure networks of so few layers, student's and teacher's."""
    config = replace(config, distill=replace(config.distill, critic_updates=1))
    found, saved = {}, 0
    for name, n in (("asd", 1), ("plain", MAX_STEPS)):
        stage = _stage(only_steps(config, n), latent_hw, checkpointed, layers)
        held = _Saved(stage.networks)
        with Products() as products, saved_tensors_hooks(held.pack, lambda kept: kept.tensor):
            stage.advance(0)
        found[name], saved = products.total, max(saved, held.most)
    share = Share(
        0, stage.data.contexts(torch.zeros(config.distill.batch), False), torch.Generator()
    )
    with Products() as critic:
        stage._critic_loss(share, newest=True)
    passes = _passes(config, latent_hw, stage.networks.student)
    return Measured(found["asd"], found["plain"], critic.total, passes, saved)


@torch.no_grad()
def _passes(
    config: TrainConfig, latent_hw: tuple[int, int], student: WanModel
) -> tuple[float, ...]:
    """Products of a denoising pass of each block of the longest rollout."""
    cache, model, batch = config.cache, student.config, config.distill.batch
    height, width = latent_hw
    size, found = cache.block_frames, []
    x = torch.empty(batch, size, model.in_dim, height, width, device=META)
    prompt = student.embed_prompt(torch.empty(batch, model.text_len, model.text_dim, device=META))
    time = student.embed_time(torch.empty(1, size, device=META))
    for start in range(0, config.distill.frames, size):
        seen = len(attended_frames(cache, start))
        past = _cache(model, pass_dtype(config), batch, seen, latent_hw) if seen else None
        rope = make_rope(model, range(size), (height // 2, width // 2), META)
        with Products() as products:
            student.denoise(x, time, prompt, rope, past)
        found.append(products.total)
    return tuple(found)


def measure(config: TrainConfig, latent_hw: tuple[int, int], checkpointed: bool) -> Measured:
    """Measure the networks of a configuration: a few shallow ones tell of every depth."""

    def shallow(student: int, teacher: int) -> Measured:
        return _shallow(config, latent_hw, checkpointed, (student, teacher))

    # Two layers at least: the discriminator reads one in the middle and the last.
    base, layers = shallow(2, 2), config.model.num_layers - 2
    if config.one_shape:
        return shallow(3, 3).grown(base, layers)
    whole = shallow(3, 2).grown(base, layers)
    more = shallow(2, 3).grown(base, config.teacher_model.num_layers - 2)
    return Measured(
        *(getattr(whole, n) + getattr(more, n) - getattr(base, n) for n in ("asd", "plain")),
        whole.critic,
        whole.passes,
        whole.saved + more.saved - base.saved,
    )
