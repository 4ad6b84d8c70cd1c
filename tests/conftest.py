"""Shared by all tests: where things lie, and which tests this machine can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is remembered between runs stays among the tests, those of commands included."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ASD_RT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def data(root: Path) -> Path:
    """tests/data, with the golden traces."""
    return root / "tests" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no NVIDIA driver."""
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA driver on this machine"))
