"""`asd-rt run` steered: later prompts, a start from a file, refreshes, videos without an end."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import asd_rt
from asd_rt import cli
from asd_rt.commands.recording import Recording
from asd_rt.video import open_writer

RED, BLUE = "a red three moving right", "a blue 4 going up"
TINY = Path(asd_rt.__file__).parent / "engine" / "asd_fp32.onnx"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `asd-rt run` in an empty folder; returns (exit code, report or None, lines of stderr)."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments: object, engine: Path = TINY):
        code = cli.main(["run", "--engine", str(engine), "--json", *map(str, arguments)])
        captured = capsys.readouterr()
        report = json.loads(captured.out) if captured.out else None
        return code, report, captured.err.splitlines()

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


def frames_of(path: str) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_later_prompts_begin_with_a_block(run) -> None:
    asked = ("--prompt", RED, "--frames", 12, "--out", "x.gif", "--steps", 1, "--first-steps", 1)
    later = ("--prompt-at", f"9:{RED}", "--prompt-at", f"4:{BLUE}", "--recache")
    code, report, err = run(*asked, *later)
    assert (code, err) == (0, [])
    told = [(s["asked_frame"], s["frame"], s["block"], s["prompt"]) for s in report["switches"]]
    assert told == [(4, 6, 2, BLUE), (9, 9, 3, RED)]
    assert all(s["recache"] and s["switch_ms"] > 0 for s in report["switches"])
    assert [b["switch_ms"] is not None for b in report["blocks"]] == [False, False, True, True]
    steered = frames_of("x.gif")
    code, report, _ = run(*asked)
    assert report["switches"] == []
    plain = frames_of("x.gif")
    np.testing.assert_array_equal(steered[:6], plain[:6])
    assert np.abs(steered[6:9].astype(int) - plain[6:9]).mean() > 2


def test_of_two_prompts_before_a_block_the_last_counts(run) -> None:
    later = ("--prompt-at", f"1:{RED}", "--prompt-at", f"2:{BLUE}")
    code, report, _ = run("--prompt", RED, "--frames", 6, *later)
    assert code == 0
    assert [(s["asked_frame"], s["frame"]) for s in report["switches"]] == [(2, 3)]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--prompt-at", "x"), 2, "--prompt-at must be a frame"),
        (("--prompt-at=-3:blue",), 2, "--prompt-at must be a frame"),
        (("--prompt-at", "0:blue"), 2, "--prompt-at must be a frame"),
        (("--prompt-at", "3:  "), 2, "--prompt-at must be a frame"),
        (("--prompt-at", "1.5:blue"), 2, "--prompt-at must be a frame"),
        (("--prompt-at", "3:blue", "--prompt-at", "03:red"), 2, "--prompt-at 3: is given twice"),
        (("--prompt-at", "3:a cow"), 1, "--prompt-at 3: prompt 'a cow': unknown word cow"),
        (("--prompt-at", "10:blue"), 1, "the last one begins at frame 9"),
        (("--recache",), 2, "--recache goes with --prompt-at"),
        (("--show-start",), 2, "--show-start goes with"),
        (("--refresh-every", "0"), 2, "--refresh-every must be"),
        (("--image", "none.png"), 1, "none.png: cannot be read (No such file"),
        (("--video", "none.mp4"), 1, "none.mp4: cannot be read (No such file"),
        (("--frames", "-1"), 2, "--frames must be"),
    ],
)
def test_bad_flags_are_one_line(run, tmp_path, flags, code, message) -> None:
    found, report, err = run("--prompt", RED, "--frames", 12, *flags)
    assert (found, report) == (code, None)
    (line,) = err
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_engines_that_cannot(run, toy, own_toy, tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    code, _, err = run("--prompt", "red", "--image", "x.png", engine=toy.path)
    assert code == 1 and len(err) == 1 and "has no encoder part" in err[0]
    for flags, message in (
        (("--frames", "0"), "no video can be endless"),
        (("--refresh-every", "2"), "refresh-every: this engine's cache has no window"),
    ):
        code, _, err = run("--prompt", "red", *flags, engine=own_toy.path)
        assert code == 1 and len(err) == 1 and message in err[0]


def test_a_picture_to_start_from(run, tmp_path) -> None:
    Image.new("RGB", (40, 30), (200, 40, 40)).save(tmp_path / "x.png")
    asked = ("--prompt", RED, "--image", "x.png", "--frames", 5, "--scale", 1)
    code, report, err = run(*asked, "--out", "without.gif")
    assert code == 0 and len(err) == 1 and "40x30 cropped to its middle 30x30" in err[0]
    assert report["start"] == {"file": "x.png", "frames": 3, "shown": False}
    assert (report["frames"], report["latent_frames"]) == (5, 5)
    assert [(b["index"], b["frames"]) for b in report["blocks"]] == [(1, 3), (2, 2)]
    code, report, _ = run(*asked, "--out", "with.gif", "--show-start", "--prompt-at", "6:blue")
    assert code == 0 and report["start"]["shown"]
    assert [(s["frame"], s["block"]) for s in report["switches"]] == [(6, 2)]
    shown, hidden = frames_of("with.gif"), frames_of("without.gif")
    assert (len(shown), len(hidden)) == (8, 5)
    assert np.abs(shown[0].astype(int) - (200, 40, 40)).mean() < 12
    np.testing.assert_array_equal(shown[3:6], hidden[:3])
    code, _, err = run(*asked, "--show-start", "--prompt-at", "7:blue")
    assert code == 1 and "the last one begins at frame 6" in err[-1]


def test_a_clip_to_go_on_from(run, tmp_path) -> None:
    code, *_ = run("--prompt", RED, "--frames", 12, "--out", "x.gif", "--scale", 1)
    code, report, err = run("--prompt", RED, "--frames", 3, "--video", "x.gif", "--out", "y.gif")
    assert code == 0 and len(err) == 1 and "from its last 9 of " in err[0]
    assert report["start"]["frames"] == 9
    assert [b["index"] for b in report["blocks"]] == [3]


def test_refreshes_are_reported(run) -> None:
    code, report, _ = run("--prompt", RED, "--frames", 15, "--refresh-every", 2)
    assert code == 0
    assert report["refresh_every_blocks"] == 2
    expected = [False, False, True, False, True]
    assert [b["switch_ms"] is not None for b in report["blocks"]] == expected


def test_an_endless_video_ends_whole_at_ctrl_c(tmp_path) -> None:
    command = [sys.executable, "-m", "asd_rt", "run", "--engine", TINY, "--prompt", RED, "--json"]
    process = subprocess.Popen(
        [*command, "--frames", "0", "--out", tmp_path / "png"],
        cwd=Path(asd_rt.__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"ASD_RT_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    end = time.monotonic() + 60
    # In a folder of another name until the video is whole.
    while len(list(tmp_path.rglob("frame_*.png"))) < 60:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert report["latent_frames"] is None
    assert report["frames"] == len(list((tmp_path / "png").glob("*.png"))) >= 60
    assert len(report["steps"]) == len(report["blocks"])


def test_an_endless_report_is_bounded(toy, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("asd_rt.commands.recording.MAX_RECORDS", 3)
    with asd_rt.open(toy.path, threads=1) as session:
        video = Recording(session, str(tmp_path / "png"), 20, 1)
        video.run("red")
    report = video.report()
    assert [b["index"] for b in report["blocks"]] == [0, 7, 8, 9]
    assert (report["blocks_left_out"], report["frames"]) == (6, 20)
    assert report["summary"]["first_block_ms"]["count"] == 1


def test_writers_see_what_an_end_to_end_start_shows(tmp_path, run) -> None:
    """A given clip of the engine's own size comes out as it went in, but for the codec's losses."""
    pixels = np.zeros((3, 32, 32, 3), np.uint8)
    pixels[..., 2] = 28
    pixels[:, 8:20, 8:20] = (255, 66, 61)
    with open_writer("in.gif", 16) as writer:
        writer.write(pixels)
    asked = ("--prompt", RED, "--video", "in.gif", "--show-start", "--frames", 3, "--scale", 1)
    code, _, err = run(*asked, "--out", "out.gif")
    assert (code, err) == (0, [])
    assert np.abs(frames_of("out.gif")[:3].astype(int) - pixels).mean() < 8
