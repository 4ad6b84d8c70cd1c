"""The manifest of an engine: what the files beside it are, and that they are what was built.

`docs/engine.md` describes the schema. Everything read is checked, unknown fields included, so that a
manifest edited by hand or written by another version is one clear line and never a wrong video.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from asd_rt.errors import AsdError, EngineError
from asd_rt.manifest_schema import (
    FORMAT_VERSION,
    UMT5_PARTS,
    Manifest,
    Part,
    TensorSpec,
    from_json,
)

__all__ = [
    "FORMAT_VERSION",
    "REBUILD",
    "REBUILD_TEXT",
    "SEAL",
    "Manifest",
    "Part",
    "TensorSpec",
    "accuracy_warning",
    "check_part",
    "from_json",
    "is_text_plan",
    "late_parts",
    "manifest_path",
    "part_path",
    "read_manifest",
    "sha256_file",
    "verify",
    "write_manifest",
]

REBUILD = "python -m export.build --steps 1 --force"
REBUILD_TEXT = "python -m export.build --text-encoder FOLDER"
SEAL = "content_sha256"  # of everything else in a manifest, last in the file
_CHUNK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


def manifest_path(engine_path: str | Path) -> Path:
    """`asd_fp32.onnx` -> `asd_fp32.onnx.json`."""
    return Path(f"{engine_path}.json")


def part_path(engine_path: str | Path, manifest: Manifest, part: str) -> Path:
    """Where the file of `part` lies.

    Raises:
        EngineError: the engine has no such part.
    """
    if part not in manifest.parts:
        raise EngineError(
            f"{engine_path}: has no {part} part, only {', '.join(manifest.parts)}; "
            f"build it from a checkpoint that has one: {REBUILD}"
        )
    return Path(engine_path).parent / manifest.parts[part].file


def late_parts(manifest: Manifest) -> tuple[str, ...]:
    """Parts that are opened, and verified, when they are first used: a text encoder of gigabytes.

    An engine whose prompts come as embeddings runs without their files.
    """
    umt5 = manifest.tokenizer is not None and manifest.tokenizer["kind"] == "umt5"
    return tuple(name for name in UMT5_PARTS if name in manifest.parts) if umt5 else ()


def is_text_plan(manifest: Manifest) -> bool:
    """Whether a UMT5 text encoder is a plan, which the engine runs on its card."""
    text = manifest.parts.get("text")
    return text is not None and bool(late_parts(manifest)) and text.file.endswith(".plan")


def accuracy_warning(engine_path: str | Path, manifest: Manifest) -> str | None:
    """What is to be said of an engine that its build found inaccurate; None of others."""
    missed = manifest.parity.get("inaccurate")
    if not missed:
        return None
    told = "; ".join(map(str, missed)) if isinstance(missed, list) else str(missed)
    return (
        f"{engine_path}: INACCURATE: it missed its parity budget and was built all the same, with "
        f"--allow-inaccurate ({told}); its videos may be wrong"
    )


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, read in small pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(engine_path: str | Path) -> Manifest:
    """Read and check the manifest beside `engine_path`; the files it names are checked by `verify`.

    Raises:
        EngineError: engine or manifest is absent, the manifest is not JSON, is of another
            format_version, has unknown, missing or impossible fields, or was edited by hand.
    """
    engine, path = Path(engine_path), manifest_path(engine_path)
    if engine.suffix == ".json" and not path.exists():
        raise EngineError(
            f"{engine}: is a manifest; name the engine beside it, {engine.with_suffix('')}"
        )
    if not engine.is_file():
        found = "a folder" if engine.is_dir() else "nothing"
        raise EngineError(
            f"{engine}: expected an engine file, found {found}; build one with: {REBUILD}"
        )
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise EngineError(
            f"{path}: no manifest beside the engine; copy it from where the engine was built, or build "
            f"again with: {REBUILD}"
        ) from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EngineError(
            f"{path}: not valid JSON ({error}); build it again with: {REBUILD}"
        ) from error
    told = document.pop(SEAL, None) if isinstance(document, dict) else None
    try:
        manifest = from_json(document)
    except AsdError as error:
        raise EngineError(f"{path}: {error}; build it again with: {REBUILD}") from error
    found = _seal(document)
    if told != found:
        raise EngineError(
            f"{path}: was edited after it was written: its {SEAL} says {str(told)[:16]}..., its content has "
            f"{found[:16]}...; copy it again, or build it again with the flags that you want: {REBUILD}"
        )
    return manifest


def _seal(document: Mapping[str, object]) -> str:
    """SHA-256 of a manifest's content, however it is spelled: an edit is told from the build's own word.

    It guards against mistakes, not against somebody who computes it anew.
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(engine_path: str | Path, manifest: Manifest) -> Path:
    """Write the manifest beside `engine_path`, whole or not at all; returns its path.

    Raises:
        EngineError: the folder cannot be written.
    """
    path = manifest_path(engine_path)
    document = manifest.to_json()
    text = json.dumps(document | {SEAL: _seal(document)}, indent=2, allow_nan=False) + "\n"
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            temporary = file.name
            file.write(text)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise EngineError(
            f"{path}: cannot be written: {error.strerror}; choose another folder"
        ) from error
    _log.info("wrote %s", path)
    return path


def verify(engine_path: str | Path, manifest: Manifest, skip: Collection[str] = ()) -> None:
    """Check that every part but those of `skip` exists with the size and the hash it was built with.

    Raises:
        EngineError: the first part that does not match: what, where, expected, found.
    """
    if manifest.parts["denoiser"].file != Path(engine_path).name:
        raise EngineError(
            f"{manifest_path(engine_path)}: describes {manifest.parts['denoiser'].file}, expected "
            f"{Path(engine_path).name}; rename the files back, or build again with: {REBUILD}"
        )
    for part in manifest.parts:
        if part not in skip:
            check_part(engine_path, manifest, part)


def check_part(engine_path: str | Path, manifest: Manifest, name: str) -> None:
    """Check that the file of one part has the size and the hash it was built with.

    Raises:
        EngineError: it has not: what, where, expected, found.
    """
    path, part = part_path(engine_path, manifest, name), manifest.parts[name]
    rebuild = REBUILD_TEXT if name in late_parts(manifest) else REBUILD
    try:
        size = path.stat().st_size
        if size != part.bytes:
            raise EngineError(
                f"{path}: damaged {name} part: expected {part.bytes} bytes, found {size}; copy it again, or "
                f"build it again with: {rebuild}"
            )
        digest = sha256_file(path)
    except OSError as error:
        raise EngineError(
            f"{path}: the {name} part cannot be read: {error.strerror}; copy it from where the engine was "
            f"built, or build it again with: {rebuild}"
        ) from error
    if digest != part.sha256:
        raise EngineError(
            f"{path}: damaged {name} part: expected sha256 {part.sha256[:16]}..., found {digest[:16]}...; "
            f"copy it again, or build it again with: {rebuild}"
        )
