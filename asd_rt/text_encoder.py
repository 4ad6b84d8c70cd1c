"""The UMT5 text encoder of an engine: a prompt in, its embedding out, by ONNX Runtime on the CPU.

It is apart from the backend: it runs once per prompt, serves engines of every backend, and is far larger than
what streams. Its weights are mapped from their file, not read into memory, and are widened to float32 one
matrix at a time. Only where it is a plan itself, the engine runs it.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import Engine
from asd_rt.backends.ort import CPU_PROVIDER, import_onnxruntime
from asd_rt.backends.ort_denoiser import run_errors
from asd_rt.errors import BackendError, EngineError
from asd_rt.machine import usable_cores
from asd_rt.manifest import (
    REBUILD_TEXT,
    Manifest,
    check_part,
    is_text_plan,
    late_parts,
    manifest_path,
    part_path,
)
from asd_rt.prompt_cache import PromptCache
from asd_rt.prompts import PromptTokenizer, clean_prompt

RELEASE_BYTES = 1 << 30  # of weights; a larger encoder is released after each prompt
_log = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]


class TextEncoder:
    """Loaded when the first prompt comes that is not remembered; can be loaded again after `release`."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        threads: int | None = None,
        keep: bool | None = None,
        engine: Engine | None = None,
    ) -> None:
        """The text encoder of the engine at `path`.

        Args:
            path: the engine file.
            manifest: of the engine.
            threads: None = usable cores.
            keep: stay loaded between prompts; None = when the weights are at most 1 GB.
            engine: opened at `path`, which runs a plan; without it only `tokens` serves then.

        Raises:
            EngineError: the engine has no UMT5 text encoder, or a file of it is absent.
            BackendError: a package is absent.
        """
        if not late_parts(manifest):
            raise EngineError(f"{manifest_path(path)}: describes no UMT5 text encoder")
        for name in late_parts(manifest):
            file = part_path(path, manifest, name)
            if not file.is_file():
                raise EngineError(
                    f"{file}: the {name} part is absent; copy it from where the engine was built, build it "
                    f"again with: {REBUILD_TEXT}, or give embeddings: asd-rt run --prompt-embeds FILE"
                )
        self._path, self._manifest = path, manifest
        self._threads = threads or usable_cores()
        self._plan = is_text_plan(manifest)
        self._engine, self._is_checked = engine, False
        size = manifest.parts["text" if self._plan else "text_weights"].bytes
        self._keep = size <= RELEASE_BYTES if keep is None else keep
        self._max_tokens: int = (manifest.tokenizer or {})["max_tokens"]
        self._tokenizer: PromptTokenizer | None = None
        self._session: Any = None
        hashes = [manifest.parts[name].sha256 for name in late_parts(manifest)]
        self._cache = PromptCache(" ".join([*hashes, str(self._max_tokens)]))

    def encode(self, prompt: str) -> FloatArray:
        """The embedding of `prompt`, float32 [1, tokens, text_dim]; what lies behind its tokens is zero.

        Equal prompts after cleaning come from a cache on disk. Of a long prompt the first tokens count.

        Raises:
            PromptError: no text.
            EngineError: a file of the encoder is damaged.
            BackendError: a package is absent, or memory does not suffice.
        """
        cleaned = clean_prompt(prompt)
        known = self._cache.get(cleaned)
        if known is not None and known.shape[2] == self._manifest.model.text_dim:
            return known
        tokens = self.tokens(prompt)
        context = self._run_plan(tokens) if self._plan else self._run_graph(tokens)
        result = np.asarray(context, np.float32)
        self._cache.put(cleaned, result)
        return result

    def _run_graph(self, tokens: NDArray[np.int64]) -> NDArray[Any]:
        with run_errors(f"{self._path}: text"):
            (context,) = self._load().run(
                ["context"], {"tokens": tokens, "mask": np.ones_like(tokens)}
            )
        if not self._keep:
            self.release()
        return np.asarray(context)

    def _run_plan(self, tokens: NDArray[np.int64]) -> FloatArray:
        if self._engine is None:
            raise BackendError(f"{self._path}: its text encoder is a plan; open the engine for it")
        if not self._is_checked:
            check_part(self._path, self._manifest, "text")
            self._is_checked = True
        return self._engine.encode_prompt(tokens)

    def tokens(self, prompt: str) -> NDArray[np.int64]:
        """Token ids of `prompt`, int64 [1, n], the end token last.

        Raises:
            As `encode`.
        """
        cleaned = clean_prompt(prompt)
        if self._tokenizer is None:
            check_part(self._path, self._manifest, "tokenizer")
            file = part_path(self._path, self._manifest, "tokenizer")
            self._tokenizer = PromptTokenizer(file, self._max_tokens)
        return self._tokenizer.tokens(cleaned)

    def _load(self) -> Any:
        """The session, created when there is none."""
        if self._session is not None:
            return self._session
        if not self._is_checked:  # gigabytes, once and not for every prompt that loads them again
            for name in ("text", "text_weights"):
                check_part(self._path, self._manifest, name)
            self._is_checked = True
        file = part_path(self._path, self._manifest, "text")
        self._session = open_text_session(file, self._threads)
        _log.info("loaded %s", file)
        return self._session

    def release(self) -> None:
        """Give its memory back; the next prompt loads it again."""
        self._session = None
        gc.collect()

    def __enter__(self) -> TextEncoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def open_text_session(file: Path, threads: int) -> Any:
    """The ONNX Runtime session of a text part, whose weights lie beside it.

    Raises:
        EngineError: it cannot be loaded.
        BackendError: ONNX Runtime is absent.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Weights stay in their file. Folding their casts, packing them, or casting all of them before the
    # first is used would take the float32 size of the whole network in memory.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    try:
        return ort.InferenceSession(str(file), options, providers=[CPU_PROVIDER])
    except Exception as error:  # its exceptions share no base class; none may reach the user raw
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineError(
            f"{file}: ONNX Runtime {ort.__version__} cannot load the text part ({first_line}); build it "
            f"again with: {REBUILD_TEXT}"
        ) from error
