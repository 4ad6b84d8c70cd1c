"""One real server of the packaged engine for the tests here, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asd_rt.engines import PACKAGED_DIR
from benchmarks.serving_client import Server, running


@pytest.fixture(scope="session")
def server(cache_folder: object) -> Iterator[Server]:
    with running("--engine", str(PACKAGED_DIR / "asd_fp32.onnx"), "--sessions", "5") as found:
        yield found
