"""Commands as a user types them, and one chain from training to an engine for all tests here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROMPT = "a red three moving up and left"
TIMEOUT_S = 600
SMALLER = {"dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 2}


@dataclass(frozen=True)
class Result:
    """What a command left on its streams."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """stdout as one JSON document."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found

    @property
    def lines(self) -> list[str]:
        """Lines on stderr, blank ones left out."""
        return [line for line in self.stderr.splitlines() if line.strip()]


Command = Callable[..., Result]


def run_command(*words: str | Path, cwd: Path, **environment: str) -> Result:
    """Run a command to its end; one that hangs is stopped and shown with what it said and where it was."""
    command = [str(word) for word in words]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, problems = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # Python shows the stacks of all threads
        try:
            out, problems = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            out, problems = process.communicate()
        pytest.fail(
            f"not done after {TIMEOUT_S} s: {shlex.join(command)}\n"
            f"stdout ends with {out[-2000:]!r}\nstderr:\n{problems.decode(errors='replace')[-20_000:]}"
        )
    return Result(process.returncode, out, problems.decode())


@pytest.fixture(scope="session")
def asd_rt(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`asd-rt WORDS...`, in an empty folder unless told otherwise."""
    command = shutil.which("asd-rt", path=str(Path(sys.executable).parent))
    assert command, "asd-rt is not installed in this environment; make test sets it up"
    empty = tmp_path_factory.mktemp("cwd")

    def run(*words: str | Path, cwd: Path = empty, **environment: str) -> Result:
        return run_command(command, *words, cwd=cwd, **environment)

    return run


@pytest.fixture(scope="session")
def module(root: Path) -> Command:
    """`python -m WORDS...`, in the repository."""

    def run(*words: str | Path, **environment: str) -> Result:
        return run_command(sys.executable, "-m", *words, cwd=root, **environment)

    return run


@pytest.fixture(scope="session")
def student(module: Command, root: Path, make_once: Callable[..., Path]) -> Path:
    """A student out of a smoke run of all training stages, its network smaller than the recipe's."""

    def train(folder: Path) -> None:
        recipe = (root / "train" / "configs" / "tiny.toml").read_text()
        for name, value in SMALLER.items():
            recipe, found = re.subn(rf"^{name} = \d+", f"{name} = {value}", recipe, flags=re.M)
            assert found == 1, name
        (folder / "small.toml").write_text(recipe)
        words = ("--config", folder / "small.toml", "--smoke", "--threads", "1")
        made = module("train", *words, "--out", folder / "run")
        assert made.code == 0, made.stderr
        assert {"config.json", "model.safetensors"} <= set(os.listdir(folder / "run" / "student"))

    return make_once("chain", train) / "run" / "student"


@pytest.fixture(scope="session")
def engine(module: Command, student: Path, make_once: Callable[..., Path]) -> Path:
    """That student's engine, in a folder `engines`; tests that spoil it do so to a copy."""

    def build(folder: Path) -> None:
        out = folder / "engines"
        out.mkdir()
        words = ("--checkpoint", student, "--steps", "1", "--target", "onnx", "--out", out)
        made = module("export.build", *words)
        assert made.code == 0, made.stderr

    out = make_once("chain_engines", build) / "engines"
    engines = [path for path in out.glob("*.onnx") if Path(f"{path}.json").exists()]
    assert len(engines) == 1, os.listdir(out)
    return engines[0]


@pytest.fixture
def spoiled(engine: Path, tmp_path: Path) -> Path:
    """A copy of the engine, to be damaged."""
    shutil.copytree(engine.parent, tmp_path / "engines")
    return tmp_path / "engines" / engine.name


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for results."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def assert_refused(result: Result, code: int, *words: str, where: Path | None = None) -> None:
    """One line on stderr that holds `words`; nothing on stdout; nothing in the folder `where`."""
    assert result.code == code, result
    assert len(result.lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == b""
    for word in words:
        assert word in result.lines[0]
    if where is not None:
        assert os.listdir(where) == []


@pytest.fixture(scope="session")
def refused() -> Callable[..., None]:
    """`assert_refused`, for tests in this folder."""
    return assert_refused
