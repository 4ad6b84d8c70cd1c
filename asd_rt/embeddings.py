"""Embeddings files: prompts that are encoded already, for machines and engines without a text encoder.

A safetensors file with `context` [prompts, tokens, text_dim] float32 or float16, zero behind each prompt's
tokens; `tokens` int64 [prompts], how many they are (all where it is absent); and in the metadata `prompts`,
a JSON list of texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from asd_rt.config import ModelConfig
from asd_rt.errors import ConfigError
from asd_rt.files import replacing

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """What an embeddings file holds.

    Attributes:
        where: the file, for errors.
        values: [prompts, tokens, text_dim], float32 or float16.
        tokens: int64 [prompts].
        prompts: their texts; empty where the file does not say.
    """

    where: str
    values: NDArray[Any]
    tokens: NDArray[np.int64]
    prompts: list[str]

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError when they are not for a network of `model`."""
        _, _, text_dim = self.values.shape
        longest = int(self.tokens.max())
        if text_dim != model.text_dim or longest > model.text_len:
            raise ConfigError(
                f"{self.where}: holds {longest} tokens of {text_dim} numbers, the engine takes at most "
                f"{model.text_len} of {model.text_dim}; encode the prompts with this engine's text encoder"
            )

    def context(self, index: int) -> FloatArray:
        """Embedding of one prompt, float32 [1, its tokens, text_dim].

        Raises:
            ConfigError: there is no such prompt, or its values are not finite.
        """
        self._check_index(index)
        found = self.values[index : index + 1, : self.tokens[index]].astype(np.float32)
        if not np.isfinite(found).all():
            raise ConfigError(f"{self.where}: prompt {index} has values that are not finite")
        return found

    def prompt(self, index: int) -> str | None:
        """Text of one prompt, None where the file does not say."""
        return self.prompts[index] if self.prompts else None

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self.values):
            raise ConfigError(
                f"{self.where}: has no prompt {index}, only 0 to {len(self.values) - 1}; choose with "
                "--prompt-index"
            )


def read_embeddings(path: str | Path, flag: str) -> Embeddings:
    """Read an embeddings file; `flag` names it in errors.

    Raises:
        ConfigError: it is absent, damaged, or holds something else.
    """
    where = f"{flag} {path}"
    if not Path(path).is_file():
        raise ConfigError(f"{where}: no such file; make one with asd-rt encode")
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if "context" not in names:
                raise ConfigError(
                    f"{where}: has no tensor context, only {', '.join(sorted(names)) or 'nothing'}; make "
                    "one with asd-rt encode"
                )
            values = file.get_tensor("context")
            tokens = file.get_tensor("tokens") if "tokens" in names else None
            listed = (file.metadata() or {}).get("prompts", "[]")
    except (SafetensorError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{where}: cannot be read as safetensors, perhaps cut short ({error}); make it again with "
            "asd-rt encode"
        ) from error
    if values.ndim != 3 or 0 in values.shape or values.dtype not in (np.float32, np.float16):
        raise ConfigError(
            f"{where}: context must be float32 or float16 [prompts, tokens, text_dim], found "
            f"{values.dtype} {list(values.shape)}"
        )
    count, longest, _ = values.shape
    if tokens is None:
        tokens = np.full(count, longest, np.int64)
    good = tokens.shape == (count,) and np.issubdtype(tokens.dtype, np.integer)
    if not good or tokens.min() < 1 or tokens.max() > longest:
        raise ConfigError(
            f"{where}: tokens must be {count} whole numbers from 1 to {longest}, found {tokens.tolist()}"
        )
    return Embeddings(where, values, tokens.astype(np.int64), _prompts(where, listed, count))


def _prompts(where: str, listed: str, count: int) -> list[str]:
    try:
        prompts = json.loads(listed)
    except ValueError as error:
        raise ConfigError(f"{where}: its list of prompts is not JSON ({error})") from error
    good = isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)
    if not good or len(prompts) not in (0, count):
        raise ConfigError(f"{where}: its list of prompts must hold {count} texts")
    return [str(prompt) for prompt in prompts]


def write_embeddings(
    path: str | Path, contexts: Sequence[FloatArray], prompts: Sequence[str], half: bool = False
) -> None:
    """Write an embeddings file, whole or not at all.

    Args:
        path: to write to.
        contexts: one [1, tokens, text_dim] per prompt.
        prompts: their texts.
        half: store float16.

    Raises:
        OutputError: it cannot be written.
        ConfigError: values too large for float16.
    """
    from safetensors.numpy import save_file

    tokens = np.array([context.shape[1] for context in contexts], np.int64)
    dtype = np.float16 if half else np.float32
    values = np.zeros((len(contexts), tokens.max(), contexts[0].shape[2]), dtype)
    for row, context in zip(values, contexts, strict=True):
        if half and np.abs(context).max() > np.finfo(np.float16).max:
            raise ConfigError("an embedding is too large for float16; use --dtype float32")
        row[: context.shape[1]] = context[0]
    metadata = {"prompts": json.dumps(list(prompts), ensure_ascii=False)}
    with replacing(path) as temporary:
        try:
            save_file({"context": values, "tokens": tokens}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
