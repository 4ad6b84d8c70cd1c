"""Stages resume exactly, refuse foreign checkpoints, and leave good files alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_rt.errors import CheckpointError, ConfigError
from train.causal_init import InitStage
from train.classifier import ClassifierStage
from train.codec import LinearCodec, VocabularyEncoder
from train.command_line import MAX_SEED
from train.config import TrainConfig, fingerprint, load_config
from train.distill import DistillStage
from train.model import WanModel
from train.optimizers import Ema, warmup_cosine
from train.parallel import SINGLE, Parallel
from train.scoring import start_networks
from train.stage import Stage, run_stage, save_torch, step_generator
from train.teacher import TeacherStage
from train.tiny_data import TinyData

CONFIG = Path(__file__).parents[3] / "train" / "configs" / "tiny.toml"


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    smoke = load_config(CONFIG).smoke()
    model = replace(smoke.model, dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=8, out_dim=8)
    return replace(
        smoke, model=model, distill=replace(smoke.distill, steps=6, asd_warmup=0, long_share=0.5)
    )


def make(name: str, config: TrainConfig, parallel: Parallel = SINGLE) -> Stage:
    torch.manual_seed(0)
    codec, text = LinearCodec(8), VocabularyEncoder(32)
    from train.tiny_world import TinyWorld

    codec.fit(TinyWorld(), 0)
    network = WanModel(config.model)
    torch.nn.init.normal_(network.head.head.weight, std=0.1)  # zero at first: nothing would flow
    weights = network.state_dict()
    data = TinyData(config, codec, text)
    if name == "classifier":
        return ClassifierStage(config, 0, codec)
    if name == "teacher":
        torch.manual_seed(0)
        return TeacherStage(config, 0, data, WanModel(config.model), parallel)
    if name == "init":
        return InitStage(config, 0, data, network, parallel)
    networks = start_networks(config.model, 0, weights, weights)
    return DistillStage(config, 0, data, networks, parallel)


@pytest.mark.parametrize("name", ["classifier", "teacher", "init", "distill"])
def test_a_resumed_stage_goes_on_bit_for_bit(name: str, config: TrainConfig) -> None:
    whole = make(name, config)
    figures = [whole.step(i) for i in range(4)]
    first = make(name, config)
    for i in range(2):
        first.step(i)
    second = make(name, config)
    second.load(first.state())
    assert [second.step(i) for i in range(2, 4)] == figures[2:]


class Counter(Stage):
    """Counts; breaks where it is told to."""

    name = "counter"
    steps = 5

    def __init__(self, bad_step: int = -1) -> None:
        self.count, self.bad_step = 0, bad_step

    def step(self, index: int) -> dict[str, float]:
        self.count += 1
        return {"loss": float("nan") if index == self.bad_step else float(index)}

    def state(self) -> dict[str, int]:
        return {"count": self.count}

    def load(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_a_finished_stage_is_not_repeated(tmp_path: Path) -> None:
    run_stage(Counter(), tmp_path, "a")
    again = Counter()
    run_stage(again, tmp_path, "a")
    assert again.count == 5
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [0, 1, 2, 3, 4]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    run_stage(Counter(), tmp_path, "a")
    with pytest.raises(ConfigError, match="another configuration or seed"):
        run_stage(Counter(), tmp_path, "b")


def test_a_figure_that_is_not_finite_stops_the_stage(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step 3: a figure is not finite"):
        run_stage(Counter(bad_step=3), tmp_path, "a")
    assert not (tmp_path / "counter.pt").exists()


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "counter.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        run_stage(Counter(), tmp_path, "a")


def test_a_checkpoint_that_lacks_a_part_of_the_state_is_one_line(tmp_path: Path) -> None:
    stage = Counter()
    run_stage(stage, tmp_path, "a")
    file = tmp_path / "counter.pt"
    save_torch({"fingerprint": "a", "step": 3, "stage": {}}, file)
    whole = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"counter\.pt: holds no 'count', so another version"):
        run_stage(Counter(), tmp_path, "a")
    assert file.read_bytes() == whole


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    save_torch({"value": 1}, path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_torch({"value": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"value": 1}


def test_fingerprint_depends_on_what_a_stage_uses(config: TrainConfig) -> None:
    other = replace(config, distill=replace(config.distill, steps=99))
    assert fingerprint(config, 0, "teacher") == fingerprint(other, 0, "teacher")
    assert fingerprint(config, 0, "distill") != fingerprint(other, 0, "distill")
    assert fingerprint(config, 0, "teacher") != fingerprint(config, 1, "teacher")


def test_streams_of_steps_differ() -> None:
    draws = {
        torch.rand(1, generator=step_generator(seed, stage, i)).item()
        for seed in (0, 1)
        for stage in ("teacher", "init")
        for i in range(5)
    }
    assert len(draws) == 20


@pytest.mark.parametrize("seed", [20_260_101, MAX_SEED])
def test_large_seeds_have_streams_of_their_own(seed: int) -> None:
    draws = [torch.randn(4, generator=step_generator(s, "distill", 7)) for s in (seed, seed - 1)]
    assert not torch.equal(*draws)


def test_ema_and_schedule() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = Ema(model, 0.9)
    torch.nn.init.ones_(model.weight)
    ema.update(model)
    torch.testing.assert_close(ema.values["weight"], torch.tensor([[0.1]]))
    ema.update(model, 0.0)
    torch.testing.assert_close(ema.values["weight"], torch.ones(1, 1))
    assert warmup_cosine(0, 100, 10) == pytest.approx(0.1)
    assert warmup_cosine(10, 100, 10) == pytest.approx(1.0)
    assert warmup_cosine(99, 100, 10) < 0.03


def test_a_distillation_step_trains_every_weight(config: TrainConfig) -> None:
    """Rollouts without gradients share weights with last passes that need them; nothing may get lost."""
    stage = make("distill", config)
    assert isinstance(stage, DistillStage)
    for index in range(3):
        stage.step(index)
        for name, state in stage.state()["optimizers"]["student"].items():
            assert state["step"] == index + 1, name
            assert state["exp_avg_sq"].abs().max() > 0, name
        for name, state in stage.state()["optimizers"]["critic"].items():
            assert state["step"] == (index + 1) * config.distill.critic_updates, name
    assert all(p.grad is None for p in stage.networks.teacher.parameters())


def test_a_stage_that_is_told_to_stop_saves_and_goes_on(tmp_path: Path) -> None:
    first = Counter()
    assert not run_stage(first, tmp_path, "a", stop=lambda: first.count == 2)
    second = Counter()
    assert run_stage(
        second, tmp_path, "a", stop=lambda: second.count == 5
    )  # nothing is left to stop
    assert second.count == 5
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_the_curve_is_on_disk_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the two then leaves records too many, which resuming drops, and no gap."""
    import train.stage

    seen = []

    def look(state: dict[str, Any], path: Path) -> None:
        seen.append((state["step"], len((tmp_path / "curve.jsonl").read_text().splitlines())))
        save_torch(state, path)

    monkeypatch.setattr(train.stage, "save_torch", look)
    run_stage(Counter(), tmp_path, "a", save_every_s=0)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (5, 5)]
