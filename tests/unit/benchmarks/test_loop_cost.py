"""What counts as the loop's own time."""

from __future__ import annotations

from time import sleep
from typing import Any

import pytest

import asd_rt
from asd_rt.backends.ort_codec import OrtCodecStream
from asd_rt.engines import PACKAGED_DIR
from asd_rt.session import Session
from benchmarks import loop_cost


def test_decoding_is_an_engine_call(monkeypatch: pytest.MonkeyPatch) -> None:
    step = OrtCodecStream.step

    def slow(self: OrtCodecStream, *args: Any) -> None:
        sleep(0.25)  # long beside what a busy machine takes for the rest
        step(self, *args)

    monkeypatch.setattr(OrtCodecStream, "step", slow)
    monkeypatch.setattr(loop_cost, "BLOCKS", (2, 2))
    with asd_rt.open(PACKAGED_DIR / "asd_fp32.onnx") as session:
        found = loop_cost.measure(Session(session.engine, join=False))
    assert found["block_ms"] > 250
    assert found["outside"] < 0.5
    assert OrtCodecStream.step is slow  # as it was found
