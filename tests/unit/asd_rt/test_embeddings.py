"""Embeddings files: what is written is read, and anything else is one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from asd_rt.embeddings import read_embeddings, write_embeddings
from asd_rt.errors import ConfigError

PROMPTS = ["a cat", "一只猫 🎈"]


@pytest.fixture
def contexts():
    generator = np.random.default_rng(0)
    return [generator.standard_normal((1, n, 3)).astype(np.float32) for n in (4, 2)]


@pytest.mark.parametrize("half", [False, True])
def test_round_trip(tmp_path, contexts, half) -> None:
    path = tmp_path / "prompts.safetensors"
    write_embeddings(path, contexts, PROMPTS, half)
    found = read_embeddings(path, "--prompt-embeds")
    assert found.values.dtype == (np.float16 if half else np.float32)
    assert found.values.shape == (2, 4, 3)
    assert found.tokens.tolist() == [4, 2]
    assert not found.values[1, 2:].any()
    for i, context in enumerate(contexts):
        assert found.prompt(i) == PROMPTS[i]
        kept = found.context(i)
        assert kept.dtype == np.float32
        np.testing.assert_allclose(
            kept, context, rtol=1e-3 if half else 0, atol=1e-6 if half else 0
        )
    assert os.listdir(tmp_path) == ["prompts.safetensors"]


def test_file_of_context_alone(tmp_path, contexts) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"context": contexts[0]}, path)
    found = read_embeddings(path, "--prompt-embeds")
    np.testing.assert_array_equal(found.context(0), contexts[0])
    assert found.prompt(0) is None


def test_there_is_no_such_prompt(tmp_path, contexts) -> None:
    path = tmp_path / "c.safetensors"
    write_embeddings(path, contexts, PROMPTS)
    with pytest.raises(ConfigError, match="has no prompt 2, only 0 to 1"):
        read_embeddings(path, "--prompt-embeds").context(2)


def test_too_large_for_float16(tmp_path, contexts) -> None:
    with pytest.raises(ConfigError, match="--dtype float32"):
        write_embeddings(tmp_path / "c.safetensors", [contexts[0] * 1e6], PROMPTS[:1], half=True)
    assert os.listdir(tmp_path) == []


def test_checks_the_engine(tmp_path, contexts, toy) -> None:
    path, model = tmp_path / "c.safetensors", toy.manifest.model
    write_embeddings(path, contexts, PROMPTS)
    found = read_embeddings(path, "--prompt-embeds")
    found.check(model)
    for wrong in (replace(model, text_dim=5), replace(model, text_len=3)):
        with pytest.raises(ConfigError, match="4 tokens of 3 numbers"):
            found.check(wrong)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"noise": np.zeros((1, 2, 3), np.float32)}, "has no tensor context, only noise"),
        ({"context": np.zeros((2, 3), np.float32)}, r"found float32 \[2, 3\]"),
        ({"context": np.zeros((1, 2, 3), np.int64)}, "found int64"),
        ({"context": np.zeros((1, 0, 3), np.float32)}, "found float32"),
        (
            {"context": np.zeros((1, 2, 3), np.float32), "tokens": np.array([3])},
            "from 1 to 2, found",
        ),
        (
            {"context": np.zeros((1, 2, 3), np.float32), "tokens": np.array([0.5])},
            "whole numbers",
        ),
    ],
)
def test_other_tensors_are_named(tmp_path, tensors, told) -> None:
    path = tmp_path / "c.safetensors"
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=told):
        read_embeddings(path, "--prompt-embeds")


@pytest.mark.parametrize("listed", ["{", json.dumps(["one", "two"]), json.dumps([3]), "3"])
def test_list_of_prompts_that_does_not_fit(tmp_path, contexts, listed) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"context": contexts[0]}, path, {"prompts": listed})
    with pytest.raises(ConfigError, match="list of prompts"):
        read_embeddings(path, "--prompt-embeds")


def test_damaged_absent_and_not_finite(tmp_path, contexts) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(ConfigError, match="asd-rt encode"):
        read_embeddings(path, "--prompt-embeds")
    write_embeddings(path, contexts, PROMPTS)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ConfigError, match="cut short"):
        read_embeddings(path, "--prompt-embeds")
    contexts[1][0, 1, 0] = np.nan
    write_embeddings(path, contexts, PROMPTS)
    found = read_embeddings(path, "--prompt-embeds")
    found.context(0)
    with pytest.raises(ConfigError, match="not finite"):
        found.context(1)
