"""Clips are what their prompts say."""

from __future__ import annotations

import pytest
import torch

from asd_rt.errors import ConfigError
from asd_rt.tokenizer import tokenize
from train.codec import LinearCodec, VocabularyEncoder
from train.tiny_world import (
    BORDER,
    CANVAS,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    PERIOD,
    TinyWorld,
    label_tokens,
    prompt_text,
    random_labels,
    vocabulary,
    without_trail,
)


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return TinyWorld("train")


def test_splits_share_no_glyph(world: TinyWorld) -> None:
    test = TinyWorld("test")
    assert len(world.glyphs) + len(test.glyphs) == 1797
    train_set = {g.numpy().tobytes() for g in world.glyphs}
    shared = sum(g.numpy().tobytes() in train_set for g in test.glyphs)
    assert shared == 0
    with pytest.raises(ConfigError, match="train or test"):
        TinyWorld("all")


def centre(clip: torch.Tensor, world: TinyWorld) -> torch.Tensor:
    """Centre of the digit, [F, 2] rows and columns."""
    ink = without_trail(clip[None])[0].sum(dim=1)
    axis = torch.arange(CANVAS, dtype=torch.float32)
    total = ink.sum(dim=(1, 2))
    rows = (ink.sum(dim=2) * axis).sum(dim=1) / total
    columns = (ink.sum(dim=1) * axis).sum(dim=1) / total
    return torch.stack([rows, columns], dim=1)


def test_a_digit_sets_out_as_its_prompt_says_for_a_whole_clip(world: TinyWorld) -> None:
    for direction, velocity in enumerate(DIRECTIONS.values()):
        labels = torch.tensor([[3, 0, direction]] * 8)
        clips = world.draw(8, 12, torch.Generator().manual_seed(7), labels)
        for clip in clips.frames:
            steps = centre(clip, world).diff(dim=0)
            expected = torch.tensor(velocity, dtype=torch.float32).expand_as(steps)
            torch.testing.assert_close(steps, expected, atol=1e-2, rtol=0)


def test_a_digit_bounces_and_comes_back_after_a_period(world: TinyWorld) -> None:
    labels = torch.tensor([[8, 1, 1]])
    clip = world.draw(1, 3 * PERIOD, torch.Generator().manual_seed(1), labels).frames[0]
    torch.testing.assert_close(clip[PERIOD : 2 * PERIOD], clip[2 * PERIOD :], atol=0.01, rtol=0)
    steps = centre(clip, world).diff(dim=0)
    assert steps[0, 0] < 0 < steps[PERIOD // 2, 0]
    begin = torch.tensor([9])
    later = world.draw(1, 5, torch.Generator().manual_seed(1), labels, begin).frames[0]
    torch.testing.assert_close(later, clip[9:14], atol=0.03, rtol=0)  # older trails are cut off
    inner = clip[:, :, BORDER:-BORDER, BORDER:-BORDER]
    assert torch.equal(clip[:, :, 0], world.empty[None, :, 0].expand(len(clip), -1, -1))
    assert inner.shape[-1] == CANVAS - 2 * BORDER


def test_a_trail_fades_behind_the_digit_and_can_be_told_from_it(world: TinyWorld) -> None:
    labels = torch.tensor([[1, 6, 2]])  # a white one, to the right
    clip = world.draw(1, 12, torch.Generator().manual_seed(2), labels).frames
    digit = without_trail(clip)
    ink = (clip - world.empty).clamp_min(0).sum(dim=(2, 3))[0, -1]  # by column
    core = digit.sum(dim=(2, 3))[0, -1].nonzero().flatten()
    behind, ahead = ink[core[0] - 6 : core[0]], ink[core[-1] + 1 :]
    assert behind.min() > 0.2
    assert (behind.diff() >= 0).all()
    assert ahead.sum() < behind.sum() / 4
    assert digit[:, :, :, 0].abs().max() == 0  # the frame is gone, too


def test_asked_labels_are_drawn(world: TinyWorld) -> None:
    labels = random_labels(20, torch.Generator().manual_seed(3))
    clips = world.draw(20, 2, torch.Generator().manual_seed(4), labels)
    found = torch.stack([clips.digit, clips.colour, clips.direction], dim=1)
    assert torch.equal(found, labels)
    assert clips.frames.min() >= 0
    assert clips.frames.max() <= 1


def test_training_tokens_are_the_runtime_tokenizers() -> None:
    """The student must read a prompt as it was trained on it."""
    words = vocabulary()
    every = [
        (d, c, m)
        for d in range(len(DIGITS))
        for c in range(len(COLOURS))
        for m in range(len(DIRECTIONS))
    ]
    tokens = label_tokens(torch.tensor(every), 8)
    for row, labels in zip(tokens, every, strict=True):
        runtime = tokenize(prompt_text(*labels), words, 8)[0]
        assert sorted(runtime.tolist()) == sorted(row.tolist())


def test_left_out_attributes_are_padding() -> None:
    labels = torch.tensor([[3, 0, 1]])
    keep = torch.tensor([[True, False, False]])
    tokens = label_tokens(labels, 8, keep)
    assert (tokens != 0).sum() == 1


def test_codec_round_trip_loses_little(world: TinyWorld) -> None:
    codec = LinearCodec(24)
    lost = codec.fit(world, 0)
    assert lost < 0.02
    frames = world.draw(4, 3, torch.Generator().manual_seed(1)).frames
    latents = codec.encode(frames)
    assert latents.shape == (4, 3, 24, 8, 8)
    assert (codec.decode(latents) - frames).pow(2).mean() < 1e-3
    assert abs(latents.pow(2).mean().item() - 1) < 0.3
    full = LinearCodec(48)
    full.fit(world, 0)
    torch.testing.assert_close(full.decode(full.encode(frames)), frames, atol=1e-4, rtol=0)


def test_padding_token_is_the_zero_vector() -> None:
    encoder = VocabularyEncoder(16)
    assert encoder(torch.zeros(1, 3, dtype=torch.long)).abs().max() == 0
    assert encoder(torch.ones(1, 1, dtype=torch.long)).abs().max() > 0
