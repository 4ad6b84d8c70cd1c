"""Runs of real networks: the stages that the configuration has, from checkpoints, to a student's folder."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from asd_rt.config import ModelConfig
from asd_rt.errors import ConfigError
from asd_rt.files import make_folder
from train.causal_init import InitStage
from train.checkpoint import Deployment, open_weights, save_checkpoint
from train.clip_data import ClipData
from train.config import TrainConfig, fingerprint
from train.curves import CURVE, read_curve, write_page
from train.discriminator import Discriminator
from train.distill import DistillStage
from train.model import WanModel
from train.parallel import Parallel, processes, whole
from train.real_inputs import check_inputs, weight_sources
from train.scoring import Networks, feature_layers
from train.stage import Checkpoints, Stage, run_stage
from train.teacher import TeacherStage
from train.threads import use_threads

log = logging.getLogger(__name__)
STUDENT = "student"


def stages_of(config: TrainConfig) -> tuple[str, ...]:
    """The stages of a run with [data]: those whose sections the configuration has."""
    return tuple(n for n in ("teacher", "init", "distill") if getattr(config, n) is not None)


def run(
    config: TrainConfig, out: Path, seed: int, stages: list[str], resume: bool, threads: int
) -> None:
    """Run `stages` in their order; the averaged student is written to `out`/student.

    Args:
        config: with [data] and [weights].
        out: the run's folder.
        seed: of everything.
        stages: names out of `stages_of`.
        resume: go on with a run that `out` already holds.
        threads: CPU threads of a process, 0 = its share of usable cores.

    Raises:
        ConfigError: `out` holds a run and `resume` is not set, or a stage's input is missing.
        InputProblems: files that are absent or do not fit, all of them.
        OutputError: `out` cannot be written.
    """
    with processes(config.parallel) as parallel:
        check_inputs(config, parallel.ranks)
        _open_run(out, resume, threads, parallel)
        start = _Start(config, out, seed, parallel)
        for name in stages_of(config):
            if name not in stages:
                continue
            stage = start.stage(name)
            run_stage(stage, out, fingerprint(config, seed, name), sharded=True)
            if isinstance(stage, DistillStage):
                _write_student(stage, out / STUDENT)
            parallel.wait()
        if parallel.first:
            write_page(out, read_curve(out / CURVE), {})


def _open_run(out: Path, resume: bool, threads: int, parallel: Parallel) -> None:
    """Make the run's folder, and share the processor's cores among the processes of this machine."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    use_threads(threads, beside)
    if not resume and any(out.glob("*/step_*")):
        raise ConfigError(
            f"{out} already holds a run; go on with it by --resume, or name another --out"
        )
    make_folder(out)
    parallel.wait()


def random_discriminator(teacher: ModelConfig, seed: int) -> Discriminator:
    """A discriminator of features of a network like `teacher`."""
    torch.manual_seed(seed)
    return Discriminator(teacher.dim, len(feature_layers(teacher.num_layers)))


class _Start:
    """What stages start from: checkpoints of the configuration, or of an earlier stage of this run."""

    def __init__(self, config: TrainConfig, out: Path, seed: int, parallel: Parallel) -> None:
        self.config, self.out, self.seed, self.parallel = config, out, seed, parallel
        self.data = ClipData(config, seed)
        self.teacher_model = config.teacher_model or config.model

    def stage(self, name: str) -> Stage:
        """The stage `name` with its networks."""
        config, arguments = self.config, (self.seed, self.data)
        if name == "teacher":
            network = self._network(self.teacher_model, "weights.teacher")
            return TeacherStage(config, *arguments, network, self.parallel)
        if name == "init":
            own = "teacher" if config.teacher is not None and config.one_shape else None
            network = self._network(config.model, "weights.student", own)
            return InitStage(config, *arguments, network, self.parallel)
        return DistillStage(config, *arguments, self._networks(), self.parallel)

    def _networks(self) -> Networks:
        config = self.config
        trained = "teacher" if config.teacher is not None else None
        # A frozen network has no use for more digits than its products have.
        dtype = torch.bfloat16 if self.parallel.bf16 else torch.float32
        teacher = self._network(self.teacher_model, "weights.teacher", trained, dtype)
        if config.weights.critic:
            critic = self._network(config.model, "weights.critic")
        else:
            critic = self._network(config.model, "weights.teacher", trained)
        own = "init" if config.init is not None else None
        student = self._network(config.model, "weights.student", own)
        discriminator = random_discriminator(self.teacher_model, self.seed)
        self.parallel.prepare(discriminator)
        return Networks(student, critic, discriminator, teacher)

    def _network(
        self,
        model: ModelConfig,
        source: str,
        stage: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> WanModel:
        """A network with the weights that the setting `source` names, or the averaged ones of `stage`."""
        with torch.device("meta"):
            network = WanModel(model).to(dtype)
        self.parallel.prepare(network)
        if stage is None:
            path, expected = weight_sources(self.config)[source]
            self.parallel.fill(network, open_weights(Path(path), expected, source))
            return network
        checkpoints = Checkpoints(self.out, stage, sharded=True)
        mark = fingerprint(self.config, self.seed, stage)
        path = checkpoints.finished(mark, getattr(self.config, stage).steps)
        network.to_empty(device=self.parallel.device)
        checkpoints.load(path, {"ema": {k: p.detach() for k, p in network.named_parameters()}})
        return network


def _write_student(stage: DistillStage, folder: Path) -> None:
    """Gather the averaged student and write it as a checkpoint of our own."""
    config = stage.config
    weights = {name: whole(value) for name, value in stage.ema.values.items()}
    if not stage.parallel.first:
        return
    cache = config.cache
    model = replace(
        config.model, local_attn_size=cache.window_frames or -1, sink_size=cache.sink_frames
    )
    deployment = Deployment(
        block_frames=cache.block_frames,
        window_frames=cache.window_frames,
        sink_frames=cache.sink_frames,
        timestep_shift=config.timestep_shift,
        latent_hw=stage.data.latent_hw,
        trained_frames=config.distill.frames,
    )
    save_checkpoint(folder, model, weights, deployment)
    log.info("student: %s", folder)
