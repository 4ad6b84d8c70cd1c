"""Averaged networks that are carried from run to run: what fits is taken up, what does not is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asd_rt.errors import ConfigError
from tests.unit.train.toy import SHIPPED, toy_start, toy_toml
from train.config import TrainConfig, fingerprint, load_config
from train.handover import STAGE, check_pair, hand_on, take_up


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return load_config(toy_toml(tmp_path))


@pytest.fixture
def start(tmp_path: Path, config: TrainConfig) -> tuple[Path, Path]:
    return toy_start(tmp_path, tmp_path / "toy.toml")


def test_weights_are_small_and_come_back_rounded(
    start: tuple[Path, Path], config: TrainConfig
) -> None:
    found = take_up(start[0], "teacher", config)
    stored = load_file(start[0] / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    for name, tensor in found.weights.items():
        assert torch.equal(tensor, stored[name].float())
    again = start[0].parent / "again"
    hand_on(again, config, found.weights, found.codec, found.origin)
    assert take_up(again, "teacher", config).sha256 == found.sha256
    assert json.loads((again / STAGE).read_text()) == {"stage": "teacher"}


def test_what_does_not_fit_is_named(start: tuple[Path, Path], config: TrainConfig) -> None:
    wider = replace(config, model=replace(config.model, dim=64, num_layers=3))
    with pytest.raises(ConfigError, match=r"dim 32 \(expected 64\), num_layers 2 \(expected 3\)"):
        take_up(start[0], "teacher", wider)
    other = replace(config, cache=replace(config.cache, window_frames=9), timestep_shift=3.0)
    with pytest.raises(
        ConfigError, match=r"window_frames 12 .*timestep_shift 5.0 \(expected 3.0\)"
    ):
        take_up(start[1], "init", other)
    with pytest.raises(ConfigError, match=r"stage init \(expected teacher\)"):
        take_up(start[1], "teacher", config)
    with pytest.raises(ConfigError, match="no such checkpoint"):
        take_up(start[0] / "none", "teacher", config)
    (start[0] / "text_encoder.safetensors").unlink()
    told = json.loads((start[0] / "deployment.json").read_text())
    (start[0] / "deployment.json").write_text(json.dumps(told | {"words": None}))
    with pytest.raises(ConfigError, match="lacks the codec and the words"):
        take_up(start[0], "teacher", config)


def test_a_causal_start_belongs_to_its_teacher(
    start: tuple[Path, Path], config: TrainConfig
) -> None:
    teacher, init = take_up(start[0], "teacher", config), take_up(start[1], "init", config)
    check_pair(teacher, init)
    with pytest.raises(ConfigError, match="made from another teacher"):
        check_pair(replace(teacher, sha256="0" * 64), init)


def test_the_start_that_is_at_hand_fits_the_shipped_recipe() -> None:
    """`--teacher` and `--init` of the README."""
    config, folder = load_config(SHIPPED), SHIPPED.parents[1] / "tiny_start"
    teacher, init = (take_up(folder / stage, stage, config) for stage in ("teacher", "init"))
    check_pair(teacher, init)
    for stage, found in (("teacher", teacher), ("init", init)):
        assert found.origin["fingerprint"] == fingerprint(config, 0, stage)
