"""The cache of encoded prompts: remembers, forgets what was not used for longest, and never fails a run."""

from __future__ import annotations

import os

import numpy as np
import pytest

from asd_rt.prompt_cache import PromptCache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ASD_RT_CACHE", str(tmp_path))
    return tmp_path / "prompts"


def context(value: float, tokens: int = 4) -> np.ndarray:
    return np.full((1, tokens, 8), value, np.float32)


@pytest.mark.usefixtures("folder")
def test_remembers_by_prompt_and_encoder() -> None:
    cache = PromptCache("encoder a")
    assert cache.get("a cat") is None
    cache.put("a cat", context(1))
    np.testing.assert_array_equal(cache.get("a cat"), context(1))
    np.testing.assert_array_equal(PromptCache("encoder a").get("a cat"), context(1))
    assert cache.get("a dog") is None
    assert PromptCache("encoder b").get("a cat") is None


def test_forgets_what_was_not_used_for_longest(folder) -> None:
    one = 128 + context(0).nbytes  # a file's size: a header and the numbers
    cache = PromptCache("encoder", max_bytes=3 * one)
    for i, prompt in enumerate("abc"):
        cache.put(prompt, context(i))
    for i, path in enumerate(cache._path(folder, prompt) for prompt in "abc"):
        os.utime(path, (i, i))
    assert cache.get("a") is not None  # now b is the oldest
    cache.put("d", context(3))
    assert [prompt for prompt in "abcd" if cache.get(prompt) is not None] == ["a", "c", "d"]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3 * one


def test_what_is_larger_than_the_cache_is_not_kept(folder) -> None:
    PromptCache("encoder", max_bytes=64).put("a", context(1))
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array"])
def test_damaged_file_is_encoded_again(folder, content) -> None:
    cache = PromptCache("encoder")
    cache.put("a", context(1))
    cache._path(folder, "a").write_bytes(content)
    assert cache.get("a") is None
    cache.put("a", context(2))
    np.testing.assert_array_equal(cache.get("a"), context(2))


def test_pickled_file_is_not_loaded(folder) -> None:
    cache = PromptCache("encoder")
    cache.put("a", context(1))
    np.save(cache._path(folder, "a"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert cache.get("a") is None


def test_place_that_cannot_be_written_costs_only_time(folder) -> None:
    folder.write_text("a file where the folder should be")
    cache = PromptCache("encoder")
    cache.put("a", context(1))
    assert cache.get("a") is None
