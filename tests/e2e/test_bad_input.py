"""Bad input: one line on stderr, exit 1 (2 for usage), nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROMPT = "a red three moving up and left"
Run = Callable[..., Any]


def run_words(engine: Path, out: Path, prompt: str = PROMPT) -> tuple[str | Path, ...]:
    return ("run", "--engine", engine, "--prompt", prompt, "--frames", "3", "--out", out / "a.mp4")


class TestEngine:
    def test_missing(self, asd_rt: Run, refused: Run, out: Path) -> None:
        result = asd_rt(*run_words(out / "none.onnx", out))
        refused(result, 1, "none.onnx", "export.build", where=out)

    def test_truncated(self, asd_rt: Run, refused: Run, spoiled: Path, out: Path) -> None:
        os.truncate(spoiled, spoiled.stat().st_size // 2)
        refused(asd_rt(*run_words(spoiled, out)), 1, spoiled.name, where=out)

    def test_one_byte_flipped_in_any_part(
        self, asd_rt: Run, refused: Run, spoiled: Path, out: Path
    ) -> None:
        manifest = json.loads(Path(f"{spoiled}.json").read_text())
        for part in manifest["parts"].values():
            path = spoiled.parent / part["file"]
            whole = path.read_bytes()
            flipped = bytearray(whole)
            flipped[len(whole) // 2] ^= 1
            path.write_bytes(flipped)
            refused(asd_rt(*run_words(spoiled, out)), 1, part["file"], "sha256", where=out)
            path.write_bytes(whole)

    def test_manifest_absent(self, asd_rt: Run, refused: Run, spoiled: Path, out: Path) -> None:
        Path(f"{spoiled}.json").unlink()
        refused(asd_rt(*run_words(spoiled, out)), 1, "manifest", where=out)

    def test_part_absent(self, asd_rt: Run, refused: Run, spoiled: Path, out: Path) -> None:
        manifest = json.loads(Path(f"{spoiled}.json").read_text())
        name = manifest["parts"]["decoder"]["file"]
        (spoiled.parent / name).unlink()
        refused(asd_rt(*run_words(spoiled, out)), 1, name, where=out)

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"format_version": 99}, "format_version"),
            ({"surprise": 1}, "surprise"),
            ({"model": {"dim": 3}}, "model"),
            ({"precision": "fp13"}, "precision"),
            ({"timestep_shift": 4.5}, "edited"),
            ({"fps": 30}, "edited"),
        ],
    )
    def test_manifest_edited_by_hand(
        self,
        asd_rt: Run,
        refused: Run,
        spoiled: Path,
        out: Path,
        change: dict[str, Any],
        word: str,
    ) -> None:
        path = Path(f"{spoiled}.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        refused(asd_rt(*run_words(spoiled, out)), 1, word, where=out)

    def test_manifest_that_is_no_json(
        self, asd_rt: Run, refused: Run, spoiled: Path, out: Path
    ) -> None:
        Path(f"{spoiled}.json").write_text("{")
        refused(asd_rt(*run_words(spoiled, out)), 1, "JSON", where=out)

    def test_no_backend_installed(
        self, asd_rt: Run, refused: Run, engine: Path, out: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "blocked").mkdir()
        (tmp_path / "blocked" / "onnxruntime.py").write_text("raise ModuleNotFoundError(__name__)")
        result = asd_rt(*run_words(engine, out), PYTHONPATH=str(tmp_path / "blocked"))
        refused(result, 1, "onnxruntime", "[cpu]", where=out)


class TestRequest:
    @pytest.mark.parametrize(
        ("prompt", "words"),
        [
            ("a purple three moving up", ("purple", "red")),
            ("", ("prompt",)),
            ("   ", ("prompt",)),
        ],
    )
    def test_prompt(
        self,
        asd_rt: Run,
        refused: Run,
        engine: Path,
        out: Path,
        prompt: str,
        words: tuple[str, ...],
    ) -> None:
        refused(asd_rt(*run_words(engine, out, prompt)), 1, *words, where=out)

    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            *(("--frames", value) for value in ("-3", "many", "1.5", "")),
            *(("--steps", value) for value in ("0", "-1", "5", "one")),
            *(("--first-steps", value) for value in ("0", "5", "x")),
            *(("--seed", value) for value in ("-1", "x", "9223372036854775808")),
        ],
    )
    def test_number(
        self, asd_rt: Run, refused: Run, engine: Path, out: Path, flag: str, value: str
    ) -> None:
        words = [*run_words(engine, out), f"{flag}={value}"]
        refused(asd_rt(*words), 2, flag, where=out)

    def test_unknown_flag(self, asd_rt: Run, refused: Run, engine: Path, out: Path) -> None:
        refused(asd_rt(*run_words(engine, out), "--speed", "9"), 2, "--speed", where=out)

    def test_unknown_command(self, asd_rt: Run, refused: Run) -> None:
        refused(asd_rt("play"), 2, "play")


class TestOutput:
    @pytest.mark.parametrize(
        ("name", "word"), [("no/a.mp4", "mkdir -p"), ("a.avi", ".avi"), ("", "--out")]
    )
    def test_place(
        self, asd_rt: Run, refused: Run, engine: Path, out: Path, name: str, word: str
    ) -> None:
        target = f"{out}/{name}" if name else ""
        words = ("run", "--engine", engine, "--prompt", PROMPT, "--out", target)
        refused(asd_rt(*words), 1, word, where=out)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
    def test_read_only(self, asd_rt: Run, refused: Run, engine: Path, out: Path) -> None:
        out.chmod(0o555)
        refused(asd_rt(*run_words(engine, out)), 1, "Permission denied", where=out)

    @pytest.mark.skipif(
        not Path("/proc/self").exists(), reason="needs a folder that nobody can write"
    )
    def test_unwritable(self, asd_rt: Run, refused: Run, engine: Path) -> None:
        words = ("run", "--engine", engine, "--prompt", PROMPT, "--out", "/proc/a.mp4")
        refused(asd_rt(*words), 1, "/proc/a.mp4")

    @pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small disk"
    )
    def test_no_space(self, asd_rt: Run, refused: Run, engine: Path, tmp_path: Path) -> None:
        import subprocess

        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
        try:
            filler = disk / "filler"
            filler.write_bytes(bytes(60_000))
            result = asd_rt(*run_words(engine, disk))
            refused(result, 1, "No space left on device")
            assert os.listdir(disk) == ["filler"]
        finally:
            subprocess.run(["umount", str(disk)], check=True)


class TestCheckpoint:
    """`export.build` of weights that do not fit names all of them and builds nothing.

    Wrong flags and absent files: see tests/unit/export/test_build.py.
    """

    def build(self, module: Run, student: Path, out: Path, **changes: Any) -> Any:
        from safetensors.numpy import load_file, save_file

        spoiled = out.parent / "student"
        shutil.copytree(student, spoiled)
        tensors = load_file(spoiled / "model.safetensors")
        for name, value in changes.items():
            key = name.replace("__", ".")
            if value is None:
                del tensors[key]
            else:
                tensors[key] = value
        save_file(tensors, spoiled / "model.safetensors")
        return module(
            "export.build",
            "--checkpoint",
            spoiled,
            "--steps",
            "1",
            "--target",
            "onnx",
            "--out",
            out,
        )

    def test_missing_extra_and_misshapen(
        self, module: Run, refused: Run, student: Path, out: Path
    ) -> None:
        changes = {
            "blocks__0__ffn__0__bias": None,
            "blocks__0__ffn__9__bias": np.zeros(4, np.float32),
            "head__head__bias": np.zeros(3, np.float32),
        }
        result = self.build(module, student, out, **changes)
        names = ("blocks.0.ffn.0.bias", "blocks.0.ffn.9.bias", "head.head.bias")
        refused(result, 1, *names, where=out)

    def test_pickled_code(self, module: Run, refused: Run, out: Path, tmp_path: Path) -> None:
        path = tmp_path / "wan.pt"
        path.write_bytes(b"cposix\nmkdir\n(V" + str(out / "pwned").encode() + b"\ntR.")
        result = module("export.build", "--checkpoint", path, "--target", "onnx", "--out", out)
        refused(result, 1, "wan.pt", "pickled code (posix.mkdir)", where=out)
