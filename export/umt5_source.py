"""UMT5 text encoders on disk: where their files lie, in which formats, and that all of them fits.

| folder | files |
|---|---|
| diffusers | text_encoder/{config.json, model*.safetensors}, tokenizer/tokenizer.json |
| transformers | config.json, model*.safetensors (one, or shards with an index), tokenizer.json |
| Wan's own | models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/tokenizer.json |

Instead of tokenizer.json there may be spiece.model, which transformers converts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from asd_rt.errors import CheckpointError, ConfigError
from export.umt5 import TABLE, Umt5Config, is_matrix
from export.umt5_tokenizer import find_tokenizer
from train.formats.tensors import Stored, open_file

MAX_LISTED = 20
FLOAT_TYPES = ("F32", "F16", "BF16")
OFFICIAL = "models_t5*.pth"
INDEX = "model.safetensors.index.json"
LAYOUTS = (
    "a transformers folder (config.json, *.safetensors, tokenizer.json), a diffusers folder "
    f"(text_encoder/, tokenizer/), or Wan's own ({OFFICIAL}, google/umt5-xxl/tokenizer.json)"
)

# Official name and transformers' name of each weight; N is the layer.
_NAMES = {
    "blocks.N.norm1": "encoder.block.N.layer.0.layer_norm",
    "blocks.N.pos_embedding.embedding": "encoder.block.N.layer.0.SelfAttention.relative_attention_bias",
    **{f"blocks.N.attn.{name}": f"encoder.block.N.layer.0.SelfAttention.{name}" for name in "qkvo"},
    "blocks.N.norm2": "encoder.block.N.layer.1.layer_norm",
    "blocks.N.ffn.gate.0": "encoder.block.N.layer.1.DenseReluDense.wi_0",
    "blocks.N.ffn.fc1": "encoder.block.N.layer.1.DenseReluDense.wi_1",
    "blocks.N.ffn.fc2": "encoder.block.N.layer.1.DenseReluDense.wo",
    "norm": "encoder.final_layer_norm",
    TABLE: "shared",
}
# Of a whole UMT5: its decoder, and second names of the token embedding.
_NOT_NEEDED = re.compile(r"(decoder\.|lm_head\.).*|encoder\.embed_tokens\.weight")
_QUANTISED = re.compile(
    r".*(scaled_fp8|scale_weight|_scale|scale_input|int8_weight|\.SCB|absmax).*"
)
_KNOWN_SETTINGS = {f.name for f in fields(Umt5Config)}


@dataclass(frozen=True, slots=True, eq=False)
class Umt5Source(Mapping[str, Tensor]):
    """A text encoder on disk, complete and checked: weights by their names in `Umt5Config.shapes`.

    A weight is read when it is asked for, and is of the type it is stored in.

    Attributes:
        name: of its folder.
        sha256: over names and contents of its files.
        config: of the encoder.
        tokenizer: content of a tokenizer.json.
        is_half: whether all matrices are stored in 16 bits.
    """

    name: str
    sha256: str
    config: Umt5Config
    tokenizer: bytes
    is_half: bool
    _read: Mapping[str, Callable[[], Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        value = self._read[name]()
        return value.T if ".attn." in name or ".ffn." in name else value

    def __contains__(self, name: object) -> bool:  # a Mapping's would read the weight
        return name in self._read

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def open_umt5(folder: Path) -> Umt5Source:
    """Find and check a text encoder; its weights are read when they are asked for.

    Args:
        folder: of one of the layouts above.

    Raises:
        CheckpointError: no text encoder, another kind of one, no tokenizer, or a file that is damaged; or
            weights that are missing, extra, misshapen or quantised (all in one message).
        ConfigError: config.json has impossible values.
    """
    official, config_file = _find(folder)
    settings = None if config_file is None else _read_config(config_file)
    files = official if config_file is None else _safetensors(config_file.parent)
    tensors: dict[str, Stored] = {}
    for file in files:
        tensors |= open_file(file).tensors
    where = str(files[0] if len(files) == 1 else files[0].parent)
    tensors = _official(where, tensors)
    config = settings or _config_of_shapes(where, tensors)
    _check(where, config, tensors)
    tokenizer_file, tokenizer = find_tokenizer(folder, config_file, config.vocab_size)
    digest = hashlib.sha256()
    for file in (*files, *([config_file] if config_file else [])):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    digest.update(f"{tokenizer_file.name} {hashlib.sha256(tokenizer).hexdigest()}\n".encode())
    needed = {name: tensors[_stored_name(name)] for name in config.shapes()}
    is_half = all("16" in tensor.dtype for name, tensor in needed.items() if is_matrix(name))
    readers = {name: tensor.read for name, tensor in needed.items()}
    name = folder.resolve().name
    return Umt5Source(name, digest.hexdigest(), config, tokenizer, is_half, readers)


def _find(folder: Path) -> tuple[list[Path], Path | None]:
    """Wan's own weight file, or the config.json of the other layouts."""
    if not folder.is_dir():
        raise CheckpointError(f"--text-encoder {folder}: no such folder; name {LAYOUTS}")
    official = sorted(folder.glob(OFFICIAL))
    if len(official) > 1:
        found = ", ".join(file.name for file in official)
        raise CheckpointError(f"{folder}: holds several text encoders, {found}; keep one")
    for place in (folder / "text_encoder", folder):
        config = place / "config.json"
        # In Wan's own folder, config.json is the denoiser's.
        if config.is_file() and not (place == folder and official):
            return [], config
    if official:
        return official, None
    raise CheckpointError(f"{folder}: holds no text encoder; name {LAYOUTS}")


def _safetensors(place: Path) -> list[Path]:
    index = place / INDEX
    if not index.is_file():
        files = sorted(place.glob("*.safetensors"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files[:4]) or "none"
            raise CheckpointError(
                f"{place}: expected model.safetensors, or shards with {INDEX}, found {found}; copy the "
                "whole folder (files of type .bin: save them again with safe_serialization)"
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: cannot be read as an index of shards ({error})") from error
    absent = [str(name) for name in names if not (place / str(name)).is_file()]
    if absent or not names:
        raise CheckpointError(
            f"{index}: names {', '.join(absent[:4]) or 'no files'}, absent from {place}; copy all shards"
        )
    return [place / str(name) for name in names]


def _stored_name(name: str) -> str:
    """Our name of a weight -> the official one ("blocks.0.ffn.gate" -> "blocks.0.ffn.gate.0.weight")."""
    if name.endswith("pos_embedding"):
        name += ".embedding"
    return f"{name}.0.weight" if name.endswith("ffn.gate") else f"{name}.weight"


def _official(where: str, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors by their official names; what an encoder does not need is left out."""
    quantised = [name for name in tensors if _QUANTISED.fullmatch(name)]
    if quantised:
        raise CheckpointError(
            f"{where}: is quantised ({quantised[0]}); name the fp16 or bf16 weights, and choose "
            "--text-precision int8 for a small file"
        )
    if "shared.weight" not in tensors and "encoder.embed_tokens.weight" in tensors:
        tensors = tensors | {"shared.weight": tensors["encoder.embed_tokens.weight"]}
    by_theirs = {theirs: ours for ours, theirs in _NAMES.items()}
    found = {}
    for name, tensor in tensors.items():
        if _NOT_NEEDED.fullmatch(name):
            continue
        layer = re.fullmatch(r"(encoder\.block\.)(\d+)(\..*)\.weight", name)
        pattern = f"{layer[1]}N{layer[3]}" if layer else name.removesuffix(".weight")
        ours = by_theirs.get(pattern)
        if ours is not None and name.endswith(".weight"):
            name = f"{ours.replace('.N.', f'.{layer[2]}.') if layer else ours}.weight"
        found[name] = tensor
    return found


def _read_config(file: Path) -> Umt5Config:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = values.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from error
    if kind != "umt5":
        raise CheckpointError(
            f"{file}: describes a model of type {kind!r}, expected 'umt5'; Wan's text encoder is UMT5, "
            f"in {LAYOUTS}"
        )
    feed_forward = values.get("feed_forward_proj", "gated-gelu")
    if feed_forward != "gated-gelu":
        raise CheckpointError(
            f"{file}: feed_forward_proj is {feed_forward!r}, only 'gated-gelu' can be exported"
        )
    known = {name: value for name, value in values.items() if name in _KNOWN_SETTINGS}
    try:
        return Umt5Config(**known)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{file}: {error}") from error


def _config_of_shapes(where: str, tensors: Mapping[str, Stored]) -> Umt5Config:
    layers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}

    def shape(name: str) -> tuple[int, ...]:
        found = tensors[name].shape if name in tensors else ()
        if len(found) != 2:
            raise CheckpointError(
                f"{where}: has no matrix {name}, so it is no UMT5 encoder; name {LAYOUTS}"
            )
        return found

    table, positions = shape(f"{TABLE}.weight"), shape("blocks.0.pos_embedding.embedding.weight")
    inner, wide = shape("blocks.0.attn.q.weight"), shape("blocks.0.ffn.fc1.weight")
    return Umt5Config(
        vocab_size=table[0],
        d_model=table[1],
        d_kv=inner[0] // max(positions[1], 1),
        d_ff=wide[0],
        num_layers=max(layers) + 1,
        num_heads=positions[1],
        relative_attention_num_buckets=positions[0],
    )


def _check(where: str, config: Umt5Config, tensors: Mapping[str, Stored]) -> None:
    """Raise one CheckpointError that lists every missing, extra, misshapen or wrongly typed weight."""
    expected = {}
    for name, shape in config.shapes().items():
        expected[_stored_name(name)] = shape[::-1] if ".attn." in name or ".ffn." in name else shape
    problems = [
        f"{name} missing {list(shape)}" for name, shape in expected.items() if name not in tensors
    ]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name} extra {list(tensor.shape)}")
        elif tensor.shape != expected[name]:
            problems.append(
                f"{name} misshapen: expected {list(expected[name])}, found {list(tensor.shape)}"
            )
        elif tensor.dtype not in FLOAT_TYPES:
            problems.append(f"{name} of type {tensor.dtype}: expected {', '.join(FLOAT_TYPES)}")
    if problems:
        more = [] if len(problems) <= MAX_LISTED else [f"and {len(problems) - MAX_LISTED} more"]
        raise CheckpointError(
            f"{where}: {len(problems)} of {len(expected)} weights do not fit this UMT5 encoder: "
            + "; ".join(problems[:MAX_LISTED] + more)
        )
