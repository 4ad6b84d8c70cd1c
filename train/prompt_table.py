"""Embeddings of prompts, found by their text and read one by one: a file of them is larger than memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asd_rt.config import ModelConfig
from asd_rt.errors import ConfigError


class PromptTable:
    """An embeddings file of `asd-rt encode`."""

    def __init__(self, path: Path, model: ModelConfig, name: str) -> None:
        """Open a file.

        Args:
            path: of it.
            model: the network that is to understand the embeddings.
            name: of the setting that names the file, for errors.

        Raises:
            ConfigError: it is absent, damaged, or of another network.
        """
        self._where = f"{name} {path}"
        self._text_len = model.text_len
        again = "make it with asd-rt encode"
        if not path.is_file():
            raise ConfigError(f"{self._where}: no such file; {again}")
        try:
            file = safe_open(str(path), "pt")
            self._values = file.get_slice("context")
            shape = self._values.get_shape()
            self.prompts: list[str] = list(json.loads((file.metadata() or {})["prompts"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._where}: is no whole file of embeddings with their prompts ({error}); {again}"
            ) from error
        if len(shape) != 3 or shape[0] != len(self.prompts) or not self.prompts:
            raise ConfigError(
                f"{self._where}: context must be [prompts, tokens, text_dim] of {len(self.prompts)} prompts, "
                f"found {list(shape)}; {again}"
            )
        if shape[1] > model.text_len or shape[2] != model.text_dim:
            raise ConfigError(
                f"{self._where}: holds {shape[1]} tokens of {shape[2]} numbers, the network takes at most "
                f"{model.text_len} of {model.text_dim}; encode the prompts with its text encoder"
            )
        self._rows = {prompt: row for row, prompt in enumerate(self.prompts)}

    def rows(self, prompts: Sequence[str], source: str) -> list[int]:
        """Where the embeddings of `prompts` are.

        Raises:
            ConfigError: some are not there; `source` names what they are of.
        """
        lost = [prompt for prompt in prompts if prompt not in self._rows]
        if lost:
            raise ConfigError(
                f"{self._where}: holds no embedding of {len(lost)} of {len(prompts)} {source}, the first is "
                f"{lost[0][:60]!r}; encode them too: asd-rt encode --prompts FILE"
            )
        return [self._rows[prompt] for prompt in prompts]

    def contexts(self, rows: Sequence[int]) -> Tensor:
        """Embeddings float32 [rows, text_len, text_dim], zero behind each prompt's tokens."""
        found = torch.cat([self._values[row : row + 1].float() for row in rows])
        return F.pad(found, (0, 0, 0, self._text_len - found.shape[1]))
