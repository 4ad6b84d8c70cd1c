"""Everything that a run of real networks reads, checked before its first step: all problems at once."""

from __future__ import annotations

from pathlib import Path

from asd_rt.commands.common import Problems
from asd_rt.config import ModelConfig
from train.checkpoint import open_weights
from train.clip_data import open_clips, open_negative, open_pairs, open_table, prompt_rows
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
    with problems.collect():
        table = open_table(config)
        with problems.collect():
            prompt_rows(config, table)
        if data.clips:
            with problems.collect():
                clips = open_clips(config).index.clips
                captions = [clip.caption for clip in clips]
                table.rows(captions, f"captions of {data.clips}")
        if data.ode_pairs and config.init is not None:
            with problems.collect():
                pairs = open_pairs(config)
                table.rows(pairs.settings.prompts, f"prompts of {data.ode_pairs}")
    problems.raise_any()
