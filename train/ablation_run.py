"""The ablation's loop: trainings and cells in order, as far as time allows, and what is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from asd_rt import timing
from asd_rt.errors import ConfigError
from train.ablation_cells import (
    REAL,
    TEACHER,
    Cell,
    Phase,
    Results,
    cells,
    phases,
    variant_config,
)
from train.ablation_report import write_report
from train.checkpoint import save_checkpoint
from train.codec import VocabularyEncoder
from train.config import TrainConfig, fingerprint
from train.curves import CURVE, read_curve
from train.distill import DistillStage
from train.evaluation import Evaluation
from train.handover import Handover, check_pair, world_deployment
from train.judge import load_judge
from train.samplers import open_subject, open_teacher
from train.scoring import start_networks
from train.stage import load_torch, run_stage
from train.tiny_data import TinyData

TEACHER_STEPS = 30
log = logging.getLogger("train.ablation")


class Ablation:
    """All trainings and cells, done in order as far as time allows."""

    def __init__(
        self,
        config: TrainConfig,
        teacher: Handover,
        init: Handover,
        out: Path,
        seeds: Sequence[int],
        clips: int,
        deadline: float | None = None,
        save_every_s: float = 60.0,
    ) -> None:
        """Open the folder `out`, or begin it.

        Args:
            config: the recipe.
            teacher: that all trainings share.
            init: its causal start, that all trainings share.
            out: folder of the ablation.
            seeds: of the distillations.
            clips: judged a cell.
            deadline: by `time.monotonic`, after which to leave off; None = never.
            save_every_s: seconds between checkpoints.

        Raises:
            ConfigError: networks that do not belong together, or `out` holds another ablation.
        """
        check_pair(teacher, init)
        self.config, self.teacher, self.init, self.out = config, teacher, init, out
        self.phases, self.clips = phases(seeds), clips
        self._deadline, self._save_every_s = deadline, save_every_s
        self.text = VocabularyEncoder(config.model.text_dim)
        settings = {
            "recipe": {
                v: fingerprint(variant_config(config, v), 0, "distill") for v in ("asd", "dmd")
            },
            "steps": config.distill.steps,
            "teacher_sha256": teacher.sha256,
            "init_sha256": init.sha256,
            "judge": fingerprint(config, 0, "classifier"),
            "clips": clips,
            "frames": config.clip_frames,
        }
        self.results = Results(out, settings)

    @cached_property
    def evaluation(self) -> Evaluation:
        """Prompts, noise and real clips, the same for all cells."""
        return Evaluation(load_judge(self.config), self.clips, self.config.clip_frames)

    def late(self) -> bool:
        """Whether to leave off."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def run(self, timing_steps: int) -> bool:
        """Do all that is left; returns whether everything is done."""
        if self.results.timing() is None:
            self._measure_time(timing_steps)
        for name in (REAL, TEACHER):
            if self.late():
                return False
            if not self.results.has(name):
                self._bound(name)
        for phase in self.phases:
            todo = [cell for cell in cells(phase) if not self.results.has(cell.name)]
            if todo and (self.late() or not self._train(phase)):
                return False
            for cell in todo:
                if self.late():
                    return False
                self._judge(cell)
            if todo:
                self.report()
        self.report(plot=True)
        return True

    def report(self, plot: bool = False) -> None:
        """Write the tables of what is there, and the plot if asked for, which takes seconds."""
        write_report(self.out, self.results, self.phases, self.config.distill.steps, plot)

    # --- the parts

    def stage(self, phase: Phase) -> DistillStage:
        """The training of a phase, at its beginning."""
        config = variant_config(self.config, phase.variant)
        data = TinyData(config, self.teacher.codec, self.text)
        weights = self.teacher.weights, self.init.weights
        networks = start_networks(config.model, phase.seed, *weights)
        return DistillStage(config, phase.seed, data, networks)

    def steps_of(self, phase: Phase) -> int:
        """Steps of a phase, 0 where that is not known yet."""
        if phase.budget == "steps":
            return self.config.distill.steps
        measured = self.results.timing()
        return 0 if measured is None else int(measured["equal_time_steps"])

    def done_steps(self, phase: Phase) -> int:
        """Steps of a phase's training that its curve tells of."""
        records = read_curve(self.out / "trainings" / phase.training / CURVE)
        return min(self.steps_of(phase), max((r["step"] + 1 for r in records), default=0))

    def _measure_time(self, steps: int) -> None:
        """Time steps of both variants in turns, on the same tasks, so that other load hits both."""
        log.info("measuring what a step takes, with and without ASD")
        settings = self.config.distill
        both = {v: self.stage(Phase(v, "steps", self.phases[0].seed)) for v in ("asd", "dmd")}
        spent = dict.fromkeys(both, 0.0)
        first = settings.asd_warmup
        for index in range(first - 1, first + steps):
            for variant, stage in both.items():
                began = time.perf_counter()
                stage.step(max(0, index))
                if index >= first:  # the step before is to warm up
                    spent[variant] += time.perf_counter() - began
        asd, dmd = (spent[variant] / steps for variant in ("asd", "dmd"))
        warmup = min(first, settings.steps)
        whole = warmup * dmd + (settings.steps - warmup) * asd
        self.results.write_timing(
            {
                "steps": steps,
                "asd_step_s": round(asd, 4),
                "dmd_step_s": round(dmd, 4),
                "equal_time_steps": max(settings.steps, round(whole / dmd)),
                "machine": timing.describe_machine(),
            }
        )

    def _train(self, phase: Phase) -> bool:
        """Train a phase to its end, where that is not done, and keep its student; False: out of time."""
        folder = self.out / "students" / phase.name
        if folder.exists():
            return True
        where = self.out / "trainings" / phase.training
        where.mkdir(parents=True, exist_ok=True)
        stage = self.stage(phase)
        stage.steps = self.steps_of(phase)
        marks = (
            fingerprint(stage.config, phase.seed, "distill"),
            self.teacher.sha256[:12],
            self.init.sha256[:12],
        )
        log.info("%s: %d steps; %s", phase.name, stage.steps, self.time_left())
        if not run_stage(
            stage, where, "-".join(marks), save_every_s=self._save_every_s, stop=self.late
        ):
            return False
        trained = load_torch(where / f"{stage.name}.pt")["step"]
        if trained != stage.steps:
            raise ConfigError(
                f"{where}: is at step {trained}, and what it was after {stage.steps} is not in {folder}; "
                "bring that folder back, or delete the training to do it again"
            )
        folder.parent.mkdir(exist_ok=True)
        told = world_deployment(self.config)
        save_checkpoint(
            folder,
            self.config.model,
            stage.result(),
            told,
            self.teacher.codec,
            self.text.table,
            half=True,
        )
        return True

    def _judge(self, cell: Cell) -> None:
        phase = cell.phase
        began = time.monotonic()
        subject = open_subject(self.out / "students" / phase.name)
        subject.name = phase.name
        row, _ = self.evaluation.subject(subject, cell.plan)
        self.results.write(
            cell.name,
            row,
            variant=phase.variant,
            budget=phase.budget,
            seed=phase.seed,
            training_steps=self.steps_of(phase),
            training_step_s=self._step_seconds(phase),
            seconds=round(time.monotonic() - began, 1),
        )
        log.info("%s: total %s", row.title, row.scores.of("total").points())

    def _step_seconds(self, phase: Phase) -> float:
        records = read_curve(self.out / "trainings" / phase.training / CURVE)
        seconds = [r["seconds"] for r in records if r["step"] < self.steps_of(phase)]
        return round(sum(seconds) / max(1, len(seconds)), 4)

    def _bound(self, name: str) -> None:
        """Judge real clips, or the many-step teacher."""
        if name == REAL:
            self.results.write(name, self.evaluation.real())
            return
        teacher = open_teacher(self.teacher.path, TEACHER_STEPS, self.config.teacher_guidance)
        teacher.name = f"teacher, {TEACHER_STEPS} steps"
        self.results.write(name, self.evaluation.subject(teacher, None)[0])

    # --- what is left

    def seconds_left(self) -> float | None:
        """Estimated time of all that is left; None where nothing is measured yet."""
        measured = self.results.timing()
        if measured is None:
            return None
        rest, ahead = 0.0, {phase.training: self.done_steps(phase) for phase in self.phases}
        judged = [
            self.results.read(c.name)
            for p in self.phases
            for c in cells(p)
            if self.results.has(c.name)
        ]
        # Before a cell was judged: as long as its clips take as a training's rollouts, roughly.
        a_cell = 2 * self.clips / self.config.distill.batch * measured["dmd_step_s"]
        if judged:
            a_cell = sum(r["seconds"] for r in judged) / len(judged)
        for phase in self.phases:
            todo = [cell for cell in cells(phase) if not self.results.has(cell.name)]
            rest += a_cell * len(todo)
            if todo and not (self.out / "students" / phase.name).exists():
                steps = max(0, self.steps_of(phase) - ahead[phase.training])
                ahead[phase.training] += steps
                rest += steps * measured[f"{phase.variant}_step_s"]
        return rest

    def time_left(self) -> str:
        """`seconds_left` in words."""
        seconds = self.seconds_left()
        if seconds is None:
            return "time left: known once steps are timed"
        return (
            f"about {seconds / 3600:.1f} hours left"
            if seconds > 5400
            else f"about {seconds / 60:.0f} min left"
        )

    def listing(self) -> str:
        """Cells done and left, one a line, and the time left."""
        lines = []
        count = done = 0
        for phase in self.phases:
            steps = self.steps_of(phase)
            state = f"trained {self.done_steps(phase)} of {steps or '?'} steps"
            if (self.out / "students" / phase.name).exists():
                state = f"trained, {steps} steps"
            lines.append(f"{phase.name}: {state}")
            for cell in cells(phase):
                has = self.results.has(cell.name)
                count, done = count + 1, done + has
                found = (
                    f"total {self.results.read(cell.name)['figures']['total'][0]:.1f}"
                    if has
                    else "left"
                )
                lines.append(
                    f"  {cell.plan.steps} steps, first block {cell.plan.first_steps}: {found}"
                )
        lines.append(f"{done} of {count} cells done; {self.time_left()}")
        return "\n".join(lines)
