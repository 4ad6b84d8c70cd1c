"""`python -m train --dry-run`: what a distillation step takes of a device, before anything is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from torch import nn

from asd_rt.config import ModelConfig
from asd_rt.schedule import MAX_STEPS
from train.config import TrainConfig
from train.discriminator import Discriminator
from train.distill_task import Task
from train.model import WanModel
from train.real_config import ParallelConfig
from train.scoring import feature_layers
from train.step_costs import META, Measured, measure, pass_dtype

FLOAT = 4  # bytes


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


def tasks(config: TrainConfig) -> list[tuple[Task, float]]:
    """Every kind of step that a configuration draws, and its chance."""
    settings, found = config.distill, []
    for n, enhanced, long in product(range(1, MAX_STEPS + 1), (False, True), (False, True)):
        first = settings.first_steps_share if n < MAX_STEPS else 0.0
        lasts = settings.long_share if settings.frames > config.clip_frames else 0.0
        chance = settings.step_weights[n - 1] / sum(settings.step_weights)
        chance *= first if enhanced else 1 - first
        chance *= lasts if long else 1 - lasts
        if chance:
            positions = list(range(settings.frames if long else config.clip_frames))
            asd = n < MAX_STEPS and settings.asd_ratio > 0
            task = Task(n, enhanced, asd, positions, 0, config.cache.block_frames)
            found.append((task, chance))
    return found


def make_plan(config: TrainConfig, latent_hw: tuple[int, int], processes: int) -> Plan:
    """Measure a distillation step.

    Args:
        config: of the run.
        latent_hw: height and width of latents.
        processes: devices that share the networks and a step.
    """
    settings = config.parallel or ParallelConfig()
    measured = {flag: measure(config, latent_hw, flag) for flag in (False, True)}
    checkpointed = settings.checkpoint_activations
    flops_of: dict[int, float] = {}
    chance_of: dict[int, float] = {}
    for task, chance in tasks(config):
        flops = measured[checkpointed].flops(task, config.distill.critic_updates)
        flops_of[task.n] = flops_of.get(task.n, 0.0) + chance * flops * settings.micro_batches
        chance_of[task.n] = chance_of.get(task.n, 0.0) + chance
    tokens = config.distill.batch * config.clip_frames * (latent_hw[0] * latent_hw[1] // 4)
    own = settings.micro_batches // processes
    with META:
        teacher = config.teacher_model or config.model
        student = _count(WanModel(config.model))
        sizes = {
            "student": student,
            "critic": student,
            "discriminator": _count(
                Discriminator(teacher.dim, len(feature_layers(teacher.num_layers)))
            ),
            "teacher": _count(WanModel(teacher)),
        }
    return Plan(
        processes=processes,
        sizes=sizes,
        memory=_memory(config, latent_hw, processes, sizes, own, measured),
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
    measured: dict[bool, Measured],
) -> Memory:
    """Bytes of one device, of the step that needs the most."""
    trained = sizes["student"] + sizes["critic"] + sizes["discriminator"]
    asd = config.distill.asd_ratio > 0
    # Of several micro-batches ASD's pushes are summed apart from DMD's pulls.
    student = sizes["student"] * (2 if own > 1 and asd else 1)
    gradients = max(student + sizes["discriminator"], sizes["critic"])
    teacher = config.teacher_model or config.model
    frames, batch = config.distill.frames, config.distill.batch
    tokens = latent_hw[0] * latent_hw[1] // 4
    cached = batch * (frames - config.cache.block_frames) * tokens  # the last block is seen by none
    passed = pass_dtype(config).itemsize  # bytes of a number in passes
    cache = cached * config.model.num_layers * 2 * config.model.dim * passed
    # One layer at a time is computed again, and all that it saves is there then.
    layer = measured[False].saved / min(config.model.num_layers, teacher.num_layers)
    return Memory(
        parameters=(FLOAT * trained + passed * sizes["teacher"]) // processes,
        gradients=FLOAT * gradients // processes,
        optimizer=2 * FLOAT * trained // processes,
        ema=FLOAT * sizes["student"] // processes,
        gathered=passed * (sizes["student"] + _layer_size(teacher)) if processes > 1 else 0,
        kv_cache=cache * (2 if asd else 1),
        activations=int(measured[False].saved),
        activations_checkpointed=int(measured[True].saved + layer),
    )


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
