"""The network: one class, bidirectional and causal."""

from __future__ import annotations

import torch

from asd_rt.config import CacheConfig
from train.causal_init import teacher_forcing_mask
from train.model import KeyValue, WanModel, attend, make_rope


def test_a_mask_and_a_cache_give_the_same_result(model: WanModel) -> None:
    """Teacher forcing over [clean, noisy] equals cached passes block by block."""
    cache = CacheConfig(block_frames=1, window_frames=3, sink_frames=1)
    clean, noisy = torch.randn(2, 5, 4, 4, 4), torch.randn(2, 5, 4, 4, 4)
    prompt = model.embed_prompt(torch.randn(2, 5, 8))
    timesteps = torch.cat([torch.zeros(1, 5), torch.full((1, 5), 700.0)], dim=1)
    rope = make_rope(model.config, [*range(5)] * 2, (2, 2))
    mask = teacher_forcing_mask(cache, 5, 4)
    together, _ = model.denoise(
        torch.cat([clean, noisy], dim=1), model.embed_time(timesteps), prompt, rope, mask=mask
    )
    kept: list[list[KeyValue]] = []
    for frame in range(5):
        seen = [f for f in range(frame) if f < 1 or f >= frame - 1]
        past = None
        if seen:
            past = [
                KeyValue(
                    torch.cat([kept[f][layer].k for f in seen]),
                    torch.cat([kept[f][layer].v for f in seen]),
                )
                for layer in range(2)
            ]
        rope = make_rope(model.config, [frame], (2, 2))
        time = model.embed_time(torch.full((1, 1), 700.0))
        flow, _ = model.denoise(noisy[:, frame : frame + 1], time, prompt, rope, past)
        torch.testing.assert_close(flow, together[:, 5 + frame : 6 + frame], atol=1e-4, rtol=1e-4)
        clean_time = model.embed_time(torch.zeros(1, 1))
        _, new = model.denoise(clean[:, frame : frame + 1], clean_time, prompt, rope, past)
        kept.append(new)


def test_both_attention_paths_agree() -> None:
    q, k, v = torch.randn(2, 5, 2, 8), torch.randn(7, 2, 2, 8), torch.randn(7, 2, 2, 8)
    mask = torch.rand(5, 7) < 0.6
    mask[:, 0] = True
    with torch.no_grad():
        fused = attend(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, mask), fused, atol=1e-5, rtol=1e-5)


def test_bidirectional_pass_has_the_clips_shape(model: WanModel) -> None:
    x = torch.randn(2, 3, 4, 6, 4)
    assert model(x, torch.full((2, 3), 500.0), torch.randn(2, 4, 8)).shape == x.shape


def test_official_key_names(model: WanModel) -> None:
    names = set(model.state_dict())
    assert {"patch_embedding.weight", "text_embedding.2.bias", "time_projection.1.weight"} <= names
    assert {"blocks.1.self_attn.norm_q.weight", "blocks.0.cross_attn.o.bias"} <= names
    assert {"blocks.0.norm3.weight", "blocks.0.ffn.2.weight", "head.modulation"} <= names
    assert not any("freqs" in name for name in names)
