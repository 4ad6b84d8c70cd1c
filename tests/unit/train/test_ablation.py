"""The ablation at toy size: resumable, budgets kept, intervals over seeds and prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from asd_rt.errors import ConfigError
from asd_rt.plan import FixedPlan
from tests.unit.train.toy import toy_start, toy_toml
from train import ablation, ablation_run, distill
from train.ablation_cells import PLANS, Cell, Phase, Results, cells, phases, variant_config
from train.ablation_report import Table, _interval
from train.config import load_config
from train.scores import RESAMPLES

Run = Callable[..., int]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    toy_start(folder, toy_toml(folder))
    return folder


@pytest.fixture
def run(start: Path, tmp_path: Path) -> Run:
    def run(*flags: str, out: Path = tmp_path / "out") -> int:
        given = ["--config", str(start / "toy.toml"), "--run", str(start), "--out", str(out)]
        return ablation.main([*given, "--clips", "3", "--timing-steps", "1", *flags])

    return run


@pytest.fixture
def slow_asd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still but for 2 s a step with ASD and 1 s without."""
    spent = [0.0]
    step = distill.DistillStage.step

    def timed(self, index):
        spent[0] += 2.0 if self.config.distill.asd_ratio else 1.0
        return step(self, index)

    monkeypatch.setattr(distill.DistillStage, "step", timed)
    monkeypatch.setattr(ablation_run.time, "perf_counter", lambda: spent[0])


def results(out: Path) -> dict[str, dict]:
    found = {p.stem: json.loads(p.read_text()) for p in (out / "results").glob("*.json")}
    for result in found.values():
        result.pop("seconds", None)
        result.pop("training_step_s", None)
    return found


@pytest.mark.slow
def test_all_cells_of_two_seeds(run: Run, tmp_path: Path, slow_asd: None, capsys) -> None:
    assert run("--seeds", "0", "1", "--list") == 0
    assert "0 of 30 cells done; time left: known once steps are timed" in capsys.readouterr().out
    assert not (tmp_path / "out" / "settings.json").exists()  # listing begins nothing
    assert run("--seeds", "0", "1") == 0
    out = tmp_path / "out"
    found = results(out)
    assert len(found) == 2 + 2 * 3 * 5
    # 4 steps, one of them before ASD begins: 1 + 3 * 2 = 7 s, which buys 7 steps without it.
    assert json.loads((out / "timing.json").read_text())["equal_time_steps"] == 7
    for name, result in found.items():
        if name.startswith("dmd-time"):
            assert result["training_steps"] == 7
        elif name[:3] in ("asd", "dmd"):
            assert result["training_steps"] == 4
        assert all(len(draws) == RESAMPLES for draws in result["draws"].values())
    assert (out / "results" / "real.json").stat().st_size < 20_000
    shown = capsys.readouterr().out
    assert shown.count("| yes | no |") == shown.count("| no | yes |") == 2
    assert "| ASD | FFE | 2 steps | 1 step | 4 steps |" in shown
    report = json.loads((out / "ablation.json").read_text())
    assert len(report["cells"]) == 2 * 2 * 5 and len(report["gains"]) == 2 * 5
    assert (out / "ablation.png").stat().st_size > 10_000
    assert run("--seeds", "0", "1", "--list") == 0
    assert "30 of 30 cells done; about 0 min left" in capsys.readouterr().out


@pytest.mark.long
def test_sittings_end_where_an_uninterrupted_run_does(
    run: Run, tmp_path: Path, slow_asd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sitting stops at the first chance; between two, all but the latest checkpoints may get lost."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("--seeds", "3", out=whole) == 0
    sittings = 0
    while len(list((parts / "results").glob("[ad]*.json"))) < 15:
        asked = [0]

        def late(self, asked: list[int] = asked) -> bool:
            asked[0] += 1
            return asked[0] > 9

        monkeypatch.setattr(ablation_run.Ablation, "late", late)
        assert run("--seeds", "3", out=parts) == 0
        sittings += 1
        assert sittings < 40
    assert sittings > 2
    assert results(parts) == results(whole)


@pytest.mark.slow
def test_results_alone_can_be_carried(run: Run, tmp_path: Path, slow_asd: None, capsys) -> None:
    assert run("--seeds", "0") == 0
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    for name in ("results", "settings.json", "timing.json"):
        source = out / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, other / name)
    capsys.readouterr()
    assert run("--seeds", "0", out=other) == 0
    assert not (other / "trainings").exists()
    assert (other / "ablation.md").read_text() == (out / "ablation.md").read_text()


def test_another_ablation_is_refused(run: Run, start: Path, tmp_path: Path, capsys) -> None:
    config = load_config(start / "toy.toml")
    Results(tmp_path / "out", {"clips": 3, "frames": config.clip_frames}).write_timing({})
    assert run() == 1
    told = capsys.readouterr().err
    assert "holds an ablation with other settings" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clips", "1"], "--clips must be"),
        (["--steps", "0"], "--steps must be"),
        (["--seeds", "1", "1"], "--seeds must be different"),
        (["--max-minutes", "0"], "--max-minutes must be > 0"),
        (["--teacher", "none"], "none: no such checkpoint"),
    ],
)
def test_bad_arguments_are_one_line(run: Run, flags: list[str], message: str, capsys) -> None:
    assert run(*flags) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_a_smaller_budget_is_another_ablation(start: Path, tmp_path: Path) -> None:
    given = ["--config", str(start / "toy.toml"), "--run", str(start), "--out", str(tmp_path)]
    parser = ablation.make_parser()
    opened = ablation.open_ablation(parser.parse_args([*given, "--steps", "2"]), 0.0)
    assert opened.config.distill.steps == 2
    opened.results.write_timing({})
    with pytest.raises(ConfigError, match=r"other settings: recipe .* steps 2 \(now 4\)"):
        ablation.open_ablation(parser.parse_args(given), 0.0)


def test_dmd_alone_rolls_out_once_a_step_and_trains_no_discriminator(start: Path) -> None:
    config = load_config(start / "toy.toml")
    from train.codec import VocabularyEncoder
    from train.handover import take_up
    from train.scoring import start_networks
    from train.tiny_data import TinyData

    found = [take_up(start / name, name, config) for name in ("teacher", "init")]
    for variant in ("asd", "dmd"):
        changed = variant_config(config, variant)
        data = TinyData(changed, found[0].codec, VocabularyEncoder(32))
        networks = start_networks(config.model, 0, *(one.weights for one in found))
        stage = distill.DistillStage(changed, 0, data, networks)
        rollouts = []
        inner = stage._rollout
        stage._rollout = lambda *a, inner=inner, seen=rollouts: seen.append(1) or inner(*a)
        figures = [stage.step(index) for index in range(1, 6)]
        below = sum(f["n"] < 4 for f in figures)
        assert below > 1
        assert len(rollouts) == 5 + (below if variant == "asd" else 0)
        trained = bool(stage.optimizers["discriminator"].state)
        assert trained == (variant == "asd")
        assert any("disc" in f for f in figures) == (variant == "asd")
        assert stage.result() is stage.ema.values  # no choice: a budget buys its last average


def test_intervals_know_of_seeds_and_of_prompts() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1, RESAMPLES)  # all seeds are judged on the same prompts
    one = _interval(50, (50 + shared)[None])
    same = _interval(50, np.repeat((50 + shared)[None], 3, axis=0))
    apart = _interval(50, np.stack([45 + shared, 50 + shared, 55 + shared]))
    assert one.high - one.low == pytest.approx(4, abs=0.8)
    assert same.high - same.low == pytest.approx(one.high - one.low, abs=0.6)
    assert apart.high - apart.low > 2 * (same.high - same.low)


def test_gains_are_paired_by_seed_and_prompt(tmp_path: Path) -> None:
    results = Results(tmp_path, {})
    rng = np.random.default_rng(0)
    both = phases([0, 1])
    plan = FixedPlan(1, 1)
    (tmp_path / "results").mkdir()
    for phase in both:
        draws = 60 + 10 * phase.seed + np.random.default_rng(phase.seed).normal(0, 5, RESAMPLES)
        draws = draws + (3 if phase.variant == "asd" else 0) + rng.normal(0, 0.1, RESAMPLES)
        value = {"total": [float(draws.mean()), 0, 0]}
        path = tmp_path / "results" / f"{Cell(phase, plan).name}.json"
        path.write_text(json.dumps({"figures": value, "draws": {"total": draws.tolist()}}))
    table = Table(results, both)
    gain = table.gain("steps", plan, "total")
    assert gain is not None and gain.value == pytest.approx(3, abs=0.1)
    assert gain.high - gain.low < 1
    score = table.score("asd", "time", plan, "total")
    assert score is not None and score.high - score.low > 10
    assert table.gain("steps", FixedPlan(2, 2), "total") is None


def test_cells_are_the_papers() -> None:
    assert [(p.steps, p.first_steps) for p in PLANS] == [(2, 2), (2, 4), (1, 1), (1, 4), (4, 4)]
    assert len({c.name for p in phases([0, 1, 2]) for c in cells(p)}) == 45
    assert Phase("dmd", "steps", 1).training == Phase("dmd", "time", 1).training


@pytest.mark.slow
def test_a_training_past_its_budget_is_not_taken_for_it(
    run: Run, tmp_path: Path, slow_asd: None, capsys
) -> None:
    assert run("--seeds", "0") == 0
    out = tmp_path / "out"
    shutil.rmtree(out / "students" / "dmd-steps-seed0")
    for path in (out / "results").glob("dmd-steps*"):
        path.unlink()
    capsys.readouterr()
    assert run("--seeds", "0") == 1
    assert "is at step 7, and what it was after 4" in capsys.readouterr().err


def test_damaged_results_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "timing.json").write_text("[")
    with pytest.raises(ConfigError, match="delete it to make it again"):
        Results(tmp_path, {}).timing()
