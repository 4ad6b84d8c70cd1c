"""`python -m train.checkpoint`: what it writes, and one line for what it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from train.checkpoint import load_checkpoint
from train.checkpoint_command import main
from train.formats import write as write_module
from train.formats.random_weights import CONFIGS


def random(out: Path, form: str, *words: str) -> int:
    common = ["random", "--config", "small", "--format", form, "--out", str(out)]
    return main([*common, *words])


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_shallow_network_begins_as_the_whole_one_does(tmp_path: Path) -> None:
    assert random(tmp_path / "whole", "official", "--dtype", "fp32") == 0
    assert random(tmp_path / "one", "official", "--dtype", "fp32", "--layers", "1") == 0
    whole, one = (load_checkpoint(tmp_path / name) for name in ("whole", "one"))
    assert (whole.config.num_layers, one.config.num_layers) == (2, 1)
    assert all(torch.equal(whole.weights[name], value) for name, value in one.weights.items())


@pytest.mark.parametrize("form", ["official", "diffusers", "self-forcing"])
def test_random_depends_on_the_seed_alone(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert random(tmp_path / "a.pt", form, "--dtype", "fp32") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["checkpoint"] == str(tmp_path / "a.pt")
    assert random(tmp_path / "b", "official", "--dtype", "fp32", "--shard-size", "3MB") == 0
    assert random(tmp_path / "c", "official", "--seed", "1") == 0
    a, b, c = (load_checkpoint(tmp_path / name) for name in ("a.pt", "b", "c"))
    assert a.config == b.config == CONFIGS["small"]
    assert all(torch.equal(a.weights[name], weight) for name, weight in b.weights.items())
    assert not any(torch.equal(a.weights[n], w.float()) for n, w in c.weights.items())
    assert {w.dtype for w in c.weights.values()} == {torch.bfloat16}
    assert listing(tmp_path) == ["a.pt", "b", "c"]


def test_shards_stay_below_their_size(tmp_path: Path) -> None:
    assert random(tmp_path / "a", "diffusers", "--shard-size", "1MB") == 0
    files = list((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        assert file.stat().st_size < 1_010_000 or len(names) == 1


def test_conversion_keeps_every_bit_and_part(tmp_path: Path, root: Path) -> None:
    student = root / "train" / "tiny_student"
    for source, form, name in ((student, "diffusers", "a"), (tmp_path / "a", "official", "b")):
        assert main(["convert", str(source), "--format", form, "--out", str(tmp_path / name)]) == 0
    first, last = load_checkpoint(student), load_checkpoint(tmp_path / "b")
    assert (last.config, last.deployment) == (first.config, first.deployment)
    assert all(torch.equal(last.weights[name], w) for name, w in first.weights.items())
    assert all(last.weights[name].dtype == w.dtype for name, w in first.weights.items())
    assert first.codec is not None and last.codec is not None
    assert torch.equal(first.codec.decoder, last.codec.decoder)
    assert first.table is not None and last.table is not None
    assert torch.equal(first.table, last.table)


def test_conversion_to_a_file(tmp_path: Path) -> None:
    assert random(tmp_path / "a", "diffusers", "--dtype", "fp32") == 0
    words = ["convert", str(tmp_path / "a"), "--format", "self-forcing", "--dtype", "fp16"]
    assert main([*words, "--out", str(tmp_path / "b.pt")]) == 0
    saved = torch.load(tmp_path / "b.pt", weights_only=True)["generator_ema"]
    weights = load_checkpoint(tmp_path / "a").weights
    assert saved.keys() == {f"model.{name}" for name in weights}
    assert all(torch.equal(saved[f"model.{n}"], w.half()) for n, w in weights.items())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--format", "official", "--out", "there"], "exists"),
        (["--format", "official", "--out", "no/where"], "mkdir -p"),
        (["--format", "self-forcing", "--out", "file"], "file.pt"),
    ],
)
def test_places_that_will_not_do(
    tmp_path: Path,
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert main(["random", "--config", "small", *words]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert listing(tmp_path) == ["there"]


def test_a_file_that_could_not_be_read_again_is_refused(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "a.pt")
    words = ["convert", str(root / "train" / "tiny_student"), "--format", "self-forcing"]
    assert main([*words, "--out", out]) == 1
    assert "cannot say head_dim 40" in capsys.readouterr().err
    assert listing(tmp_path) == []


@pytest.mark.parametrize("form", ["official", "self-forcing"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_module.write_safetensors

    def full(*args: Any) -> None:
        whole(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_module, "write_safetensors", full)
    assert random(tmp_path / "a.pt", form) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert listing(tmp_path) == []


def test_overflow_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert random(tmp_path / "a.pt", "self-forcing", "--dtype", "fp32") == 0
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    saved["generator_ema"]["model.head.head.bias"][0] = 1e6
    torch.save(saved, tmp_path / "a.pt")
    words = ["convert", str(tmp_path / "a.pt"), "--format", "official", "--dtype", "fp16"]
    assert main([*words, "--out", str(tmp_path / "b")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "head.head.bias" in error
    assert "--dtype bf16" in error
    assert listing(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("words", [["--help"], ["random", "--help"], ["convert", "--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "usage: python -m train.checkpoint" in capsys.readouterr().out


def test_as_a_module(root: Path, tmp_path: Path) -> None:
    words = ["random", "--config", "small", "--format", "official", "--shard-size", "big"]
    done = subprocess.run(
        [sys.executable, "-m", "train.checkpoint", *words, "--out", str(tmp_path / "a")],
        cwd=root,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "2GB" in done.stderr
