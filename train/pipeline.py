"""The stages of a run in order, each reading what the one before handed on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_rt.errors import ConfigError
from asd_rt.files import make_folder
from asd_rt.plan import FixedPlan
from asd_rt.schedule import MAX_STEPS, Schedule
from train.causal_init import InitStage
from train.codec import LinearCodec, VocabularyEncoder
from train.config import TrainConfig, fingerprint
from train.curves import CURVE, read_curve, write_page
from train.distill import DistillStage
from train.handover import Handover, check_pair, hand_on, take_up
from train.judge import load_judge
from train.model import WanModel
from train.pictures import contact_sheet
from train.samplers import Student, Teacher, frozen_network
from train.scoring import start_networks
from train.selection import Selection, held_out_share
from train.stage import Checkpoints, Stage, load_torch, run_stage
from train.student_card import write_student
from train.teacher import TeacherStage
from train.threads import use_threads
from train.tiny_data import TinyData
from train.tiny_world import TinyWorld, random_labels

log = logging.getLogger(__name__)
STAGES = ("teacher", "init", "distill", "evaluate")
TEACHER_STEPS = 30
SHEET_PROMPTS = 12


def run(
    config: TrainConfig,
    out: Path,
    seed: int,
    stages: list[str],
    resume: bool,
    threads: int,
    command: str,
    teacher: Path | None = None,
    init: Path | None = None,
    save_every_s: float = 60.0,
) -> None:
    """Run `stages` in their order.

    Args:
        config: the recipe.
        out: the run's folder: checkpoints, curve.jsonl, pictures, scores and the student.
        seed: of everything.
        stages: names out of STAGES.
        resume: go on with a run that `out` already holds.
        threads: CPU threads, 0 = as `use_threads` finds.
        command: for the model card.
        teacher: a finished one, as a run hands it on; its stage is not run.
        init: a causal start of that teacher; its stage is not run.
        save_every_s: seconds between checkpoints.

    Raises:
        ConfigError: `out` holds a run and `resume` is not set, or a stage's input is missing or does not fit.
        OutputError: `out` cannot be written.
    """
    use_threads(threads)
    if not resume and any(out.glob("*.pt")):
        raise ConfigError(
            f"{out} already holds a run; go on with it by --resume, or name another --out"
        )
    make_folder(out)
    given = {
        name: path for name, path in (("teacher", teacher), ("init", init)) if path is not None
    }
    world = World(config, out, seed, given)
    for name in STAGES:
        if name not in stages or name in given:
            continue
        if name == "evaluate":
            write_student(world, command)
            continue
        stage = _make_stage(name, world)
        run_stage(stage, out, world.mark(name), _previewer(world, stage), save_every_s=save_every_s)
        if name != "distill":
            world.hand_on(name)
        _sheet(world, name, world.averaged(name), f"samples_{name}.png")
    write_page(out, read_curve(out / CURVE), {})


class World:
    """What all stages of a run share.

    Attributes:
        config, out, seed: of the run.
        codec: of a given teacher, else fitted to the world.
        text: words as vectors.
        schedule: of the student's steps.
    """

    def __init__(
        self, config: TrainConfig, out: Path, seed: int, given: dict[str, Path] | None = None
    ) -> None:
        """Take up the networks `given` (stage -> folder) and fit a codec where none comes with them."""
        self.config, self.out, self.seed = config, out, seed
        self.text = VocabularyEncoder(config.model.text_dim)
        self.schedule = Schedule(config.timestep_shift)
        given = given or {}
        self._given = {name: take_up(path, name, config) for name, path in given.items()}
        if len(self._given) == 2:
            check_pair(self._given["teacher"], self._given["init"])
        if self._given:
            self.codec = next(iter(self._given.values())).codec
            return
        self.codec = LinearCodec(config.model.in_dim)
        lost = self.codec.fit(TinyWorld("train"), seed)
        log.info(
            "codec: %d channels lose %.2f %% of the frames' variance",
            self.codec.channels,
            100 * lost,
        )

    def mark(self, stage: str) -> str:
        """Fingerprint of all that the result of `stage` depends on, given networks included."""
        marks = [fingerprint(self.config, self.seed, stage)]
        return "-".join([*marks, *(found.sha256[:12] for found in self._given.values())])

    def averaged(self, stage: str) -> dict[str, Tensor]:
        """The averaged network of a finished stage, from its own file in the run's folder.

        Raises:
            ConfigError: the stage is not finished, or is of another configuration.
        """
        checkpoints = Checkpoints(self.out, stage, sharded=False)
        saved = load_torch(
            checkpoints.finished(self.mark(stage), getattr(self.config, stage).steps)
        )
        state: dict[str, Any] = saved["stage"]
        chosen: dict[str, Tensor] = state.get("selection", {}).get("weights") or state["ema"]
        return chosen

    def hand_on(self, stage: str) -> None:
        """Write the averaged network of finished stage `stage` to OUT/`stage`."""
        origin = {
            "stage": stage,
            "steps": getattr(self.config, stage).steps,
            "seed": self.seed,
            "fingerprint": self.mark(stage),
        }
        if stage == "init":
            origin["teacher_sha256"] = self.handed("teacher").sha256
        hand_on(self.out / stage, self.config, self.averaged(stage), self.codec, origin)

    def handed(self, stage: str) -> Handover:
        """What `stage` handed on: a given network, or that in OUT/`stage`.

        Raises:
            ConfigError: the stage is not finished, or is of another configuration.
        """
        if stage in self._given:
            return self._given[stage]
        folder = self.out / stage
        if not folder.exists():
            self.hand_on(stage)
        found = take_up(folder, stage, self.config)
        if found.origin.get("fingerprint") != self.mark(stage):
            raise ConfigError(
                f"{folder}: made with another configuration or seed; delete it to write it again, or give "
                f"it as --{stage}"
            )
        return found

    def student(self, name: str, weights: dict[str, Tensor]) -> Student:
        """A causal student with these weights, to sample from."""
        config = self.config
        model = frozen_network(config.model, weights)
        return Student(name, model, config.cache, self.schedule, self.codec, self.text)

    def teacher(self, weights: dict[str, Tensor]) -> Teacher:
        """The teacher with these weights, to sample from."""
        config = self.config
        return Teacher(
            f"teacher, {TEACHER_STEPS} steps",
            frozen_network(config.model, weights),
            self.codec,
            self.text,
            TEACHER_STEPS,
            config.teacher_guidance,
            config.timestep_shift,
            config.cache.block_frames,
        )


def _make_stage(name: str, world: World) -> Stage:
    config, seed = world.config, world.seed
    data = TinyData(config, world.codec, world.text)
    if name == "teacher":
        torch.manual_seed(seed)
        return TeacherStage(config, seed, data, WanModel(config.model))
    teacher = world.handed("teacher").weights
    if name == "init":
        network = WanModel(config.model)
        network.load_state_dict(teacher)
        return InitStage(config, seed, data, network)
    networks = start_networks(config.model, seed, teacher, world.handed("init").weights)
    return DistillStage(config, seed, data, networks, selection=_selection(world))


def _selection(world: World) -> Selection | None:
    config = world.config
    settings = config.distill
    if not settings.select_every:
        return None
    evaluate = held_out_share(
        load_judge(config),
        config.model,
        config.cache,
        world.schedule,
        world.codec,
        world.text,
        settings.select_clips,
        config.clip_frames,
    )
    return Selection(settings.select_every, settings.select_clips, evaluate)


def _previewer(world: World, stage: Stage) -> Callable[[int], None]:
    """Pictures of the averaged network as it is: samples_<stage>_at_<steps>.png."""

    def preview(done: int) -> None:
        file = f"samples_{stage.name}_at_{done:05d}.png"
        _sheet(world, stage.name, stage.state()["ema"], file)

    return preview


def _sheet(world: World, stage: str, weights: dict[str, Tensor], file: str) -> None:
    """The same prompts after each stage."""
    labels = random_labels(SHEET_PROMPTS, torch.Generator().manual_seed(5))
    frames, plan = world.config.clip_frames, FixedPlan(1, MAX_STEPS)
    if stage == "teacher":
        clips = world.teacher(weights).sample(labels, frames, plan, 1)
    else:
        clips = world.student(stage, weights).sample(labels, 2 * frames, plan, 1)
    contact_sheet(clips, world.out / file)
