"""Training takes bfloat16 where the processor has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from train import precision


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    precision.has_bf16.cache_clear()
    yield
    precision.has_bf16.cache_clear()


@pytest.mark.parametrize(
    ("found", "dtype"), [(["avx512_bf16"], torch.bfloat16), ([], torch.float32)]
)
def test_products(monkeypatch: pytest.MonkeyPatch, found: list[str], dtype: torch.dtype) -> None:
    monkeypatch.setattr(precision, "bf16_instructions", lambda: found)
    x = torch.ones(2, 2)
    for _ in range(2):
        with precision.mixed_precision():
            assert (x @ x).dtype == dtype
