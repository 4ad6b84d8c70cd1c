"""The tiny world's judge: trained once, kept, and asked about an engine and torch alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from asd_rt.backends.base import open_backend
from asd_rt.engines import PACKAGED_DIR
from export.build import default_checkpoint
from export.reference import TorchEngine
from export.semantics import CLIP, FRAMES, Marks, compare, show
from train.checkpoint import Checkpoint, load_checkpoint
from train.classifier import Classifier, ClassifierStage
from train.codec import is_tiny_world
from train.config import load_config
from train.judge import Judge, load_judge
from train.tiny_world import TinyWorld, random_labels

CLIPS = FRAMES // CLIP


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return load_checkpoint(default_checkpoint())


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """A judge of few steps: it answers, though not well."""
    config = load_config(Path(next(iter(train.__path__))) / "configs" / "tiny.toml").smoke()
    before = torch.random.get_rng_state()
    made = load_judge(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifierStage, "step", None)  # it is not trained again
        again = load_judge(config)
        yield made
    for name, value in made.classifier.state_dict().items():
        assert torch.equal(value, again.classifier.state_dict()[name])


def test_only_the_tiny_world_has_a_judge(tiny: Checkpoint, student: Path) -> None:
    assert is_tiny_world(tiny)
    assert not is_tiny_world(load_checkpoint(student))


def test_an_engine_and_torch_are_judged_alike(tiny: Checkpoint, judge: Judge) -> None:
    engine = open_backend(PACKAGED_DIR / "asd_fp32.onnx", 1)
    found = show(engine, tiny, judge, 2, "engine")
    expected = show(TorchEngine(tiny, engine.manifest), tiny, judge, 2, "torch")
    engine.close()
    assert found.right.shape == (2, CLIPS, 3)
    np.testing.assert_array_equal(found.right, expected.right)
    told = compare(found, expected)
    assert told["difference_points"] == 0 and told["interval_points"] == [0, 0]
    assert (told["prompts"], told["frames"]) == (2, FRAMES)


def test_differences_are_in_points_over_the_same_prompts() -> None:
    right = np.ones((50, CLIPS, 3), np.bool_)
    spoiled = right.copy()
    spoiled[:10, 0, 0] = False  # one answer of twelve in every fifth video
    told = compare(Marks(spoiled), Marks(right))
    assert told["difference_points"] == pytest.approx(-100 / 60, abs=0.01)
    low, high = told["interval_points"]
    assert low < told["difference_points"] < high <= 0
    assert told["torch"]["score"] == 1 and told["engine"]["digit"] == 0.95
    assert told["engine"]["all_right_first_frames"] == 0.8
    assert told["engine"]["all_right_last_frames"] == 1


def test_a_digit_that_turned_round_is_right_later_on(tiny: Checkpoint) -> None:
    from export.semantics import _mark

    labels = random_labels(3, torch.Generator().manual_seed(0))
    frames = TinyWorld("test").draw(3, CLIP, torch.Generator().manual_seed(1), labels).frames

    class Opposite(Classifier):
        """Says what was asked for, but the other way round."""

        def forward(self, frames):
            turned = labels.clone()
            turned[:, 2] = opposite(labels[:, 2])
            heads = (self.digit, self.colour, self.direction)
            return tuple(
                torch.nn.functional.one_hot(turned[:, i], head.out_features).float()
                for i, head in enumerate(heads)
            )

    marks = _mark(Judge(Opposite(), tiny.codec), frames.repeat(1, CLIPS, 1, 1, 1), labels)
    assert marks[:, :, :2].all()
    assert not marks[:, 0, 2].any() and marks[:, 1:, 2].all()


def opposite(directions: torch.Tensor) -> torch.Tensor:
    """The directions that lead back."""
    from train.tiny_world import DIRECTIONS

    axes = torch.tensor(list(DIRECTIONS.values()))
    back = (axes[None] == -axes[directions][:, None]).all(dim=2)
    return back.int().argmax(dim=1)
