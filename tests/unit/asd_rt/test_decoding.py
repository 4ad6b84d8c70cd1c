"""Streams of frames: how many come when, the same whatever the blocks, and one line for what does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asd_rt
from asd_rt import decoding
from asd_rt.arguments import frame_deadline_ms
from asd_rt.backends.ort import open_engine
from asd_rt.cli import main
from asd_rt.decoding import (
    Decoder,
    Encoder,
    block_frame_count,
    codec_memory,
    frame_count,
    latent_count,
    latent_size,
    resolve_shape,
)
from asd_rt.errors import BackendError, ConfigError, EngineError
from asd_rt.manifest import TensorSpec, from_json
from asd_rt.noise import gaussian
from tests.unit.asd_rt.conftest import whole_decode, whole_encode

COUNTS = st.integers(0, 500)
TEMPORALS = st.integers(1, 8)


@given(TEMPORALS, st.lists(st.integers(1, 9), max_size=9))
def test_blocks_add_up_to_the_whole(temporal: int, blocks: list[int]) -> None:
    done = total = 0
    for size in blocks:
        total += block_frame_count(temporal, done, size)
        done += size
    assert total == frame_count(temporal, done)


@given(TEMPORALS, COUNTS)
def test_frame_counts(temporal: int, latents: int) -> None:
    one_by_one = sum(1 if i == 0 else temporal for i in range(latents))
    assert frame_count(temporal, latents) == one_by_one


@given(TEMPORALS, st.integers(1, 500))
def test_latent_count_is_the_fewest(temporal: int, frames: int) -> None:
    found = latent_count(temporal, frames)
    assert frame_count(temporal, found) >= frames > frame_count(temporal, found - 1)


def test_wan_counts() -> None:
    assert [block_frame_count(4, 3 * i, 3) for i in range(3)] == [9, 12, 12]
    assert frame_count(4, 21) == 81 and latent_count(4, 81) == 21
    assert frame_count(4, 0) == latent_count(4, 0) == 0


def test_shapes() -> None:
    spec = TensorSpec("float32", (2, 96, "8h", "w"))
    assert resolve_shape(spec, {"h": 60, "w": 104}) == (2, 96, 480, 104)
    with pytest.raises(KeyError):
        resolve_shape(spec, {"h": 60})


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_any_blocks_decode_to_the_whole_clip(stream_toy: Any, sizes: list[int]) -> None:
    latents = gaussian((1, sum(sizes), 2, 4, 2), 3, 0, 0)
    decoder = Decoder(open_engine(stream_toy.path, stream_toy.manifest, 1), (4, 2))
    for _ in range(2):  # the second video forgets the first
        decoder.reset()
        np.testing.assert_allclose(
            _join(decoder, latents, sizes), whole_decode(latents), rtol=0, atol=1e-6
        )


def _join(decoder: Decoder, latents: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    ends = np.cumsum(sizes)
    blocks = [latents[:, end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return np.concatenate([decoder.decode(block).copy() for block in blocks], axis=1)


def test_small_steps_make_the_same(stream_toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, frames = gaussian((1, 7, 2, 4, 2), 3, 0, 0), gaussian((1, 13, 3, 4, 2), 3, 0, 1)
    engine = open_engine(stream_toy.path, stream_toy.manifest, 1)
    large = Decoder(engine, (4, 2)).decode(latents), Encoder(engine, (4, 2)).encode(frames)
    monkeypatch.setattr(decoding, "STEP_BYTES", 1)
    assert codec_memory(stream_toy.manifest, "decoder", (4, 2)).step_frames == 1
    small = Decoder(engine, (4, 2)).decode(latents), Encoder(engine, (4, 2)).encode(frames)
    for one, other in zip(large, small, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(small[1], whole_encode(frames), rtol=0, atol=1e-5)


def test_the_encoder_goes_on(stream_toy: Any) -> None:
    frames = gaussian((1, 9, 3, 4, 2), 3, 0, 1)
    encoder = Encoder(open_engine(stream_toy.path, stream_toy.manifest, 1), (4, 2))
    parts = [encoder.encode(frames[:, :1]), encoder.encode(frames[:, 1:5])]
    parts.append(encoder.encode(frames[:, 5:]))
    expected = whole_encode(frames)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="takes 2n frames here, found 3; give it 2 or 4"):
        encoder.encode(frames[:, :3])
    encoder.reset()
    with pytest.raises(ConfigError, match=r"takes 1 \+ 2n frames here, found 2; give it 1 or 3"):
        encoder.encode(frames[:, :2])
    with pytest.raises(ConfigError, match=r"frames must be \[1, F, 3, 4, 2\]"):
        encoder.encode(frames[..., :1])


def test_a_session_streams_and_encodes(stream_toy: Any) -> None:
    with asd_rt.open(stream_toy.path, threads=1) as session:
        context = gaussian((1, 4, 3), 0, 0, 0)
        for deadline in (None, 1e4):
            blocks = list(session.generate_from(context, frames=9, deadline_ms=deadline))
            assert [len(block.frames) for block in blocks] == [5, 6, 6]
            latents = np.concatenate([block.latents for block in blocks], axis=1)
            shown = np.concatenate([block.frames for block in blocks])
            expected = np.moveaxis(whole_decode(latents)[0], 1, 3) * 127.5 + 127.5
            assert np.abs(shown - expected).max() <= 0.51
        pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 2, 3), dtype=np.uint8)
        given_frames = np.moveaxis(pixels, 3, 1)[None] / 127.5 - 1
        np.testing.assert_allclose(
            session.encode(pixels), whole_encode(given_frames), rtol=0, atol=1e-4
        )
        with pytest.raises(ConfigError, match="uint8"):
            session.encode(pixels.astype(np.float32))


def test_run_counts_decoded_frames(
    stream_toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "frames"
    words = ["run", "--engine", str(stream_toy.path), "--prompt", "red", "--frames", "4"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["latent_frames"], report["frames"]) == (4, 7)
    assert [block["frames"] for block in report["blocks"]] == [5, 2]
    assert len(list(out.iterdir())) == 7


def test_a_deadline_in_frames_a_second(stream_toy: Any, toy: Any) -> None:
    assert frame_deadline_ms(stream_toy.manifest, 12) == 3 * 2 * 1e3 / 12
    assert frame_deadline_ms(toy.manifest, 20) == 2 * 1e3 / 20


def test_memory(stream_toy: Any, toy: Any) -> None:
    found = codec_memory(stream_toy.manifest, "decoder", (6, 10))
    assert found.state_bytes == 2 * 6 * 10 * 4
    assert found.working_bytes > found.state_bytes and found.step_frames == 3
    assert codec_memory(toy.manifest, "decoder", (6, 10)).state_bytes == 0


def test_sizes(stream_toy: Any, toy: Any, respell: Any) -> None:
    with pytest.raises(ConfigError, match="fixed to 4x2; scale them"):
        latent_size(stream_toy.manifest, 6, 2)
    assert latent_size(stream_toy.manifest, 4, 2) == (4, 2)
    engine = open_engine(toy.path, toy.manifest, 1)
    with pytest.raises(EngineError, match="no encoder part"):
        engine.codec_stream("encoder", (4, 2))


def test_a_fixed_part_refuses_other_sizes(stream_toy: Any, toy: Any) -> None:
    document = toy.manifest.to_json()
    document["parts"]["decoder"]["inputs"]["latents"]["shape"] = ["B", "F", 2, 4, 2]
    with pytest.raises(BackendError, match="fixed to latents of 4x2, found 6x2"):
        open_engine(toy.path, from_json(document), 1).codec_stream("decoder", (6, 2))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"codec": None}, "null, but there is a decoder_first part"),
        ({"codec": {"kind": "wan"}}, "codec must be null or"),
        ({"codec": {"kind": "jpeg", "spatial": 8, "temporal": 4}}, "codec must be null or"),
        ({"codec": {"kind": "wan", "spatial": 0, "temporal": 4}}, "codec must be null or"),
        ({"codec": {"kind": "linear", "spatial": 1, "temporal": 1}}, "unexpected decoder_first"),
        ({"drop": "decoder_first"}, "missing decoder_first"),
        ({"drop": "decoder"}, "missing decoder"),
    ],
)
def test_a_codec_and_its_parts_belong_together(
    stream_toy: Any, change: dict[str, Any], told: str
) -> None:
    document = stream_toy.manifest.to_json()
    if "drop" in change:
        del document["parts"][change["drop"]]
    else:
        document |= change
    with pytest.raises(EngineError, match=told):
        from_json(document)
