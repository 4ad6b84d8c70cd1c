"""bfloat16 in numpy, and memory that a request works on in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.backends.openvino import from_bf16, keep_keys_whole, to_bf16


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bf16_is_rounded_as_torch_does(values: list[float]) -> None:
    array = np.array(values, np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bf16(to_bf16(array)), expected)


def test_what_is_bfloat16_comes_back_as_it_was() -> None:
    every = np.arange(0, 0x7F80, dtype=np.uint16)  # all that are finite and not negative
    np.testing.assert_array_equal(to_bf16(from_bf16(every)), every)


def test_cache_and_prompt_are_bound_in_place(toy) -> None:
    pytest.importorskip("openvino")
    from dataclasses import replace

    from asd_rt.backends.ort import open_engine
    from asd_rt.noise import gaussian

    denoiser = open_engine(
        toy.path, replace(toy.manifest, precision="bf16", runtime="openvino"), threads=1
    ).denoiser
    denoiser.prepare(1, (4, 2), 6)
    denoiser.set_prompt(gaussian((1, 4, 3), 0, 0, 0))
    x = gaussian((1, 2, 2, 4, 2), 0, 0, 0)
    first = denoiser.denoise(x, 500.0, range(2, 4), 2).copy()
    keys = denoiser._cache["k.0"]
    assert keys.dtype == np.uint16
    assert keys[:, 4:8].any()
    assert not keys[:, 8:].any()
    keys[:, :4] = to_bf16(np.full((1, 4, 12), 3.0, np.float32))
    denoiser._cache["v.0"][:, :4] = keys[:, :4]
    assert not np.allclose(denoiser.denoise(x, 500.0, range(2, 4), 2), first)


def test_keys_are_read_as_they_lie() -> None:
    """The rewritten product has the same result, and no key is turned to channels first."""
    ov = pytest.importorskip("openvino")
    op = ov.opset13
    q, k = (op.parameter([1, n, 2, 4], ov.Type.f32, name=name) for name, n in (("q", 3), ("k", 5)))
    turned = [
        op.transpose(x, np.array(order, np.int64))
        for x, order in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]))
    ]
    model = ov.Model([op.matmul(*turned, False, False)], [q, k], "scores")
    draw = np.random.default_rng(0)
    given = [draw.standard_normal((1, n, 2, 4)).astype(np.float32) for n in (3, 5)]
    expected = np.einsum("bthd,bshd->bhts", *given)
    keep_keys_whole(ov, model)
    orders = [
        node.input_value(1).get_node().get_data().tolist()
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Transpose"
    ]
    assert orders == [[0, 2, 1, 3]] * 2
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    found = ov.Core().compile_model(model, "CPU", settings)(given)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
