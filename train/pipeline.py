"""The stages of a run in order, each reading what the one before left in the run's folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_rt.errors import ConfigError, OutputError
from asd_rt.schedule import MAX_STEPS, Schedule
from train.causal_init import InitStage
from train.checkpoint import Deployment, save_checkpoint
from train.classifier import Classifier, ClassifierStage
from train.codec import LinearCodec, VocabularyEncoder
from train.config import TrainConfig, fingerprint
from train.curves import CURVE, read_curve, write_page
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
from train.pictures import contact_sheet
from train.scoring import start_networks
from train.stage import Stage, load_torch, run_stage
from train.teacher import TeacherStage
from train.tiny_data import LATENT_HW, TinyData
from train.tiny_world import FPS, TinyWorld, random_labels, vocabulary

log = logging.getLogger(__name__)
STAGES = ("classifier", "teacher", "init", "distill", "evaluate")
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
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    if not resume and any(out.glob("*.pt")):
        raise ConfigError(
            f"{out} already holds a run; go on with it by --resume, or name another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be created ({error}); name another --out") from error
    codec = LinearCodec(config.model.in_dim)
    lost = codec.fit(TinyWorld("train"), seed)
    log.info("codec: %d channels lose %.2f %% of the frames' variance", codec.channels, 100 * lost)
    text = VocabularyEncoder(config.model.text_dim)
    world = _World(config, out, seed, codec, text)
    for name in STAGES:
        if name not in stages:
            continue
        if name == "evaluate":
            _evaluate(world, command)
            continue
        stage = _make_stage(name, world)
        preview = None if name == "classifier" else _previewer(world, stage)
        run_stage(stage, out, fingerprint(config, seed, name), preview)
        if name != "classifier":
            _sheet(world, name, world.network(name), f"samples_{name}.png")
    write_page(out, read_curve(out / CURVE), {})


class _World:
    """What all stages of a run share."""

    def __init__(
        self, config: TrainConfig, out: Path, seed: int, codec: LinearCodec, text: VocabularyEncoder
    ) -> None:
        self.config, self.out, self.seed, self.codec, self.text = config, out, seed, codec, text
        self.schedule = Schedule(config.timestep_shift)

    def finished(self, stage: str, key: str) -> dict[str, Any]:
        """Part `key` of a finished stage's state."""
        path = self.out / f"{stage}.pt"
        if not path.exists():
            raise ConfigError(f"{path}: missing; run the stage {stage} first (--stages {stage})")
        saved = load_torch(path)
        if saved["fingerprint"] != fingerprint(self.config, self.seed, stage):
            raise ConfigError(
                f"{path}: made with another configuration or seed; delete it to train it again"
            )
        total = getattr(self.config, stage).steps
        if saved["step"] < total:
            raise ConfigError(
                f"{path}: only {saved['step']} of {total} steps are done; "
                f"run again with --resume --stages {stage} first"
            )
        values: dict[str, Any] = saved["stage"][key]
        return values

    def network(self, stage: str) -> WanModel:
        """The averaged network of a finished stage, for sampling."""
        model = WanModel(self.config.model)
        model.load_state_dict(self.finished(stage, "ema"))
        return model.eval().requires_grad_(False)


def _make_stage(name: str, world: _World) -> Stage:
    config, seed = world.config, world.seed
    if name == "classifier":
        return ClassifierStage(config, seed, world.codec)
    data = TinyData(config, world.codec, world.text)
    if name == "teacher":
        torch.manual_seed(seed)
        return TeacherStage(config, seed, data, WanModel(config.model))
    teacher = world.finished("teacher", "ema")
    if name == "init":
        network = WanModel(config.model)
        network.load_state_dict(teacher)
        return InitStage(config, seed, data, network)
    networks = start_networks(config.model, seed, teacher, world.finished("init", "ema"))
    return DistillStage(config, seed, data, networks)


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
