"""The measurement of the page, on a few videos."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.serving_client import Server
from benchmarks.serving_page import find_browser, first_frames


@pytest.mark.skipif(find_browser() is None, reason="no browser on this machine")
def test_first_frames_on_the_page(server: Server) -> None:
    found, fps = asyncio.run(first_frames(server, 2))
    assert len(found) == 2
    assert all(0 < ms < 5000 for ms in found)
    assert fps > 0
