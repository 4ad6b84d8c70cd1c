"""Commands as a user types them, and one chain from training to an engine for all tests here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROMPT = "a red three moving up and left"
TIMEOUT_S = 900


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
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    return Result(done.returncode, done.stdout, done.stderr.decode())


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
def student(module: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student out of a smoke run of all training stages."""
    out = tmp_path_factory.mktemp("chain") / "run"
    made = module("train", "--config", "train/configs/tiny.toml", "--smoke", "--out", out)
    assert made.code == 0, made.stderr
    assert {"config.json", "model.safetensors"} <= set(os.listdir(out / "student"))
    return out / "student"


@pytest.fixture(scope="session")
def engine(module: Command, student: Path) -> Path:
    """That student's engine; tests that spoil it do so to a copy."""
    out = student.parent.parent / "engines"
    out.mkdir()
    made = module(
        "export.build", "--checkpoint", student, "--steps", "1", "--target", "onnx", "--out", out
    )
    assert made.code == 0, made.stderr
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
