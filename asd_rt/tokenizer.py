"""Prompts to token ids, by the vocabulary in an engine's manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import PromptError

FILLER = 0
_NOT_WORD = re.compile(r"[\W_]+")


def tokenize(prompt: str, words: Mapping[str, int], text_len: int) -> NDArray[np.int64]:
    """Token ids of `prompt`, zero-padded, int64 [1, text_len].

    Case and punctuation do not matter. Words of id 0 are fillers, which say nothing and take no place.

    Args:
        prompt: plain English in the vocabulary's words.
        words: word -> token id.
        text_len: places of the result.

    Raises:
        PromptError: an unknown word, nothing but fillers, or more words than places.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"the prompt must be text, found {type(prompt).__name__}")
    found = _NOT_WORD.sub(" ", prompt.lower()).split()
    unknown = [word for word in dict.fromkeys(found) if word not in words]
    if unknown:
        noun = "words" if len(unknown) > 1 else "word"
        raise PromptError(
            f"prompt {_one_line(prompt)}: unknown {noun} {', '.join(unknown)}; "
            f"this engine knows: {_listing(words)}"
        )
    ids = [words[word] for word in found if words[word] != FILLER]
    if not ids:
        raise PromptError(
            f"prompt {_one_line(prompt)}: says nothing to draw; this engine knows: {_listing(words)}"
        )
    if len(ids) > text_len:
        raise PromptError(
            f"prompt {_one_line(prompt)}: {len(ids)} words that count, this engine takes at most "
            f"{text_len}; shorten it"
        )
    tokens = np.zeros((1, text_len), np.int64)
    tokens[0, : len(ids)] = ids
    return tokens


def _listing(words: Mapping[str, int]) -> str:
    """Words with a meaning in the order of their ids, synonyms beside each other; then the fillers."""
    meaningful = sorted((w for w in words if words[w] != FILLER), key=words.__getitem__)
    fillers = [w for w in words if words[w] == FILLER]
    return ", ".join(meaningful) + (f"; and fillers: {', '.join(fillers)}" if fillers else "")


def _one_line(prompt: str, longest: int = 60) -> str:
    """The prompt in quotes, on one line, shortened."""
    text = " ".join(prompt.split())
    return repr(text if len(text) <= longest else text[: longest - 3] + "...")
