"""Which files a checkpoint consists of: a folder, a file, or shards with an index."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_rt.errors import CheckpointError
from asd_rt.progress import Progress

CONFIG, DEPLOYMENT = "config.json", "deployment.json"
CODEC, TEXT = "codec.safetensors", "text_encoder.safetensors"
INDEX_SUFFIX = ".index.json"
WEIGHT_NAMES = tuple(
    f"{stem}.safetensors{suffix}"
    for stem in ("model", "diffusion_pytorch_model")
    for suffix in ("", INDEX_SUFFIX)
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".gguf")
HASH_BYTES = 4 << 20
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
KNOWN = (
    f"a checkpoint is a folder with {CONFIG} and {WEIGHT_NAMES[0]} or {WEIGHT_NAMES[2]} (or shards with "
    "their index), a diffusers folder, or one .safetensors, .pt or .pth file"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint lies.

    Attributes:
        name: to call it by.
        path: the one weights file, or the index of several; what errors name.
        weights: the files that hold tensors, in order.
        listed: tensor -> its file, as the index says; None without an index.
        folder: where config.json and the parts of our own folders are looked for; None = a file on its own.
    """

    name: str
    path: Path
    weights: tuple[Path, ...]
    listed: Mapping[str, Path] | None
    folder: Path | None

    @property
    def config(self) -> Path | None:
        """config.json, where there is one."""
        path = None if self.folder is None else self.folder / CONFIG
        return path if path is not None and path.is_file() else None


def locate(path: Path) -> Place:
    """The files of the checkpoint at `path`, a folder or a file.

    A file under one of the usual names with a config.json beside it stands for its folder; any other file
    stands for itself.

    Raises:
        CheckpointError: nothing there, nothing that could be a checkpoint, or more than one.
    """
    try:
        if path.is_dir():
            return _in_folder(path, path.resolve().name)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not path.is_file():
        raise CheckpointError(f"{path}: no such folder or file; {KNOWN}")
    if path.name in WEIGHT_NAMES and (path.parent / CONFIG).is_file():
        return _place(path, path.parent.resolve().name, path.parent)
    if path.suffix == ".json" and not path.name.endswith(INDEX_SUFFIX):
        raise CheckpointError(
            f"{path}: holds no weights; give its folder: --checkpoint {path.parent}"
        )
    return _place(path, path.name.removesuffix(INDEX_SUFFIX).rpartition(".")[0] or path.name, None)


def _in_folder(folder: Path, name: str) -> Place:
    usual = [folder / name for name in WEIGHT_NAMES if (folder / name).is_file()]
    if not usual and (folder / "transformer").is_dir():
        if (folder / "transformer_2").is_dir():
            raise CheckpointError(
                f"{folder}: holds transformer and transformer_2 (Wan2.2 with two networks), which cannot run "
                f"as one; name the one that is meant: --checkpoint {folder / 'transformer'}"
            )
        return _in_folder(folder / "transformer", name)
    found = usual or sorted(
        path
        for path in folder.iterdir()
        if path.suffix in SUFFIXES and path.name not in (CODEC, TEXT) and path.is_file()
    )
    if not found:
        raise CheckpointError(
            f"{folder}: {WEIGHT_NAMES[0]} missing, and no other weights there; {KNOWN}"
        )
    if len(found) > 1 and all(SHARD.search(path.name) for path in found):
        stem = SHARD.split(found[0].name)[0]
        raise CheckpointError(
            f"{folder}: {len(found)} shards without their index {stem}.safetensors{INDEX_SUFFIX}; copy or "
            "download that too"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(
            f"{folder}: several files with weights ({names}); name the one that is meant: "
            f"--checkpoint {folder}/NAME"
        )
    return _place(found[0], name, folder)


def _place(path: Path, name: str, folder: Path | None) -> Place:
    if not path.name.endswith(INDEX_SUFFIX):
        return Place(name, path, (path,), None, folder)
    listed = _read_index(path)
    return Place(name, path, tuple(sorted(set(listed.values()))), listed, folder)


def _read_index(path: Path) -> dict[str, Path]:
    """Tensor -> file of a safetensors index, all files present."""
    listed = read_json(path).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(f, str) and Path(f).name == f for f in listed.values())
    ):
        raise CheckpointError(
            f"{path}: expected a weight_map from tensor names to file names in the same folder; copy or "
            "download it again"
        )
    absent = [name for name in sorted(set(listed.values())) if not (path.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{path}: names {len(absent)} of {len(set(listed.values()))} files that are not there: "
            f"{', '.join(absent)}; copy or download them too"
        )
    return {name: path.parent / file for name, file in listed.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def digest(place: Place) -> str:
    """Of a file on its own its sha256; else sha256 over name and sha256 of each file of the checkpoint."""
    if place.folder is None and place.listed is None:
        return _sha256(place.path)
    paths = list(place.weights)
    if place.listed is not None:
        paths.append(place.path)
    if place.folder is not None:
        paths = [
            place.folder / CONFIG,
            *paths,
            *(place.folder / n for n in (DEPLOYMENT, CODEC, TEXT)),
        ]
    whole = hashlib.sha256()
    for path in paths:
        if path.exists():
            whole.update(f"{path.name} {_sha256(path)}\n".encode())
    return whole.hexdigest()


def _sha256(path: Path) -> str:
    """sha256 of a file, with progress."""
    found = hashlib.sha256()
    steps = -(-path.stat().st_size // HASH_BYTES)
    with path.open("rb") as file, Progress(f"reading {path.name}", steps) as progress:
        while chunk := file.read(HASH_BYTES):
            found.update(chunk)
            progress.advance()
    return found.hexdigest()
