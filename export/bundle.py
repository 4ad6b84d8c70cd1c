"""An engine's parts that come from elsewhere than its checkpoint: added, replaced and kept one at a time.

Their files are named after what they hold (`content_name`), so engines in one folder share them, and a new
file never takes the place of one that a manifest still names. The manifest goes last, by rename: until then
the engine is what it was.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from asd_rt.engines import list_engines
from asd_rt.errors import AsdError, EngineError
from asd_rt.manifest import (
    Manifest,
    Part,
    check_part,
    manifest_path,
    read_manifest,
    write_manifest,
)

# Fields of the manifest that belong to the parts of a source.
FIELDS = {"text": ("tokenizer",), "codec": ("codec",)}


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A temporary folder inside `out`; nothing of it stays behind.

    Raises:
        EngineError: something could not be written to it.
    """
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=out))
        yield scratch
    except OSError as error:
        raise EngineError(
            f"--out {out}: cannot be written ({error.strerror or error}); choose another folder or make room"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def added_parts(manifest: Manifest) -> set[str]:
    """Names of the parts that came from elsewhere than the checkpoint."""
    return {name for source in manifest.sources.values() for name in source["parts"]}


def added_fields(manifest: Manifest) -> set[str]:
    """Fields of the manifest that belong to those parts."""
    return {field for key in manifest.sources for field in FIELDS.get(key, ())}


def is_added(engine: Path, key: str, source: Mapping[str, Any]) -> bool:
    """Whether the parts of `source` are in the engine under `key`, undamaged."""
    try:
        manifest = read_manifest(engine)
        if manifest.sources.get(key) != source:
            return False
        for name in source["parts"]:
            check_part(engine, manifest, name)
    except AsdError:
        return False
    return True


def replace_parts(
    engine: Path,
    key: str,
    source: Mapping[str, Any],
    parts: Mapping[str, Part],
    parity: Mapping[str, Any],
    scratch: Path,
    **changes: Any,
) -> None:
    """Add parts to an engine, in the place of those of the same source or name; all others stay untouched.

    Args:
        engine: the engine file.
        key: of the source in the manifest ("text").
        source: {"name", "sha256", "parts", ...}: what would have to differ for the parts to be made again.
        parts: names as in `source["parts"]`.
        parity: figures of their gate.
        scratch: folder with the parts' files, inside the engine's; files that lie beside the engine with the
            same content already may be absent from it.
        changes: further fields of the manifest.

    Raises:
        EngineError: something cannot be written.
    """
    old = read_manifest(engine)
    gone = set(old.sources.get(key, {"parts": ()})["parts"]) | parts.keys()
    kept = {name: part for name, part in old.parts.items() if name not in gone}
    new = replace(
        old,
        parts=kept | dict(parts),
        parity=old.parity | {key: dict(parity)},
        sources=old.sources | {key: dict(source)},
        **changes,
    )
    try:
        for part in parts.values():
            if (scratch / part.file).exists():
                (scratch / part.file).chmod(0o644)
                (scratch / part.file).replace(engine.parent / part.file)
        write_manifest(engine, new)
    finally:
        everything = [*old.parts.values(), *parts.values()]
        remove_unnamed(engine.parent, {part.file for part in everything})


def carry_over(engine: Path, manifest: Manifest) -> Manifest:
    """`manifest` of a rebuilt engine, with the added parts of the engine that it takes the place of.

    Parts that the checkpoint brings itself now, and those for another network, are left behind.
    """
    try:
        old = read_manifest(engine)
    except AsdError:  # none there, or of no use
        return manifest
    for key, source in old.sources.items():
        mine = {name: old.parts[name] for name in source["parts"] if name in old.parts}
        whole = len(mine) == len(source["parts"]) and not mine.keys() & manifest.parts.keys()
        if not whole or not _fits(key, old, manifest):
            continue
        manifest = replace(
            manifest,
            parts={**manifest.parts, **mine},
            parity=manifest.parity | {key: old.parity.get(key, {})},
            sources=manifest.sources | {key: source},
            **{field: getattr(old, field) for field in FIELDS.get(key, ())},
        )
    return manifest


def _fits(key: str, old: Manifest, new: Manifest) -> bool:
    """Whether the parts of `old` under `key` serve `new`; those of a plan are for its cards and sizes."""
    if key == "text" and "text_log" not in old.sources[key]["parts"]:
        return old.model.text_dim == new.model.text_dim
    settings = ("backend", "gpus") if new.backend == "onnx" else ("backend", "gpus", "latent_hw")
    same = all(getattr(old, name) == getattr(new, name) for name in settings)
    if new.backend != "onnx":  # a plan serves one version of its builder
        same = same and old.tools.get(old.backend) == new.tools.get(new.backend)
        if key == "codec":  # and takes blocks of one size
            same = same and old.cache.block_frames == new.cache.block_frames
    sizes = ("text_dim", "text_len") if key == "text" else ("out_dim",)
    return same and all(getattr(old.model, n) == getattr(new.model, n) for n in sizes)


def remove_unnamed(folder: Path, files: Iterable[str]) -> None:
    """Delete those of `files` that no manifest in `folder` names any more."""
    manifests = [manifest_path(engine).read_text() for engine in list_engines(folder)]
    for file in files:
        if not any(f'"{file}"' in text for text in manifests):
            (folder / file).unlink(missing_ok=True)


def content_name(stem: str, content_sha256: str, suffix: str) -> str:
    """File name of an added part: "umt5_fp16" -> "umt5_fp16_1a2b3c4d.onnx"."""
    return f"{stem}_{content_sha256[:8]}{suffix}"


def write_part(
    folder: Path, stem: str, suffix: str, content: bytes | memoryview, **tensors: Any
) -> Part:
    """Write the file of an added part; returns its entry."""
    digest = hashlib.sha256(content).hexdigest()
    file = content_name(stem, digest, suffix)
    (folder / file).write_bytes(content)
    return Part(file, digest, len(content), **tensors)
