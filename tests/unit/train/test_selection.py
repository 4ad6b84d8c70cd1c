"""The held-out choice: its rule, its state, and that training does not notice it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.train.toy import toy_start, toy_toml
from train.config import load_config
from train.distill import DistillStage
from train.judge import load_judge
from train.pipeline import World, _make_stage
from train.selection import Selection, held_out_share


def choose(values: list[float], clips: int = 100) -> list[int]:
    """The chosen step after each of these held-out values."""
    selection = Selection(1, clips, lambda weights: float(weights["value"]))
    found = []
    for step, value in enumerate(values, 1):
        selection.look(step, {"value": torch.tensor(value)})
        found.append(selection.chosen_step)
        assert selection.chosen["value"] == values[selection.chosen_step - 1]
    return found


def test_the_latest_average_that_is_no_worse_is_kept() -> None:
    # One standard error of .9 over 100 clips is .03.
    assert choose([0.5, 0.9, 0.88, 0.86, 0.88]) == [1, 2, 3, 3, 5]
    assert choose([0.9, 0.1, 0.2]) == [1, 1, 1]  # a run that collapses
    assert choose([0.0, 0.0]) == [1, 2]


def test_looks_are_regular_and_at_the_end() -> None:
    selection = Selection(50, 10, lambda weights: 1.0)
    assert [done for done in range(1, 121) if selection.due(done, 120)] == [50, 100, 120]


def test_chosen_weights_do_not_follow_the_average() -> None:
    weights = {"value": torch.tensor(1.0)}
    selection = Selection(1, 10, lambda weights: 1.0)
    selection.look(1, weights)
    weights["value"].add_(1)
    assert selection.chosen["value"] == 1


def stage(folder: Path, selecting: bool) -> DistillStage:
    config = load_config(folder / "toy.toml")
    given = {name: folder / name for name in ("teacher", "init")}
    made = _make_stage("distill", World(config, folder, 0, given))
    assert isinstance(made, DistillStage)
    if not selecting:
        made.selection = None
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_start(tmp_path, toy_toml(tmp_path))
    return tmp_path


def test_training_does_not_notice_it(folder: Path) -> None:
    plain, selecting = stage(folder, False), stage(folder, True)
    for index in range(4):
        torch.manual_seed(index)
        expected = plain.step(index)
        state = torch.random.get_rng_state()
        torch.manual_seed(index)
        found = selecting.step(index)
        assert torch.equal(torch.random.get_rng_state(), state)
        looked = {name: found.pop(name) for name in ("held_out", "chosen_step") if name in found}
        assert found == expected
        assert bool(looked) == (index in (1, 3))
    for name, value in plain.ema.values.items():
        assert torch.equal(value, selecting.ema.values[name])
    assert plain.result() is plain.ema.values


def test_a_resumed_choice_goes_on_bit_for_bit(folder: Path) -> None:
    whole = stage(folder, True)
    figures = [whole.step(i) for i in range(4)]
    first, second = stage(folder, True), stage(folder, True)
    for i in range(2):
        first.step(i)
    second.load(first.state())
    assert [second.step(i) for i in range(2, 4)] == figures[2:]
    assert whole.selection is not None and second.selection is not None
    assert second.selection.state().keys() == whole.selection.state().keys()
    for name, value in whole.result().items():
        assert torch.equal(second.result()[name], value)


def test_the_metric_asks_the_same_at_every_look() -> None:
    """With a judge who has hardly learned anything: what counts is what it is asked and of what."""
    from train.judge import shipped_recipe
    from train.samplers import open_subject
    from train.x0_similarity import SHIPPED

    config = shipped_recipe().smoke()
    student = open_subject(SHIPPED)
    judge = load_judge(config)
    seen = []
    hits = judge.hits

    class Watched:
        def hits(self, frames, labels):
            seen.append(frames)
            return hits(frames, labels)

    evaluate = held_out_share(
        Watched(), student.model.config, student.cache, student.schedule, student.codec,
        student.text, 3, 6,
    )  # fmt: skip
    weights = dict(student.model.state_dict())
    value = evaluate(weights)
    assert 0 <= value <= 1 and value == evaluate(weights)
    assert len(seen) == 8 and all(frames.shape == (3, 6, 3, 32, 32) for frames in seen)
    assert not torch.equal(seen[0], seen[1])  # plans differ
    assert torch.equal(seen[0], seen[4])  # noise does not
