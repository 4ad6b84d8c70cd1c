"""Train, export, run: the whole chain on a student that has learnt nothing, which its numbers do not mind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

PROMPT = "a red three moving up and left"


def frame_count(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_run_makes_a_video_with_first_frame_enhancement(
    asd_rt: Callable[..., Any], engine: Path, out: Path
) -> None:
    video = out / "a.mp4"
    words = ("--engine", engine, "--prompt", PROMPT, "--frames", "21", "--out", video, "--json")
    made = asd_rt("run", *words, "--steps", "1", "--first-steps", "4")
    assert made.code == 0, made.stderr
    report = made.document
    assert report["steps"] == [4, 1, 1, 1, 1, 1, 1]
    assert report["frames"] == 21 == frame_count(video)
    assert os.listdir(out) == ["a.mp4"]
    assert report["time_to_first_frame_ms"] > 0
    assert report["fps_without_decode"] >= report["fps_with_decode"] > 0


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_one_engine_serves_every_step_count(
    asd_rt: Callable[..., Any], engine: Path, out: Path, steps: int
) -> None:
    words = (
        "--engine",
        engine,
        "--prompt",
        PROMPT,
        "--frames",
        "7",
        "--out",
        out / "a.gif",
        "--json",
    )
    made = asd_rt("run", *words, "--steps", str(steps), "--first-steps", str(steps))
    assert made.code == 0, made.stderr
    assert made.document["steps"] == [steps] * 3
    assert frame_count(out / "a.gif") == 7


def test_same_seed_same_video(asd_rt: Callable[..., Any], engine: Path) -> None:
    def video(seed: int) -> bytes:
        words = ("--engine", engine, "--prompt", PROMPT, "--frames", "18", "--out", "-")
        made = asd_rt("run", *words, "--seed", str(seed))
        assert made.code == 0, made.stderr
        stream: bytes = made.stdout
        return stream

    first = video(7)
    assert first.startswith(b"YUV4MPEG2 ")
    assert first.count(b"FRAME\n") == 18
    assert first == video(7)
    assert first != video(8)


def test_plays_past_the_window(asd_rt: Callable[..., Any], engine: Path, out: Path) -> None:
    manifest = json.loads(Path(f"{engine}.json").read_text())
    window = manifest["cache"]["window_frames"]
    assert 0 < window < 30
    words = ("--engine", engine, "--prompt", PROMPT, "--frames", "30", "--out", out / "frames")
    made = asd_rt("run", *words)
    assert made.code == 0, made.stderr
    assert len(os.listdir(out / "frames")) == 30


def test_replay_gives_the_noise_of_the_seed_whatever_the_plan(
    asd_rt: Callable[..., Any], engine: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    manifest = json.loads(Path(f"{engine}.json").read_text())
    model, size = manifest["model"], manifest["latent_hw"]
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((1, 6, model["in_dim"], *size)).astype(np.float32)
    context = generator.standard_normal((1, 4, model["text_dim"])).astype(np.float32)
    save_file({"noise": noise, "context": context}, tmp_path / "inputs.safetensors")
    latents = []
    for plan in ("4,1", "4,1", "4,2"):
        made = asd_rt(
            *("replay", "--engine", engine, "--inputs", tmp_path / "inputs.safetensors"),
            *("--out", tmp_path / "result.safetensors", "--steps-per-block", plan, "--seed", "3"),
        )
        assert made.code == 0, made.stderr
        latents.append(load_file(tmp_path / "result.safetensors")["latents"])
    assert latents[0].shape == noise.shape
    np.testing.assert_array_equal(latents[0], latents[1])
    np.testing.assert_array_equal(latents[0][:, :3], latents[2][:, :3])
    assert not np.array_equal(latents[0][:, 3:], latents[2][:, 3:])


def test_inspect_and_doctor_and_bench(asd_rt: Callable[..., Any], engine: Path) -> None:
    seen = asd_rt("inspect", engine, "--json")
    assert seen.code == 0, seen.stderr
    assert "denoiser" in json.dumps(seen.document)
    doctor = asd_rt("doctor", "--json", cwd=engine.parent.parent)
    assert doctor.code == 0, doctor.stdout
    bench = asd_rt("bench", "--engine", engine)
    assert bench.code == 0, bench.stderr
    assert "p99" in bench.stdout.decode()


def test_latency_and_contact_sheet(module: Callable[..., Any], engine: Path, out: Path) -> None:
    words = ("--engine", engine, "--out", out, "--blocks", "4", "--repeats", "2", "--warmup", "1")
    made = module("benchmarks.latency", *words)
    assert made.code == 0, made.stderr
    assert sorted(os.listdir(out)) == ["latency.json", "latency.md", "latency.png"]
    report = json.loads((out / "latency.json").read_text())
    assert report["summary"]["steps_per_block"] == [4, 1, 1, 1]
    assert report["summary"]["runs"] == 2
    sheet = module(
        *("benchmarks.contact_sheet", "--engine", engine, "--out", out / "sheet.png"),
        *("--frames", "6", "--columns", "3", "--prompt", PROMPT),
    )
    assert sheet.code == 0, sheet.stderr
    assert (out / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words",
    [(), ("run",), ("encode",), ("bench",), ("replay",), ("inspect",), ("doctor",)],
    ids=lambda w: "-".join(w),
)
def test_help_shows_examples(asd_rt: Callable[..., Any], words: tuple[str, ...]) -> None:
    shown = asd_rt(*words, "--help")
    assert shown.code == 0
    assert b"asd-rt " in shown.stdout.partition(b"options:")[2]


def test_build_of_the_same_student_again_needs_force(
    module: Callable[..., Any], engine: Path, student: Path
) -> None:
    before = Path(f"{engine}.json").read_bytes()
    words = ("--checkpoint", student, "--steps", "1", "--target", "onnx", "--out", engine.parent)
    again = module("export.build", *words)
    assert "Traceback" not in again.stderr
    if again.code == 0:  # it may find the engine up to date; it may not leave another one
        assert Path(f"{engine}.json").read_bytes() == before
