"""Everything that a run of real networks reads, checked before its first step: all problems at once."""

from __future__ import annotations

from pathlib import Path

from asd_rt.commands.common import Problems
from asd_rt.config import ModelConfig
from train.checkpoint import open_weights
from train.clip_data import listed_prompts, open_clips, open_negative, open_pairs, open_table
from train.config import TrainConfig
from train.parallel import check_ranks
from train.real_config import ParallelConfig


def weight_sources(config: TrainConfig) -> dict[str, tuple[str, ModelConfig]]:
    """Checkpoints that a run starts from: setting -> (path, the network expected there)."""
    teacher, weights = config.teacher_model or config.model, config.weights
    found = {
        "weights.teacher": (weights.teacher, teacher),
        "weights.student": (weights.student, config.model),
    }
    if weights.critic:
        found["weights.critic"] = (weights.critic, config.model)
    return found


def check_inputs(config: TrainConfig, ranks: int) -> None:
    """Look at every file that [data] and [weights] name, without reading weights or clips.

    Args:
        config: with [data].
        ranks: processes that are to train.

    Raises:
        InputProblems: everything that is wrong, a line each.
    """
    problems, data = Problems(), config.data
    with problems.collect():
        check_ranks(config.parallel or ParallelConfig(), ranks)
    for name, (path, model) in weight_sources(config).items():
        with problems.collect():
            open_weights(Path(path), model, name)
    with problems.collect():
        open_negative(config)
    needed: dict[
        str, list[str]
    ] = {}  # prompts that must have an embedding, by where they come from
    with problems.collect():
        needed[f"lines of {data.prompts}"] = listed_prompts(config)
    if data.clips:
        with problems.collect():
            clips = open_clips(config).index.clips
            needed[f"captions of {data.clips}"] = [clip.caption for clip in clips]
    if data.ode_pairs and config.init is not None:
        with problems.collect():
            needed[f"prompts of {data.ode_pairs}"] = open_pairs(config).settings.prompts
    table = None
    with problems.collect():
        table = open_table(config)
    for source, prompts in needed.items() if table is not None else ():
        with problems.collect():
            table.rows(prompts, source)
    problems.raise_any()
