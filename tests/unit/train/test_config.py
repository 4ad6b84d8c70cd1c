"""Training configurations: strict, and complete in one error."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_rt.errors import ConfigError
from train.config import fingerprint, load_config

CONFIG = Path(__file__).parents[3] / "train" / "configs" / "tiny.toml"
WAN = CONFIG.with_name("wan_1_3b_asd.toml")


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
        ("batch = 64", "batch = -1", "batch must be a whole number >= 1, found -1"),
        (
            "select_every = 50",
            "select_every = -1",
            "distill: select_every must be a number >= 0, found -1",
        ),
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


def test_the_wan_configuration_loads_and_can_be_changed() -> None:
    config = load_config(WAN)
    assert config.one_shape
    assert config.parallel is not None
    assert config.parallel.micro_batches * config.distill.batch == 64
    changed = load_config(
        WAN, ["model.num_layers=2", "weights.teacher=/data/wan", "distill.betas=[0.5, 0.9]"]
    )
    assert changed.model.num_layers == 2
    assert changed.weights is not None
    assert changed.weights.teacher == "/data/wan"
    assert changed.distill.betas == (0.5, 0.9)
    assert fingerprint(config, 0, "distill") != fingerprint(changed, 0, "distill")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.layers=2", "unknown key layers"),
        ("distill.betas=[0.5]", "distill: betas must be two numbers >= 0 and < 1, found .0.5,"),
        ("distill.betas=['a', 0.9]", "betas must be a list of numbers"),
        ("distill.student_lr=-1.0", "student_lr must be a number > 0, found -1.0"),
        ("distill.student_lr=inf", "student_lr must be a number > 0, found inf"),
        ("distill.critic_lr=nan", "critic_lr must be a number > 0, found nan"),
        ("distill.steps=0", "distill: steps must be a whole number >= 1, found 0"),
        ("distill.regularise_sigma=0", "regularise_sigma must be a number > 0, found 0"),
        ("distill.ema=1.0", "ema must be a number >= 0 and < 1, found 1.0"),
        ("distill.long_share=1.5", "long_share must be a share from 0 to 1, found 1.5"),
        ("distill.step_weights=[0, 0, 0, 0]", "step_weights must be 4 numbers >= 0, not all 0"),
        ("timestep_shift=0", "timestep_shift must be a number > 0, found 0"),
        ("model.num_layers=many", "num_layers must be a whole number, found 'many'"),
        ("distill.student_lr=fast", "student_lr must be a number, found 'fast'"),
        ("parallel.checkpoint_activations=1", "must be true or false, found 1"),
        ("parallel.precision=fp8", "precision must be one of auto, bf16, fp32"),
        ("parallel.micro_batches=0", "micro_batches must be >= 1"),
        ("data.latent_hw=[60, 105]", "two even numbers"),
        ("model", "expected section.key=value"),
        ("model.a.b=1", "expected section.key=value"),
        ("name.x=1", "name is no section"),
        ("distill.frames=20", "not a multiple of cache.block_frames"),
        ("teacher.steps=1", r"\[teacher\]: .*missing"),
    ],
)
def test_changes_that_cannot_be(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(WAN, [change])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith((str(WAN), "--set")), "it names its source"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[weights]\n", "[weight]\n", "unknown key weight;"),
        ("[data]\n", "[date]\n", "unknown key date;"),
        ("# clips =", "clips =", None),
    ],
)
def test_sections_that_belong_together(
    tmp_path: Path, old: str, new: str, message: str | None
) -> None:
    path = tmp_path / "changed.toml"
    text = WAN.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    if message is None:
        assert load_config(path).data is not None
        return
    with pytest.raises(ConfigError, match=message):
        load_config(path)
