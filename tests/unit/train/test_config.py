"""Training configurations: strict, and complete in one error."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_rt.errors import ConfigError
from train.config import load_config

CONFIG = Path(__file__).parents[3] / "train" / "configs" / "tiny.toml"


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = CONFIG.read_text()
    assert old in text
    path = tmp_path / "changed.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_shipped_configuration_loads() -> None:
    config = load_config(CONFIG)
    assert config.model.local_attn_size == config.cache.window_frames
    assert config.model.sink_size == config.cache.sink_frames
    assert config.clip_frames >= 12


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\nguidance =", "\nguidence =", "unknown key guidence"),
        ("name =", "title =", "missing name"),
        ("clip_frames = 12", "clip_frames = 13", "not a multiple"),
        ("sink_frames = 3", "sink_frames = 12", "smaller than window_frames"),
        ("num_heads = 4", "num_heads = 7", "not a multiple of num_heads"),
        ("[teacher]", "[teacher", "cannot be read as TOML"),
        ("step_weights = [", "step_weights = [1.0, ", "must be 4 numbers"),
    ],
)
def test_bad_configurations_are_one_clear_error(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(changed(tmp_path, old, new))


def test_a_missing_file_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train/configs"):
        load_config(tmp_path / "none.toml")
