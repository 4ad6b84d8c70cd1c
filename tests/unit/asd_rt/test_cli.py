"""The command line: results on stdout, a line a problem on stderr, exit codes 0, 1 and 2."""

from __future__ import annotations

import io
import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from asd_rt import cli
from asd_rt.commands.common import Problems, size_text
from asd_rt.errors import OutputError
from asd_rt.files import check_writable, replacing
from asd_rt.noise import gaussian
from asd_rt.progress import Progress

PROMPT = "a red three moving right"


@pytest.fixture(autouse=True)
def own_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def asd(toy, tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; returns (exit code, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def test_run_writes_and_reports(asd, toy, tmp_path) -> None:
    code, out, err = asd(
        *("run", "--engine", toy.path, "--prompt", PROMPT, "--frames", 7, "--out", "x.mp4"),
        *("--steps", 1, "--first-steps", 4, "--json", "--seed", 5),
    )
    assert (code, err) == (0, [])
    report = json.loads(out)
    assert report["steps"] == [4, 1, 1, 1]
    assert report["frames"] == 7
    assert [block["frames"] for block in report["blocks"]] == [2, 2, 2, 1]
    assert [block["index"] for block in report["blocks"]] == [0, 1, 2, 3]
    assert [len(block["pass_ms"]) for block in report["blocks"]] == [4, 1, 1, 1]
    assert all(block["block_ms"] >= block["decode_ms"] > 0 for block in report["blocks"])
    assert report["fps_without_decode"] > report["fps_with_decode"] > 0
    assert report["time_to_first_frame_ms"] > 0
    assert (report["seed"], report["prompt"], report["precision"]) == (5, PROMPT, "fp32")
    assert (tmp_path / "x.mp4").stat().st_size > 0


def test_run_text_and_scale(asd, toy, tmp_path) -> None:
    code, out, err = asd(
        *("run", "--engine", toy.path, "--prompt", PROMPT, "--frames", 3, "--out", "png/"),
        *("--scale", 3),
    )
    assert (code, err) == (0, [])
    assert out.startswith("png/: 3 frames in 2 blocks of 4, 1 steps")
    pictures = sorted((tmp_path / "png").iterdir())
    assert len(pictures) == 3
    assert pictures[0].read_bytes()[16:24] == (6).to_bytes(4, "big") + (12).to_bytes(4, "big")


@pytest.mark.parametrize("flag", [("--deadline-ms", "20000"), ("--fps", "0.1")])
def test_run_with_a_deadline(asd, toy, flag) -> None:
    code, out, err = asd(
        *("run", "--engine", toy.path, "--prompt", PROMPT, "--frames", 12, "--json", *flag)
    )
    assert (code, err) == (0, [])
    report = json.loads(out)
    assert report["deadline_ms"] == 20000  # a block has two frames; no machine is that busy
    assert report["steps"] == [4] * 6
    first, *later = report["blocks"]
    assert first["budget_ms"] == 80000
    for block in later:
        assert block["budget_ms"] == 20000 and block["fits"] and not block["missed"]
        assert block["slack_ms"] == pytest.approx(20000 - block["taken_ms"], abs=0.01)
        assert 0 < block["planned_ms"] < 20000
    assert report["summary"]["misses"]["with_decode"] == {"count": 0, "share": 0}


def test_a_deadline_that_cannot_be_met(asd, toy) -> None:
    code, out, err = asd(
        *("run", "--engine", toy.path, "--prompt", PROMPT, "--frames", 20),
        *("--deadline-ms", "0.001", "--first-steps", "2"),
    )
    assert code == 0 and len(err) == 1
    assert "even with one step" in err[0] and "--deadline-ms" in err[0]
    assert "of 1, 1, 1, 1, ... steps" in out and "blocks came late" in out


def test_all_problems_at_once_and_nothing_written(asd, toy, tmp_path) -> None:
    code, out, err = asd(
        *("run", "--engine", toy.path, "--prompt", "a purple cow", "--out", "none/x.mp4"),
        *("--frames", "-1", "--seed", "x", "--steps", "5", "--scale", "-1", "--deadline-ms", "0"),
    )
    assert (code, out) == (2, "")
    named = ("--frames", "--seed", "--steps", "--scale", "--deadline-ms", "none", "purple, cow")
    assert len(err) == len(named)
    for line, name in zip(err, named, strict=True):
        assert line.startswith("asd-rt: error: ") and name in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "COMMAND"),
        (("fly",), 2, "invalid choice"),
        (("run",), 2, "--prompt"),
        (("run", "--prompt", PROMPT, "--frame", "3"), 2, "unrecognized"),
        (
            ("run", "--prompt", PROMPT, "--deadline-ms", "0"),
            2,
            "--deadline-ms must be a number from",
        ),
        (("run", "--prompt", PROMPT, "--deadline-ms", "-3"), 2, "--deadline-ms must be"),
        (("run", "--prompt", PROMPT, "--deadline-ms", "nan"), 2, "--deadline-ms must be"),
        (("run", "--prompt", PROMPT, "--deadline-ms", "1e999"), 2, "--deadline-ms must be"),
        (("run", "--prompt", PROMPT, "--fps", "0"), 2, "--fps must be"),
        (("run", "--prompt", PROMPT, "--fps", "inf"), 2, "--fps must be"),
        (("run", "--prompt", PROMPT, "--fps", "3", "--deadline-ms", "9"), 2, "not allowed with"),
        (("run", "--prompt", PROMPT, "--deadline-ms", "9", "--steps", "5"), 2, "--steps must be"),
        (("bench", "--deadline-ms", "x"), 2, "--deadline-ms must be"),
        (("run", "--prompt", PROMPT, "--engine", "none.onnx"), 1, "expected an engine file"),
        (("run", "--prompt", PROMPT, "--seed", "-1"), 2, "--seed must be"),
        (("run", "--prompt", PROMPT, "--seed", str(2**63)), 2, "--seed must be"),
        (("run", "--prompt", PROMPT, "--frames", "1.5"), 2, "--frames must be"),
        (("run", "--prompt", ""), 1, "says nothing"),
        (("run", "--prompt", PROMPT, "--out", "x.avi"), 1, "x.avi"),
        (("run", "--prompt", PROMPT, "--out", "-", "--json"), 2, "both write to stdout"),
        (("bench", "--blocks", "0"), 2, "--blocks must be"),
        (("bench", "--latent-size", "7x8"), 2, "--latent-size"),
        (("bench", "--json", "none/x.json"), 1, "does not exist"),
        (("replay", "--inputs", "none", "--out", "x"), 1, "no such file"),
        (("replay", "--inputs", "none"), 2, "--out"),
        (
            ("replay", "--inputs", "none", "--out", "x", "--steps-per-block", "4,9"),
            2,
            "from 1 to 4",
        ),
        (("inspect", "none.onnx"), 1, "expected an engine file"),
    ],
)
def test_bad_input(asd, toy, arguments, code, message) -> None:
    if "--engine" not in arguments and arguments[:1] and arguments[0] in ("run", "bench", "replay"):
        arguments = (*arguments, "--engine", toy.path)
    found, out, err = asd(*arguments)
    assert (found, out) == (code, "")
    assert any(message in line for line in err), err
    assert all("Traceback" not in line for line in err)


def test_one_problem_is_one_line(asd) -> None:
    _, _, err = asd("inspect", "none.onnx")
    assert len(err) == 1


def test_too_many_frames_for_the_cache(asd, own_toy) -> None:
    code, _, err = asd("run", "--engine", own_toy.path, "--prompt", PROMPT, "--frames", 10)
    assert code == 1 and len(err) == 1 and "--max-frames" in err[0]


def test_debug_shows_the_traceback(asd, capsys) -> None:
    from asd_rt.errors import EngineError

    with pytest.raises(EngineError):
        cli.main(["inspect", "none.onnx", "--debug"])


def test_our_own_faults_are_one_line_too(asd, toy, monkeypatch) -> None:
    monkeypatch.setattr("asd_rt.commands.inspect.read_manifest", lambda path: 1 // 0)
    code, _, err = asd("inspect", toy.path)
    assert code == 1
    assert err == [
        "asd-rt: error: unexpected ZeroDivisionError: integer division or modulo by zero; --debug shows where"
    ]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_examples(asd, command) -> None:
    code, out, _ = asd(command, "--help")
    assert code == 0
    assert "examples:" in out and f"asd-rt {command}" in out


def save_inputs(path, **more) -> dict[str, np.ndarray]:
    inputs = {"noise": gaussian((1, 8, 2, 4, 2), 1, 0, 0), "context": gaussian((1, 3, 3), 2, 0, 0)}
    inputs |= {name.replace("__", "."): value for name, value in more.items()}
    save_file(inputs, path)
    return inputs


def test_replay(asd, toy, tmp_path) -> None:
    save_inputs("in.safetensors", renoise__block0__step1=gaussian((1, 2, 2, 4, 2), 3, 0, 0))
    arguments = (
        "replay",
        "--engine",
        toy.path,
        "--inputs",
        "in.safetensors",
        "--steps-per-block",
        "4,1,1",
    )
    code, out, err = asd(*arguments, "--out", "out.safetensors", "--json")
    assert (code, err) == (0, [])
    assert json.loads(out)["steps"] == [4, 1, 1, 1]
    result = load_file("out.safetensors")
    assert result["latents"].shape == (1, 8, 2, 4, 2)
    assert result["kv_cache.layer0.k"].shape == (1, 12, 2, 6)
    np.testing.assert_array_equal(result["kv_cache.last.v"], result["kv_cache.layer1.v"])

    code, _, _ = asd(*arguments, "--out", "bare.safetensors", "--no-dump-cache")
    bare = load_file("bare.safetensors")
    assert list(bare) == ["latents"]
    np.testing.assert_array_equal(bare["latents"], result["latents"])
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"renoise__block0": gaussian((1, 2, 2, 4, 2), 0, 0, 0)}, "unknown tensor renoise.block0"),
        ({"renoise__block9__step0": gaussian((1, 2, 2, 4, 2), 0, 0, 0)}, "can never be used"),
        ({"noise": gaussian((1, 7, 2, 4, 2), 0, 0, 0)}, "whole number of blocks"),
        ({"noise": np.full((1, 8, 2, 4, 2), np.nan, np.float32)}, "finite floats"),
        ({"context": np.zeros((1, 3, 3), np.int32)}, "finite floats"),
        ({"initial": gaussian((1, 1, 2, 4, 2), 0, 0, 0)}, "initial must be"),
    ],
)
def test_replay_refuses(asd, toy, tmp_path, change, message) -> None:
    save_inputs("in.safetensors", **change)
    code, _, err = asd(
        "replay", "--engine", toy.path, "--inputs", "in.safetensors", "--out", "out.st"
    )
    assert code == 1 and len(err) == 1 and message in err[0]
    assert not (tmp_path / "out.st").exists()


@pytest.mark.parametrize("content", [b"", b"rubbish" * 9])
def test_replay_of_a_damaged_file(asd, toy, tmp_path, content) -> None:
    (tmp_path / "in").write_bytes(content)
    code, _, err = asd("replay", "--engine", toy.path, "--inputs", "in", "--out", "out")
    assert code == 1 and len(err) == 1 and "cannot be read as safetensors" in err[0]


def test_inspect(asd, toy, own_toy) -> None:
    code, out, _ = asd("inspect", toy.path)
    assert code == 0 and "window 6, sink 1" in out and "part decoder" in out
    code, out, _ = asd("inspect", own_toy.path, "--json")
    report = json.loads(out)
    assert code == 0 and report["files_ok"]
    assert report["manifest"] == json.loads(json.dumps(own_toy.manifest.to_json()))
    assert report["cache"] == {"frames": 9, "tokens_per_frame": 2, "bytes": 2 * 2 * 18 * 12 * 4}
    own_toy.path.write_bytes(own_toy.path.read_bytes()[:-1])
    code, out, _ = asd("inspect", own_toy.path, "--json")
    assert code == 1 and not json.loads(out)["files_ok"]
    assert "damaged" in json.loads(out)["problems"]["denoiser"]


def test_bench(asd, toy, tmp_path) -> None:
    arguments = (
        "bench",
        "--engine",
        toy.path,
        "--blocks",
        3,
        "--repeats",
        2,
        "--warmup",
        0,
        "--threads",
        1,
    )
    code, out, err = asd(*arguments, "--json")
    assert (code, err) == (0, [])
    report = json.loads(out)
    assert len(report["records"]) == 6
    assert report["summary"]["runs"] == 2
    assert report["summary"]["steps_per_block"] == [4, 1, 1]
    assert report["sha256"] == toy.manifest.parts["denoiser"].sha256
    code, out, _ = asd(*arguments, "--json", "--deadline-ms", 20000)
    timed = json.loads(out)
    assert timed["plan"] == {"steps": 4, "first_steps": 4, "deadline_ms": 20000}
    assert timed["summary"]["misses"]["with_decode"]["count"] == 0
    assert all(record["slack_ms"] > 0 for record in timed["records"])
    code, out, _ = asd(*arguments, "--json", "b.json")
    assert code == 0 and "written to b.json" in out and "| ms | p50" in out
    assert json.loads((tmp_path / "b.json").read_text())["blocks"] == 3


def test_doctor(asd, own_toy, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("asd_rt.commands.doctor.PACKAGED_DIR", tmp_path / "none")
    monkeypatch.setattr("asd_rt.engines.PACKAGED_DIR", tmp_path / "none")
    code, out, _ = asd("doctor", "--json")
    report = json.loads(out)
    assert code == 1 and report["best_engine"] is None
    assert any("export.build" in item["mend"] for item in report["problems"])

    (tmp_path / "engines").mkdir()
    for path in own_toy.path.parent.glob("toy*"):
        path.rename(tmp_path / "engines" / path.name)
    code, out, _ = asd("doctor")
    assert code == 0 and "engines/toy_fp32.onnx: onnx fp32, ok" in out
    (tmp_path / "engines/toy_fp32.time.onnx").unlink()
    code, out, _ = asd("doctor")
    assert code == 1, "the only engine is damaged"
    assert "problem: engines/toy_fp32.time.onnx" in out
    mends = [line for line in out.splitlines() if line.startswith("   mend: ")]
    assert mends[0].startswith("   mend: copy it again, or build it again with the flags it was")
    assert not any("export.build" in line for line in mends), "that would replace it by another"


def test_replacing_is_whole_or_nothing(tmp_path) -> None:
    path = tmp_path / "x"
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(str(1 // 0))
    assert list(tmp_path.iterdir()) == []
    with replacing(path) as temporary:
        temporary.write_text("1")
    assert path.read_text() == "1" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OutputError, match="No space left"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "1" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OutputError, match="is a folder"):
        check_writable(tmp_path, "--out")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress() -> None:
    shown, hidden = Terminal(), io.StringIO()
    for stream in (shown, hidden):
        with Progress("blocks", 4, stream) as progress:
            progress.advance("3 ms")
    assert "blocks [######..................] 1/4" in shown.getvalue()
    assert shown.getvalue().endswith("\r\x1b[K")
    assert hidden.getvalue() == ""


def test_numbers() -> None:
    problems = Problems()
    assert [problems.integer("-n", text, 0, 9) for text in ("0", "9", "+3", None)] == [
        0,
        9,
        3,
        None,
    ]
    assert [problems.number("-n", text, 0.5, 9) for text in ("0.5", "9.", "+.7e1", None)] == [
        0.5,
        9,
        7,
        None,
    ]
    for text in ("", "-", "nan", "inf", "1e999", "0.4", "9.1", "1_0", "١", " 1", ".", "e1", "-1"):
        assert problems.number("-n", text, 0.5, 9) is None
    for text in ("", "-", "1e3", "١", "10", "--1", " 1", "9" * 5000):
        assert problems.integer("-n", text, 0, 9) is None
    assert [size_text(n) for n in (12, 6_800_000, 2e9)] == ["12 bytes", "6.8 MB", "2.0 GB"]
