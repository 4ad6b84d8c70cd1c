"""Prompts as Wan reads them: cleaned, then cut into the tokens of UMT5.

Needs the packages of the extra `text`; they are imported when the first prompt comes.
"""

from __future__ import annotations

import html
import logging
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import BackendError, EngineError, PromptError

_log = logging.getLogger(__name__)
INSTALL = "pip install 'asd-rt[text]'"


def import_extra(name: str) -> ModuleType:
    """A package of the extra `text`.

    Raises:
        BackendError: it cannot be imported; says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise BackendError(
            f"reading prompts needs the package {name}, which cannot be imported ({error}); {INSTALL}"
        ) from error


def clean_prompt(prompt: str) -> str:
    """`prompt` with broken characters mended, HTML entities (even doubly escaped) resolved, blanks collapsed.

    The same cleaning as in Wan's training: a prompt that differs in nothing else gives the same tokens.

    Raises:
        PromptError: no text, or characters that no encoding can hold.
        BackendError: ftfy is not installed.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"the prompt must be text, found {type(prompt).__name__}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt is not valid Unicode (character {error.start}: {error.reason}); type it as UTF-8"
        ) from error
    mended: str = import_extra("ftfy").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(mended)).split())


class PromptTokenizer:
    """A tokenizer.json, with truncation that keeps the end token."""

    def __init__(self, file: Path, max_tokens: int) -> None:
        """Read `file`; prompts become at most `max_tokens` tokens, the end token included.

        Raises:
            EngineError: it is no tokenizer.
            BackendError: the package tokenizers is not installed.
        """
        library = import_extra("tokenizers")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain exceptions of Rust
            raise EngineError(f"{file}: cannot be read as a tokenizer.json ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_tokens = max_tokens

    def tokens(self, cleaned: str) -> NDArray[np.int64]:
        """Token ids of a cleaned prompt, int64 [1, n], 1 <= n <= max_tokens; the end token comes last."""
        ids = self._tokenizer.encode(cleaned).ids
        if len(ids) > self._max_tokens:
            kept = self._max_tokens - 1
            _log.warning("the prompt has %d tokens; only the first %d count", len(ids) - 1, kept)
            ids = [*ids[:kept], ids[-1]]
        return np.array([ids], np.int64)
