"""A TensorRT-RTX plan, built, inspected and refused on a machine without a card."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asd_rt.manifest import read_manifest, write_manifest

Run = Callable[..., Any]
HAS_DRIVER = Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()


pytestmark = [
    pytest.mark.skipif(
        not importlib.util.find_spec("tensorrt_rtx"), reason="needs the extra [rtx]"
    ),
    pytest.mark.skipif(HAS_DRIVER, reason="is about machines without an NVIDIA driver"),
]


@pytest.fixture(scope="module")
def built(module: Run, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan for other cards than any here."""
    out = tmp_path_factory.mktemp("plans")
    target = ("--target", "tensorrt", "--precision", "fp16", "--gpu", "sm89")
    made = module("export.build", "--checkpoint", student, "--steps", "1", *target, "--out", out)
    assert made.code == 0, made.stderr
    return out / "asd_fp16.plan"


@pytest.fixture
def plan(built: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return shutil.copytree(built.parent, tmp_path / "plans") / built.name


def test_plan_without_a_card(asd_rt: Run, refused: Run, built: Path, out: Path) -> None:
    assert built.stat().st_size > 100_000
    seen = asd_rt("inspect", built, "--json")
    assert seen.code == 0, seen.stderr
    assert b"sm89" in seen.stdout
    refused(asd_rt(*run_words(built, out)), 1, "NVIDIA", where=out)


def run_words(plan: Path, out: Path) -> tuple[object, ...]:
    words = ("--engine", plan, "--prompt", "a red three moving right", "--frames", "3")
    return ("run", *words, "--out", out / "a.mp4")


def truncate(plan: Path) -> None:
    os.truncate(plan, plan.stat().st_size // 2)


def edit_cards(plan: Path) -> None:
    """As somebody might who has another card."""
    path = Path(f"{plan}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gpus": ["sm120"]}))


def age(plan: Path) -> None:
    """As one that an older builder made."""
    manifest = read_manifest(plan)
    write_manifest(plan, replace(manifest, tools=manifest.tools | {manifest.backend: "1.0.0"}))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (truncate, "damaged denoiser part"),
        (edit_cards, "was edited after it was written"),
        (age, "was built by tensorrt_rtx 1.0.0, installed is"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said_before_cuda_is_asked(
    asd_rt: Run,
    refused: Run,
    plan: Path,
    out: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    told: str,
) -> None:
    """With a cuda-python that ends the process when it is imported."""
    spoil(plan)
    (tmp_path / "blocked" / "cuda").mkdir(parents=True)
    (tmp_path / "blocked" / "cuda" / "__init__.py").write_text("import os\nos._exit(9)\n")
    path = os.pathsep.join([str(tmp_path / "blocked"), os.environ.get("PYTHONPATH", "")])
    result = asd_rt(*run_words(plan, out), PYTHONPATH=path)
    refused(result, 1, told, plan.name, where=out)
