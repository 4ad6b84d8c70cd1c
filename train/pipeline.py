"""The stages of a run in order, each reading what the one before left in the run's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_rt.schedule import MAX_STEPS, Schedule
from train.causal_init import InitStage
from train.checkpoint import Deployment, save_checkpoint
from train.classifier import Classifier, ClassifierStage
from train.codec import LinearCodec, VocabularyEncoder
from train.config import TrainConfig, fingerprint
from train.curves import CURVE, read_curve, write_page
from train.discriminator import Discriminator
from train.distill import DistillStage
from train.evaluate import (
    STUDENT_PLANS,
    Row,
    markdown,
    real_reference,
    sample_all,
    score,
    student_sampler,
    teacher_sampler,
)
from train.model import WanModel
from train.parallel import Parallel, processes
from train.pictures import contact_sheet
from train.run_folder import open_run
from train.scoring import Networks, feature_layers
from train.stage import Checkpoints, Stage, run_stage
from train.teacher import TeacherStage
from train.tiny_data import LATENT_HW, TinyData
from train.tiny_world import FPS, TinyWorld, random_labels, vocabulary

log = logging.getLogger(__name__)
STAGES = ("classifier", "teacher", "init", "distill", "evaluate")
ALONE = ("classifier", "evaluate")  # done by one process
TEACHER_STEPS = 30
DISPLAY_SCALE = 8
SHEET_PROMPTS = 12


def run(
    config: TrainConfig,
    out: Path,
    seed: int,
    stages: list[str],
    resume: bool,
    threads: int,
    command: str,
) -> None:
    """Run `stages` in their order.

    Args:
        config: the recipe.
        out: the run's folder: checkpoints, curve.jsonl, pictures, scores and the student.
        seed: of everything.
        stages: names out of STAGES.
        resume: go on with a run that `out` already holds.
        threads: CPU threads, 0 = usable cores.
        command: for the model card.

    Raises:
        ConfigError: `out` holds a run and `resume` is not set, or a stage's input is missing.
        OutputError: `out` cannot be written.
    """
    with processes(config.parallel) as parallel:
        open_run(out, resume, threads, parallel)
        _run(config, out, seed, stages, command, parallel)


def _run(
    config: TrainConfig,
    out: Path,
    seed: int,
    stages: list[str],
    command: str,
    parallel: Parallel,
) -> None:
    codec = LinearCodec(config.model.in_dim)
    lost = codec.fit(TinyWorld("train"), seed)
    if parallel.first:
        share = 100 * lost
        log.info("codec: %d channels lose %.2f %% of the frames' variance", codec.channels, share)
    text = VocabularyEncoder(config.model.text_dim)
    world = _World(config, out, seed, codec, text, parallel)
    for name in STAGES:
        if name not in stages:
            continue
        if name in ALONE:
            if parallel.first and name == "evaluate":
                _evaluate(world, command)
            elif parallel.first:
                run_stage(_make_stage(name, world), out, fingerprint(config, seed, name))
            parallel.wait()
            continue
        stage = _make_stage(name, world)
        # Pictures need whole weights, which no process has where there are several.
        preview = _previewer(world, stage) if parallel.mesh is None else None
        run_stage(stage, out, fingerprint(config, seed, name), preview, world.sharded(name))
        if parallel.first:
            _sheet(world, name, world.network(name), f"samples_{name}.png")
        parallel.wait()
    if parallel.first:
        write_page(out, read_curve(out / CURVE), {})


class _World:
    """What all stages of a run share."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        seed: int,
        codec: LinearCodec,
        text: VocabularyEncoder,
        parallel: Parallel,
    ) -> None:
        self.config, self.out, self.seed, self.codec, self.text = config, out, seed, codec, text
        self.parallel, self.schedule = parallel, Schedule(config.timestep_shift)
        self.data = TinyData(config, codec, text)

    def sharded(self, stage: str) -> bool:
        """Whether the checkpoints of `stage` are in shards."""
        return self.config.parallel is not None and stage not in ALONE

    def finished(self, stage: str, key: str) -> dict[str, Any]:
        """Part `key` of a finished stage's state."""
        network = Classifier() if stage == "classifier" else WanModel(self.config.model)
        checkpoints = Checkpoints(self.out, stage, self.sharded(stage))
        mark = fingerprint(self.config, self.seed, stage)
        path = checkpoints.finished(mark, getattr(self.config, stage).steps)
        return checkpoints.load(path, {key: network.state_dict()})[key]

    def network(self, stage: str) -> WanModel:
        """The averaged network of a finished stage, for sampling."""
        model = WanModel(self.config.model)
        model.load_state_dict(self.finished(stage, "ema"))
        return model.eval().requires_grad_(False)


def _make_stage(name: str, world: _World) -> Stage:
    config, seed = world.config, world.seed
    if name == "classifier":
        return ClassifierStage(config, seed, world.codec)
    torch.manual_seed(seed)
    if name == "teacher":
        network = WanModel(config.model)
        world.parallel.prepare(network)
        return TeacherStage(config, seed, world.data, network, world.parallel)
    weights = world.finished("teacher", "ema")
    if name == "init":
        network = WanModel(config.model)
        network.load_state_dict(weights)
        world.parallel.prepare(network)
        return InitStage(config, seed, world.data, network, world.parallel)
    networks = start_networks(config, seed, weights, world.finished("init", "ema"))
    for network in (networks.student, networks.critic, networks.discriminator, networks.teacher):
        world.parallel.prepare(network)
    return DistillStage(config, seed, world.data, networks, world.parallel)


def start_networks(
    config: TrainConfig, seed: int, teacher: dict[str, Tensor], student: dict[str, Tensor]
) -> Networks:
    """The networks that the distillation starts from; the critic is the teacher at first."""
    torch.manual_seed(seed)
    networks = [WanModel(config.model) for _ in range(3)]
    for network, weights in zip(networks, (teacher, teacher, student), strict=True):
        network.load_state_dict(weights)
    discriminator = Discriminator(config.model.dim, len(feature_layers(config.model.num_layers)))
    return Networks(networks[2], networks[1], discriminator, networks[0])


def _previewer(world: _World, stage: Stage) -> Callable[[int], None]:
    """Pictures of the averaged network as it is: samples_<stage>_at_<steps>.png."""

    def preview(done: int) -> None:
        model = WanModel(world.config.model)
        model.load_state_dict(stage.state()["ema"])
        file = f"samples_{stage.name}_at_{done:05d}.png"
        _sheet(world, stage.name, model.eval().requires_grad_(False), file)

    return preview


def _sheet(world: _World, stage: str, model: WanModel, file: str) -> None:
    """The same prompts after each stage."""
    labels = random_labels(SHEET_PROMPTS, torch.Generator().manual_seed(5))
    if stage == "teacher":
        sampler = _teacher(world, model)
        frames = sampler(labels, world.config.clip_frames, 1)
    else:
        sampler = _student(world, model, 1, MAX_STEPS)
        frames = sampler(labels, 2 * world.config.clip_frames, 1)
    contact_sheet(frames, world.out / file)


def _teacher(world: _World, model: WanModel) -> Any:
    config = world.config
    return teacher_sampler(
        model,
        world.codec,
        world.text,
        TEACHER_STEPS,
        config.teacher_guidance,
        config.timestep_shift,
    )


def _student(world: _World, model: WanModel, steps: int, first_steps: int) -> Any:
    return student_sampler(
        model, world.config.cache, world.schedule, world.codec, world.text, steps, first_steps
    )


def evaluation_rows(world: _World, student: WanModel) -> list[Row]:
    """Scores of held-out real clips, the teacher, and the student at every plan."""
    config = world.config
    frames, count = config.clip_frames, config.eval_clips
    classifier = Classifier()
    classifier.load_state_dict(world.finished("classifier", "model"))
    reference = real_reference(classifier, world.codec, 2 * count, frames)
    labels = random_labels(count, torch.Generator().manual_seed(4242))
    real = TinyWorld("test").draw(count, frames, torch.Generator().manual_seed(4243), labels).frames
    late = torch.full((count,), 3 * frames)
    old = TinyWorld("test").draw(count, frames, torch.Generator().manual_seed(4243), labels, late)
    rows = [
        score("real, held-out glyphs", classifier, real, labels, reference),
        score("real, frames 37-48", classifier, old.frames, labels, reference, later=True),
    ]

    def add(name: str, sampler: Any, length: int = frames) -> None:
        clips: Tensor = sample_all(sampler, labels, length, name)[:, -frames:]
        rows.append(score(name, classifier, clips, labels, reference, length > frames))
        log.info("%s: all three right %s", name, rows[-1].all_right)

    teacher = _teacher(world, world.network("teacher"))
    add(f"teacher, {TEACHER_STEPS} steps", teacher)
    add("causal start, 4 steps", _student(world, world.network("init"), 4, 4))
    add("causal start, 1* step (FFE)", _student(world, world.network("init"), 1, MAX_STEPS))
    for name, (steps, first_steps) in STUDENT_PLANS.items():
        add(name, _student(world, student, steps, first_steps))
    add("student, 1* step (FFE), frames 37-48", _student(world, student, 1, MAX_STEPS), 4 * frames)
    return rows


def _evaluate(world: _World, command: str) -> None:
    """Round the student as it will be stored, score it, and write it with its model card."""
    config = world.config
    ema: dict[str, Tensor] = world.finished("distill", "ema")
    rounded = {name: value.half().float() for name, value in ema.items()}
    student = WanModel(config.model)
    student.load_state_dict(rounded)
    rows = evaluation_rows(world, student.eval().requires_grad_(False))
    folder = world.out / "student"
    save_checkpoint(
        folder,
        config.model,
        rounded,
        Deployment(
            block_frames=config.cache.block_frames,
            window_frames=config.cache.window_frames,
            sink_frames=config.cache.sink_frames,
            timestep_shift=config.timestep_shift,
            latent_hw=LATENT_HW,
            fps=FPS,
            display_scale=DISPLAY_SCALE,
            words=vocabulary(),
        ),
        world.codec,
        world.text.table,
        half=True,
    )
    scores = {"command": command, "seed": world.seed, "rows": [asdict(row) for row in rows]}
    (world.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (folder / "README.md").write_text(_model_card(world, rows, command))


def _model_card(world: _World, rows: list[Row], command: str) -> str:
    config = world.config
    size = sum(p.numel() for p in WanModel(config.model).parameters())
    return f"""# {config.name}: a causal student of the tiny world

One coloured handwritten digit moving through a framed 32x32 arena, 16 frames a second, trailing a dim
glow. It sets out in the direction of the prompt and bounces off the frame. One set of weights serves 1, 2, 3
and 4 denoising steps.

- Network: Wan2.1 architecture, {size / 1e6:.2f} M parameters, dim {config.model.dim},
  {config.model.num_layers} layers, stored as float16.
- Blocks of {config.cache.block_frames} latent frames; window {config.cache.window_frames}, sink
  {config.cache.sink_frames}.
- Prompts: a colour, a digit and a direction in plain English, any of them left out if you like;
  deployment.json lists the words.
- Trained on scikit-learn's bundled digits (UCI optical recognition of handwritten digits), every sixth
  glyph held out.
- Command: `{command}`

## Scores
Judged by an independent classifier trained on real clips, which sees the digit without its trail; the same
{rows[0].clips} prompts for every row, the same noise for every student row; 95 % bootstrap intervals.
Frechet distance is on the classifier's appearance features (lower is better). `*` is First-Frame
Enhancement: the first block gets 4 steps. In frames 37-48 a digit may have turned round: there only the
axes of its motion count.

{markdown(rows)}"""
