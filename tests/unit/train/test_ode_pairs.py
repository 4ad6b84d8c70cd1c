"""ODE pairs: the teacher's own sampling, resumable, and a causal start that learns from them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_rt.errors import ConfigError
from tests.unit.train.real_toy import (
    FRAMES,
    LATENT_HW,
    PROMPTS,
    write_config,
    write_inputs,
)
from train.__main__ import main as train
from train.checkpoint import load_checkpoint
from train.losses import shifted_sigma
from train.ode_pairs import main
from train.pair_shards import PairShards
from train.parallel import Parallel
from train.prompt_table import PromptTable


def run(folder: Path, *more: object) -> int:
    flags = {
        "--teacher": folder / "teacher",
        "--prompts": folder / "prompts.safetensors",
        "--negative": folder / "negative.safetensors",
        "--out": folder / "pairs",
        "--frames": FRAMES,
        "--latent-size": "{}x{}".format(*LATENT_HW),
        "--steps": 8,
        "--guidance": 3,
        "--dtype": "fp32",
        "--shard-pairs": 4,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return main([*words, *(str(word) for word in more)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


def test_a_pair_is_the_teachers_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["made"] == done["pairs"] == len(PROMPTS)
    assert done["files_left"] == 0
    pairs = PairShards(folder / "pairs")
    path, end = pairs.read([5])
    assert path.shape == (1, 4, FRAMES, 4, *LATENT_HW)
    checkpoint = load_checkpoint(folder / "teacher")
    parallel = Parallel()  # in what pairs are made here
    model = checkpoint.build_model().to(torch.bfloat16 if parallel.bf16 else torch.float32)
    table = PromptTable(folder / "prompts.safetensors", checkpoint.config, "x")
    negative = PromptTable(folder / "negative.safetensors", checkpoint.config, "x")
    contexts = torch.cat([table.contexts([5]), negative.contexts([0])])
    # From the second state on, two more Euler steps lead to the third, and so on to the end.
    sigmas = shifted_sigma(torch.linspace(1, 0, 9), 5.0)
    for state in range(4):
        assert sigmas[2 * state].item() == pytest.approx(pairs.settings.sigmas[state])
        x = path[:, state]
        for now, after in pairwise(sigmas[2 * state : 2 * state + 3]):
            with torch.no_grad(), parallel.autocast():
                times = torch.full((2, FRAMES), 1000 * now.item())
                flow = model(x.expand(2, -1, -1, -1, -1), times, contexts).float()
            cond, other = flow.chunk(2)
            x = x + (after - now) * (other + 3 * (cond - other))
        expected = path[:, state + 1] if state < 3 else end
        torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


def test_embeddings_are_read_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of them is larger than memory; so is a large teacher in float32."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    contexts = PromptTable.contexts

    def counted(table: PromptTable, rows: Sequence[int]) -> torch.Tensor:
        nonlocal most
        found = contexts(table, rows)
        alive.add(found)
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(PromptTable, "contexts", counted)
    assert run(folder) == 0
    assert (
        most <= 3
    )  # the negative prompt's, a prompt's, and the one before it until it is replaced


def test_it_goes_on_and_parts_fill_one_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    whole = {p.name: p.read_bytes() for p in (folder / "pairs").glob("*.safetensors")}
    assert len(whole) == 2
    (folder / "pairs" / "pairs-00001.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"pairs-00001\.safetensors: missing"):
        PairShards(folder / "pairs")
    capsys.readouterr()
    assert run(folder, "--part", "1/2") == 0
    assert json.loads(capsys.readouterr().out)["made"] == 0
    assert run(folder, "--part", "2/2") == 0
    assert json.loads(capsys.readouterr().out)["made"] == 2
    assert {p.name: p.read_bytes() for p in (folder / "pairs").glob("*.safetensors")} == whole
    assert run(folder, "--seed", 1) == 1
    assert "made with other seed 0, asked for is 1" in capsys.readouterr().err


def test_a_causal_start_learns_from_pairs(folder: Path) -> None:
    assert run(folder) == 0
    init: dict[str, Any] = {"steps": 40, "adam_lr": 3e-3, "muon_lr": 0.0}
    data = {"ode_pairs": str(folder / "pairs"), "clips": ""}
    config = write_config(
        folder, leave_out=("teacher",), data=data, init=init, parallel={"save_minutes": 10.0}
    )
    flags = ["--config", str(config), "--out", str(folder / "out"), "--threads", "1"]
    assert train([*flags, "--stages", "init"]) == 0
    lines = (folder / "out" / "curve.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--steps", 6), "--steps must be a multiple of 4"),
        (("--part", "3/2"), "--part must be such as 3/8"),
        (("--latent-size", "4x3"), "--latent-size must be two even numbers"),
        (("--guidance", "nan"), "--guidance must be a number > 0"),
        (("--teacher", "/nowhere"), "/nowhere: no such folder or file"),
        (("--prompts", "/nowhere"), "--prompts /nowhere: no such file"),
    ],
)
def test_bad_flags_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[Any, ...], told: str
) -> None:
    assert run(folder, *flags) == 1
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_pairs_of_another_schedule_or_size_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--timestep-shift", 3) == 0
    data = {"ode_pairs": str(folder / "pairs")}
    config = write_config(folder, leave_out=("teacher",), data=data)
    assert train(["--config", str(config), "--out", str(folder / "out")]) == 1
    assert "made with --timestep-shift 3, timestep_shift is 5" in capsys.readouterr().err
    config = write_config(folder, leave_out=("teacher",), data=data, init={"frames": 3})
    assert train(["--config", str(config), "--out", str(folder / "out")]) == 1
    assert "expected [3, 4, 4, 4]" in capsys.readouterr().err
