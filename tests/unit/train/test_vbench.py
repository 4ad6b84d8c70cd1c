"""Clips for VBench: names, what is kept of its description, going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from asd_rt.embeddings import write_embeddings
from asd_rt.engines import PACKAGED_DIR
from train.vbench import METADATA, main

ENGINE = str(PACKAGED_DIR / "asd_fp32.onnx")
RED, BLUE = "a red three moving right", "a blue seven moving up"
FLAGS = ["--engine", ENGINE, "--clips", "2", "--frames", "4", "--scale", "2"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in (*FLAGS, *arguments)])


def shape(video: Path) -> tuple[int, int, int]:
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return (len(frames), *frames[0].shape[:2])


def test_clips_and_their_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(f"{RED}\n\n{BLUE}\n{RED}\n")
    assert run("--prompts", prompts, "--out", out) == 0
    assert json.loads(capsys.readouterr().out) == {"made": 4, "clips": 4, "out": str(out)}
    names = {f"{prompt}-{i}.mp4" for prompt in (RED, BLUE) for i in range(2)}
    assert {path.name for path in out.iterdir()} == names | {METADATA}
    assert shape(out / f"{RED}-0.mp4") == (4, 64, 64)
    listed = json.loads((out / METADATA).read_text())
    assert listed["videos"].keys() == names
    assert listed["videos"][f"{BLUE}-1.mp4"] == {"prompt": BLUE, "index": 1, "seed": 1}
    assert (out / f"{RED}-0.mp4").read_bytes() != (out / f"{RED}-1.mp4").read_bytes()

    kept = (out / f"{RED}-0.mp4").stat().st_mtime_ns
    (out / f"{BLUE}-0.mp4").unlink()
    assert run("--prompts", prompts, "--out", out) == 0
    assert json.loads(capsys.readouterr().out)["made"] == 1
    assert (out / f"{RED}-0.mp4").stat().st_mtime_ns == kept
    assert run("--prompts", prompts, "--out", out, "--steps", "2") == 1
    assert "were made with steps 1, asked for is 2" in capsys.readouterr().err


def test_dimensions_of_its_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = tmp_path / "VBench_full_info.json"
    entries = [
        {"prompt_en": RED, "dimension": ["color"]},
        {"prompt_en": BLUE, "dimension": ["object_class", "scene"]},
    ]
    described.write_text(json.dumps(entries))
    arguments = ("--prompts", described, "--clips", "1", "--out", tmp_path / "out")
    assert run(*arguments, "--dimension", "scene") == 0
    assert {path.name for path in (tmp_path / "out").glob("*.mp4")} == {f"{BLUE}-0.mp4"}
    assert run(*arguments, "--dimension", "taste") == 1
    assert "--dimension taste" in capsys.readouterr().err


def decoded(file: Path) -> np.ndarray:
    with av.open(str(file)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    return np.stack(frames).astype(float)


def test_prompts_that_are_encoded_already(tmp_path: Path) -> None:
    import asd_rt

    with asd_rt.open(ENGINE) as session:
        contexts = [session.context(prompt) for prompt in (RED, BLUE)]
    embeds = tmp_path / "prompts.safetensors"
    write_embeddings(embeds, contexts, [RED, BLUE])
    assert run("--prompt-embeds", embeds, "--clips", "1", "--out", tmp_path / "a") == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{RED}\n{BLUE}\n")
    assert run("--prompts", prompts, "--clips", "1", "--out", tmp_path / "b") == 0
    for prompt in (RED, BLUE):
        a, b = (decoded(tmp_path / folder / f"{prompt}-0.mp4") for folder in "ab")
        assert np.abs(a - b).mean() < 2, "x264 does not give all processors the same bytes twice"
    red, blue = (decoded(tmp_path / "a" / f"{prompt}-0.mp4") for prompt in (RED, BLUE))
    assert np.abs(red - blue).mean() > 4


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.txt", "\n", "holds no prompt"),
        ("p.txt", "a cat / a dog\n", "is no file name"),
        ("p.txt", "a very " * 60, "is no file name"),
        ("p.json", "[1]", "is not VBench's description"),
        ("p.json", "{", "is not VBench's description"),
    ],
)
def test_bad_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, told: str
) -> None:
    prompts: Any = tmp_path / name
    prompts.write_text(content)
    assert run("--prompts", prompts, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
