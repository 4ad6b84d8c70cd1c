"""A bundle with a text encoder, by its commands: build, encode, run, and what each refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

Run = Callable[..., Any]
TEXT_DIM, TEXT_LEN = 16, 24
PROMPTS = ["a cat walks on the grass", "一只猫 🎈", "cats &amp; balloons"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that takes embeddings and makes pictures."""
    import torch

    from asd_rt.config import ModelConfig
    from train.checkpoint import save_checkpoint
    from train.codec import LinearCodec
    from train.deployment import Deployment
    from train.model import WanModel

    folder = tmp_path_factory.mktemp("text") / "student"
    config = ModelConfig(
        dim=32,
        ffn_dim=24,
        freq_dim=4,
        text_dim=TEXT_DIM,
        text_len=TEXT_LEN,
        in_dim=2,
        out_dim=2,
        num_heads=2,
        num_layers=1,
    )
    torch.manual_seed(0)
    model, codec = WanModel(config), LinearCodec(2)
    torch.nn.init.normal_(model.head.head.weight)
    codec.decoder.normal_()
    save_checkpoint(
        folder, config, model.state_dict(), Deployment(2, 6, 1, 3.0, (4, 2), 8, 4, None), codec
    )
    return folder


@pytest.fixture(scope="session")
def umt5(write_umt5: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_umt5(tmp_path_factory.mktemp("text") / "umt5", TEXT_DIM, half=True)


@pytest.fixture(scope="session")
def plain(module: Run, checkpoint: Path) -> Path:
    """The engine without a text encoder."""
    out = checkpoint.parent / "plain"
    out.mkdir()
    words = ("--checkpoint", checkpoint, "--target", "onnx", "--out", out)
    made = module("export.build", *words)
    assert made.code == 0, made.stderr
    return out / "asd_fp32.onnx"


@pytest.fixture(scope="session")
def bundle(module: Run, checkpoint: Path, umt5: Path, plain: Path) -> Path:
    """The same with one, added to a copy."""
    out = checkpoint.parent / "bundle"
    shutil.copytree(plain.parent, out)
    words = ("--checkpoint", checkpoint, "--target", "onnx", "--out", out, "--text-encoder", umt5)
    made = module("export.build", *words)
    assert made.code == 0, made.stderr
    assert "asd_fp32.onnx is up to date" in made.stderr
    assert "wrote its text encoder" in made.stderr
    return out / "asd_fp32.onnx"


@pytest.fixture(scope="session")
def embeds(module: Run, bundle: Path) -> Path:
    """Three prompts, encoded."""
    listed, out = bundle.parent.parent / "prompts.txt", bundle.parent.parent / "e.safetensors"
    listed.write_text("\n".join([PROMPTS[0], "", f"  {PROMPTS[1]}", PROMPTS[2], ""]))
    made = module(
        "asd_rt", "encode", "--engine", bundle, "--prompts", listed, "--out", out, "--json"
    )
    assert made.code == 0, made.stderr
    assert made.document["prompts"] == PROMPTS
    assert made.document["text_dim"] == TEXT_DIM
    return out


def block(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which the packages `names` cannot be imported."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is blocked')\n")
    return {"PYTHONPATH": str(folder)}


def video(module: Run, engine: Path, *words: str | Path, **environment: str) -> bytes:
    made = module(
        *("asd_rt", "run", "--engine", engine, "--frames", "4", "--out", "-", *words), **environment
    )
    assert made.code == 0, made.stderr
    frames: bytes = made.stdout
    assert frames.count(b"FRAME\n") == 4
    return frames


def test_embeddings_file(embeds: Path) -> None:
    tensors = load_file(embeds)
    assert tensors["context"].shape[::2] == (3, TEXT_DIM)
    assert tensors["context"].dtype == np.float32
    for row, count in zip(tensors["context"], tensors["tokens"], strict=True):
        assert np.abs(row[:count]).min(axis=1).all()
        assert not row[count:].any()
    with safe_open(embeds, "numpy") as file:
        assert json.loads(file.metadata()["prompts"]) == PROMPTS


def test_prompt_and_its_embedding_give_the_same_video(
    module: Run, bundle: Path, plain: Path, embeds: Path, tmp_path: Path
) -> None:
    """Whether the encoder runs, a cache remembers, or a file holds it: the same, and without its packages."""
    cache = {"ASD_RT_CACHE": str(tmp_path)}
    prompted = video(module, bundle, "--prompt", PROMPTS[1], **cache)
    assert len(list((tmp_path / "prompts").glob("*.npy"))) == 1
    assert video(module, bundle, "--prompt", f" {PROMPTS[1]} ", **cache) == prompted
    blocked = block(tmp_path / "blocked", "tokenizers", "ftfy", "torch", "transformers", "onnx")
    words = ("--prompt-embeds", embeds, "--prompt-index", "1")
    assert video(module, bundle, *words, **blocked) == prompted
    assert video(module, plain, *words, **blocked) == prompted
    assert video(module, plain, "--prompt-embeds", embeds) != prompted


def test_runtime_needs_no_torch_to_encode(
    module: Run, bundle: Path, embeds: Path, tmp_path: Path
) -> None:
    blocked = block(tmp_path / "blocked", "torch", "transformers", "onnx", "export", "train")
    out = tmp_path / "one.safetensors"
    words = ("--engine", bundle, "--prompt", PROMPTS[0], "--out", out, "--dtype", "float16")
    made = module("asd_rt", "encode", *words, ASD_RT_CACHE=str(tmp_path), **blocked)
    assert made.code == 0, made.stderr
    context = load_file(out)["context"]
    assert context.dtype == np.float16
    np.testing.assert_allclose(
        context[0], load_file(embeds)["context"][0, : context.shape[1]], 2e-3
    )


def test_engine_of_words_encodes_too(module: Run, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "three.safetensors"
    engine = root / "asd_rt" / "engine" / "asd_fp32.onnx"
    words = ("--engine", engine, "--prompt", "a red three moving right", "--out", out)
    assert module("asd_rt", "encode", *words).code == 0
    made = video(module, engine, "--prompt", "a red three moving right")
    assert video(module, engine, "--prompt-embeds", out) == made


def test_second_build_changes_nothing(
    module: Run, checkpoint: Path, bundle: Path, umt5: Path
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.parent.iterdir()}
    words = ("--checkpoint", checkpoint, "--target", "onnx", "--out", bundle.parent)
    again = module("export.build", *words, "--text-encoder", umt5)
    assert again.code == 0, again.stderr
    assert "its text encoder is up to date" in again.stderr
    assert {path.name: path.read_bytes() for path in bundle.parent.iterdir()} == before
    manifest = json.loads(Path(f"{bundle}.json").read_text())
    assert manifest["sources"]["text"]["precision"] == "fp16"  # as the weights are stored


class TestRefused:
    """One line, exit 1, nothing left behind."""

    def test_engine_without_text(self, module: Run, refused: Run, plain: Path, out: Path) -> None:
        words = ("--engine", plain, "--prompt", "a cat", "--out", out / "a.gif")
        result = module("asd_rt", "run", *words)
        refused(result, 1, "no text part", "--text-encoder", "--prompt-embeds", where=out)

    @pytest.mark.parametrize("package", ["ftfy", "tokenizers"])
    def test_package_absent(
        self, module: Run, refused: Run, bundle: Path, out: Path, tmp_path: Path, package: str
    ) -> None:
        blocked = block(tmp_path / "blocked", package)
        words = ("--engine", bundle, "--prompt", "a dog", "--out", out / "a.gif")
        result = module("asd_rt", "run", *words, **blocked)
        refused(result, 1, package, "pip install 'asd-rt[text]'", where=out)

    @pytest.mark.parametrize(
        ("words", "code", "told"),
        [
            (("--prompt-embeds", "{embeds}", "--prompt-index", "3"), 1, ("only 0 to 2",)),
            (("--prompt-embeds", "{embeds}", "--prompt-index", "-1"), 2, ("--prompt-index",)),
            (
                ("--prompt", "a cat", "--prompt-index", "0"),
                2,
                ("--prompt-index", "--prompt-embeds"),
            ),
            (("--prompt", "a", "--prompt-embeds", "{embeds}"), 2, ("not allowed with",)),
            ((), 2, ("--prompt --prompt-embeds",)),
            (("--prompt-embeds", "{out}/none"), 1, ("no such file", "asd-rt encode")),
            (("--prompt-embeds", "{engine}"), 1, ("cannot be read as safetensors",)),
            (("--prompt-embeds", "{wide}"), 1, ("3 tokens of 5 numbers", f"of {TEXT_DIM}")),
        ],
    )
    def test_run(
        self,
        module: Run,
        refused: Run,
        bundle: Path,
        embeds: Path,
        out: Path,
        tmp_path: Path,
        words: tuple[str, ...],
        code: int,
        told: tuple[str, ...],
    ) -> None:
        wide = tmp_path / "wide.safetensors"
        save_file({"context": np.zeros((1, 3, 5), np.float32)}, wide)
        given = [word.format(embeds=embeds, out=out, engine=bundle, wide=wide) for word in words]
        result = module("asd_rt", "run", "--engine", bundle, "--out", out / "a.gif", *given)
        refused(result, code, *told, where=out)

    @pytest.mark.parametrize(
        ("content", "told"), [(None, "cannot be read"), (b"\n \n", "no prompt"), (b"\xff", "UTF-8")]
    )
    def test_encode(
        self,
        module: Run,
        refused: Run,
        bundle: Path,
        out: Path,
        tmp_path: Path,
        content: bytes | None,
        told: str,
    ) -> None:
        listed = tmp_path / "prompts.txt"
        if content is not None:
            listed.write_bytes(content)
        words = ("--engine", bundle, "--prompts", listed, "--out", out / "e.safetensors")
        refused(module("asd_rt", "encode", *words), 1, "prompts.txt", told, where=out)

    def test_broken_text_encoder_builds_nothing(
        self, module: Run, refused: Run, checkpoint: Path, umt5: Path, out: Path, tmp_path: Path
    ) -> None:
        spoiled = tmp_path / "umt5"
        shutil.copytree(umt5, spoiled)
        os.truncate(spoiled / "model.safetensors", 5000)
        words = ("--checkpoint", checkpoint, "--target", "onnx", "--out", out)
        result = module("export.build", *words, "--text-encoder", spoiled)
        refused(result, 1, "model.safetensors", "cut short", where=out)
