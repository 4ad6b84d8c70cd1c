"""Decoding under limits: shapes, kinds, and a process that is stopped by the system."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from asd_rt.engines import PACKAGED_DIR
from asd_rt.manifest import read_manifest
from asd_rt.serve import upload_process
from asd_rt.serve.ids import Ids
from asd_rt.serve.limits import Limits
from asd_rt.serve.protocol import MessageError
from asd_rt.serve.upload_process import Refused, decode, kind_of
from asd_rt.serve.uploads import Uploads, fitted_count

MANIFEST = read_manifest(PACKAGED_DIR / "asd_fp32.onnx")


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 255, 255
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_the_middle_is_kept() -> None:
    count, raw = decode(picture(300, 100), 16, 16, 8, 1 << 20)
    found = np.frombuffer(raw, np.uint8).reshape(count, 16, 16, 3)
    assert count == 1
    assert (found[0, :, 0] == (255, 0, 0)).all()
    assert (found[0, :, -1] == (0, 0, 255)).all()


def test_frames_of_a_clip_are_counted() -> None:
    file = BytesIO()
    frames = [Image.new("RGB", (40, 40), (10 * i, 0, 0)) for i in range(9)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert decode(file.getvalue(), 8, 8, 5, 1 << 20)[0] == 5


def test_large_frames_are_refused() -> None:
    with pytest.raises(Refused, match="has frames of 300x100, more than 29999 pixels"):
        decode(picture(300, 100), 8, 8, 1, 29_999)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"#EXTM3U", b"<svg/>", b"%PDF-1.7"])
def test_other_kinds_are_refused(data: bytes) -> None:
    with pytest.raises(Refused, match="is no PNG"):
        kind_of(data)


def uploads(**limits: int) -> Uploads:
    return Uploads(MANIFEST, (32, 32), replace(Limits(), **limits), Ids())


def test_a_process_that_wants_too_much_memory_is_refused() -> None:
    with pytest.raises(MessageError, match="more time or memory"):
        asyncio.run(uploads(upload_memory=32 << 20).add(picture(64, 64)))


def test_a_process_that_takes_too_long_is_killed(monkeypatch, tmp_path) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(upload_process, "__file__", str(sleeper))
    monkeypatch.setattr("asd_rt.serve.uploads.GRACE_S", 0.2)
    with pytest.raises(MessageError, match="took more than 0 s"):
        asyncio.run(uploads(upload_s=0).add(b""))


def test_the_oldest_uploads_go() -> None:
    async def three() -> None:
        kept = uploads(uploads_kept=2)
        names = [(await kept.add(picture(32, 32)))[0] for _ in range(3)]
        assert [kept.get(name).shape for name in names[1:]] == [(3, 32, 32, 3)] * 2
        with pytest.raises(MessageError, match="send the file again"):
            kept.get(names[0])

    asyncio.run(three())


def test_an_engine_without_an_encoder_takes_none() -> None:
    parts = {name: part for name, part in MANIFEST.parts.items() if name != "encoder"}
    kept = Uploads(replace(MANIFEST, parts=parts), (32, 32), Limits(), Ids())
    with pytest.raises(MessageError, match="no encoder"):
        asyncio.run(kept.add(picture(32, 32)))


@pytest.mark.parametrize(("given", "first", "last"), [(1, 0, 0), (2, 0, 1), (3, 0, 2), (7, 1, 6)])
def test_whole_blocks_are_made_of_what_is_there(given: int, first: int, last: int) -> None:
    frames = np.arange(given, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    found = fitted_count(MANIFEST, frames)[:, 0, 0, 0]
    assert len(found) % 3 == 0
    assert (found[0], found[-1]) == (first, last)
