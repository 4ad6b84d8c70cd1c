"""The tokenizer of a text encoder, as the tokenizer.json that the runtime reads."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from asd_rt.errors import CheckpointError
from asd_rt.prompts import import_extra

JSON, SENTENCEPIECE = "tokenizer.json", ("spiece.model", "sentencepiece.bpe.model")
END = "</s>"


def find_tokenizer(folder: Path, config_file: Path | None, vocab_size: int) -> tuple[Path, bytes]:
    """The tokenizer of a text encoder: the file that it comes from, and the content of a tokenizer.json.

    It is looked for in `folder`, beside the weights, in tokenizer/ under or beside them, and in google/*/.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another model.
    """
    beside = folder if config_file is None else config_file.parent
    places = [
        beside,
        folder,
        folder / "tokenizer",
        folder.resolve().parent / "tokenizer",
        *sorted(folder.glob("google/*")),
    ]
    for name in (JSON, *SENTENCEPIECE):
        for place in places:
            file = place / name
            if file.is_file():
                content = file.read_bytes() if name == JSON else _convert(file)
                _check(file, content, vocab_size)
                return file, content
    raise CheckpointError(
        f"{folder}: no tokenizer, neither {JSON} nor {SENTENCEPIECE[0]} there, in tokenizer/ under or beside "
        "it, or in google/umt5-xxl/; copy it from the same model"
    )


def _convert(file: Path) -> bytes:
    """A sentencepiece model as a tokenizer.json, by transformers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: the file is all there is
    try:
        from transformers import T5Tokenizer

        with tempfile.TemporaryDirectory() as scratch:
            T5Tokenizer.from_pretrained(str(file.parent), extra_ids=0).save_pretrained(scratch)
            return (Path(scratch) / JSON).read_bytes()
    except Exception as error:  # of many libraries, without a common base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file}: cannot be converted to {JSON} ({reason}); install transformers and sentencepiece, or "
            f"put the model's {JSON} beside it"
        ) from error


def _check(file: Path, content: bytes, vocab_size: int) -> None:
    library = import_extra("tokenizers")
    try:
        tokenizer = library.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain exceptions of Rust
        raise CheckpointError(
            f"{file}: cannot be read as a tokenizer ({error}); copy it again"
        ) from error
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END)
    if size > vocab_size:
        raise CheckpointError(
            f"{file}: has {size} tokens, the text encoder {vocab_size}; take the tokenizer of its model"
        )
    if end is None or tokenizer.encode("").ids != [end]:
        raise CheckpointError(
            f"{file}: does not end prompts with {END}, as UMT5's does; take the tokenizer of the same model"
        )
