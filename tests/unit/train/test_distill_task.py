"""What a distillation step draws."""

from __future__ import annotations

from tests.unit.train.toy import SHIPPED
from train.codec import LinearCodec, VocabularyEncoder
from train.config import load_config
from train.distill_task import draw_step
from train.tiny_data import TinyData


def test_a_rollout_ends_with_the_clip_that_is_judged() -> None:
    """Frames behind it would be paid for and never read."""
    config = load_config(SHIPPED)
    data = TinyData(
        config, LinearCodec(config.model.in_dim), VocabularyEncoder(config.model.text_dim)
    )
    tasks = [draw_step(config, data, 0, "distill", index, range(1))[0] for index in range(60)]
    window, most = config.clip_frames, config.distill.frames
    assert all(len(task.positions) == task.first + window for task in tasks)
    assert {task.first for task in tasks} == set(range(0, most - window + 1, 3))
    later = [task for task in tasks if task.positions[-1] >= most]
    assert later and all(task.first >= task.block_frames for task in later)
