"""Parts of an engine one at a time: a part's entry in the manifest, and new parts in place of old ones."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from asd_rt.manifest import Manifest, Part, TensorSpec, sha256_file, write_manifest
from export.onnx import dtype_name
from export.parts import PartModule, TensorShape

log = logging.getLogger(__name__)


def write_part(file: Path, module: PartModule | None = None) -> Part:
    """The manifest's entry of a part whose file is written; without tensors where it holds weights only."""
    if module is None:
        return Part(file.name, sha256_file(file), file.stat().st_size)
    return Part(
        file.name,
        sha256_file(file),
        file.stat().st_size,
        {key: _spec(spec) for key, spec in module.inputs.items()},
        {key: _spec(spec) for key, spec in module.outputs.items()},
    )


def _spec(spec: TensorShape) -> TensorSpec:
    return TensorSpec(dtype_name(spec[0]), spec[1])


def replace_parts(
    engine: Path, old: Manifest, new: Manifest, made: Collection[str], scratch: Path
) -> None:
    """Move new files of an engine in, then its new manifest; the files of other parts are not touched.

    A part that `new` no longer has loses its file. What is interrupted in between does not verify; building
    again with --force mends it.

    Args:
        engine: its denoiser's file.
        old: its manifest until now.
        new: its manifest from now on.
        made: names of the parts whose files lie in `scratch`.
        scratch: a folder on the same disk.
    """
    for name in made:
        file = new.parts[name].file
        (scratch / file).chmod(0o644)
        (scratch / file).replace(engine.parent / file)
    write_manifest(engine, new)
    kept = {part.file for part in new.parts.values()}
    for part in old.parts.values():
        if part.file not in kept:
            (engine.parent / part.file).unlink(missing_ok=True)
    log.info("replaced %s of %s", ", ".join(made), engine)
