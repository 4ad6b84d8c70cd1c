"""An engine with some of its graphs in another form, for measuring."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx

from asd_rt.manifest import Manifest


@contextmanager
def staged(path: Path, manifest: Manifest, graphs: Mapping[str, onnx.ModelProto]) -> Iterator[Path]:
    """The engine at `path` with other graphs, in a folder of its own; its other files are links.

    Args:
        path: the denoiser's file.
        manifest: of the engine.
        graphs: by part; their weights are those beside the engine.

    Yields:
        the denoiser's file there.
    """
    # Beside the engine a link takes no room.
    beside = path.parent if os.access(path.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".parity-", dir=beside) as name:
        folder = Path(name)
        for part, entry in manifest.parts.items():
            source, target = path.parent / entry.file, folder / entry.file
            if part in graphs:
                onnx.save(graphs[part], target)
            elif source.exists():
                _link(source, target)
        yield folder / path.name


def _link(source: Path, target: Path) -> None:
    """The same file under another name, copied where the file system cannot do better."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
