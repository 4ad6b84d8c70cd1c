"""The one torch definition of the network: Wan2.1's denoiser as teacher, critic and causal student.

Keys follow the official Wan2.1 checkpoints. The same `denoise` serves bidirectional training (no past),
teacher forcing and joined passes (a mask over several blocks) and the causal student (a past of keys and
values). Formulas: Wan2.1 `WanModel`, Self-Forcing `CausalWanModel`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asd_rt.config import ModelConfig
from asd_rt.rope import rope_table


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, token-major: [tokens, B, heads, head_dim]."""

    k: Tensor
    v: Tensor


Rope = tuple[Tensor, Tensor]


def make_rope(
    config: ModelConfig,
    frames: range | list[int],
    token_hw: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Rope:
    """(cos, sin) of the tokens of `frames`, each float32 [tokens, head_dim / 2]."""
    if torch.device(device).type == "meta":
        shape = (len(frames) * token_hw[0] * token_hw[1], config.head_dim // 2)
        return torch.empty(shape, device=device), torch.empty(shape, device=device)
    cos, sin = rope_table(config.head_dim, torch.as_tensor(list(frames)).numpy(), *token_hw)
    return torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)


def clip_rope(config: ModelConfig, latents: Tensor) -> Rope:
    """Tables of latents [B, F, C, h, w] whose first frame is frame 0."""
    token_hw = (latents.shape[3] // 2, latents.shape[4] // 2)
    return make_rope(config, range(latents.shape[1]), token_hw, latents.device)


def sinusoid(freq_dim: int, timesteps: Tensor) -> Tensor:
    """[cos, sin] features of timesteps (0..1000), [...] -> float64 [..., freq_dim]."""
    half = freq_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.to(torch.float64)[..., None] * torch.pow(10000.0, -exponents)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn interleaved channel pairs of x [B, tokens, heads, head_dim] by the angles of `rope`."""
    cos, sin = (table[None, :, None, :].to(x.dtype) for table in rope)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q [B, T, heads, D] over k, v [S, B, heads, D] (token-major) -> [B, T, heads * D].

    `mask` [T, S] is True where a query sees a key. With gradients on a CPU, plain matrix products
    are twice as fast as the fused kernel, whose backward pass is slow there.
    """
    q, k, v = q.transpose(1, 2), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
    if torch.is_grad_enabled() and q.device.type == "cpu":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = scores.softmax(dim=-1) @ v
    elif q.device.type == "meta":
        # By name: else the plain form is taken, which needs memory that no accelerator's kernel does.
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / rms(x) over all channels, times a learned weight; computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Projections of one attention; q and k are normalised over all channels before the split into heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def queries(self, x: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x)))

    def keys(self, x: Tensor) -> Tensor:
        return self.split(self.norm_k(self.k(x)))

    def values(self, x: Tensor) -> Tensor:
        return self.split(self.v(x))


class Block(nn.Module):
    """Self-attention over past and own tokens, cross-attention over the prompt, feed-forward.

    Attributes:
        checkpointing: keep no activations for the backward pass, which computes them once more.
    """

    checkpointing = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = Attention(config)
        self.cross_attn = Attention(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, dim),
        )

    def embed_prompt(self, y: Tensor) -> KeyValue:
        """Keys and values of the embedded text [B, text_len, dim]."""
        cross = self.cross_attn
        return KeyValue(cross.keys(y).transpose(0, 1), cross.values(y).transpose(0, 1))

    def norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """LayerNorm without weights, then per-frame shift and scale [B, F, 1, dim]; x is [B, F, S, dim]."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Rope,
        prompt: KeyValue,
        past: KeyValue | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        inputs = (x, modulation, rope, prompt, past, mask)
        if self.checkpointing and torch.is_grad_enabled():
            # Inside of the module, so that FSDP gathers its weights once for both computations.
            return checkpoint(self._pass, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._pass(*inputs)

    def _pass(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Rope,
        prompt: KeyValue,
        past: KeyValue | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, KeyValue]:
        shape = x.shape
        m = [part.unsqueeze(2) for part in (modulation + self.modulation).unbind(dim=2)]

        attn = self.self_attn
        y = self.norm(x, m[0], m[1]).flatten(1, 2)
        q = rotate(attn.queries(y), rope)
        new = KeyValue(rotate(attn.keys(y), rope).transpose(0, 1), attn.values(y).transpose(0, 1))
        k, v = new if past is None else (torch.cat([past.k, new.k]), torch.cat([past.v, new.v]))
        x = x + attn.o(attend(q, k, v, mask)).view(shape) * m[2]

        cross = self.cross_attn
        x = x + cross.o(attend(cross.queries(self.norm3(x).flatten(1, 2)), *prompt)).view(shape)
        return x + self.ffn(self.norm(x, m[3], m[4])) * m[5], new


class Head(nn.Module):
    """Last norm with a per-frame shift and scale, then the projection to patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, 4 * config.out_dim)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = (self.modulation + embedding.unsqueeze(2)).chunk(2, dim=2)
        return self.head(F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift)


class WanModel(nn.Module):
    """The denoiser: latents at a timestep and a prompt -> flow (noise - x0)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier linears and a head that starts at zero flow."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.head.head.weight)

    def embed_prompt(self, context: Tensor) -> list[KeyValue]:
        """Cross-attention keys and values of a prompt, once for all passes.

        Args:
            context: text embedding [B, tokens <= text_len, text_dim]; zero-padded to text_len.

        Returns:
            per layer, [text_len, B, heads, head_dim].
        """
        context = F.pad(context, (0, 0, 0, self.config.text_len - context.shape[1]))
        y = self.text_embedding(context.to(self.text_embedding[0].weight.dtype))
        return [block.embed_prompt(y) for block in self.blocks]

    def embed_time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B, F] (0..1000) -> embedding [B, F, dim] and modulation [B, F, 6, dim]."""
        weight = self.time_embedding[0].weight
        embedding = self.time_embedding(sinusoid(self.config.freq_dim, timesteps).to(weight.dtype))
        return embedding, self.time_projection(embedding).unflatten(-1, (6, self.config.dim))

    def denoise(
        self,
        latents: Tensor,
        time: tuple[Tensor, Tensor],
        prompt: list[KeyValue],
        rope: Rope,
        past: list[KeyValue] | None = None,
        mask: Tensor | None = None,
        features: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """One forward pass.

        Args:
            latents: [B, F, C, h, w].
            time: (embedding [1 or B, F, dim], modulation [1 or B, F, 6, dim]) from `embed_time`.
            prompt: from `embed_prompt`.
            rope: tables of this pass's tokens.
            past: cached keys and values per layer, [past tokens, B, heads, head_dim].
            mask: [tokens, past + tokens], True where attended; None = everything.
            features: where to append each layer's output [B, F, tokens of a frame, dim].

        Returns:
            (flow [B, F, C, h, w], this pass's keys and values per layer).
        """
        batch, frames, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        x = latents.reshape(batch, frames, channels, rows, 2, columns, 2).permute(
            0, 1, 3, 5, 2, 4, 6
        )
        x = x.reshape(batch, frames, rows * columns, channels * 4)
        weight = self.patch_embedding.weight.flatten(1)
        x = F.linear(x.to(weight.dtype), weight, self.patch_embedding.bias)

        embedding, modulation = time
        new: list[KeyValue] = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, modulation, rope, prompt[i], None if past is None else past[i], mask)
            new.append(kv)
            if features is not None:
                features.append(x)
        x = self.head(x, embedding).view(batch, frames, rows, columns, 2, 2, self.config.out_dim)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, -1, height, width), new

    def forward(
        self, latents: Tensor, timesteps: Tensor, context: Tensor, rope: Rope | None = None
    ) -> Tensor:
        """Bidirectional pass over a whole clip (teacher, critic).

        Args:
            latents: [B, F, C, h, w].
            timesteps: [B, F], 0..1000.
            context: [B, tokens, text_dim].
            rope: from `clip_rope`, where it is not to be made here (a compiled graph).

        Returns:
            flow [B, F, C, h, w].
        """
        rope = clip_rope(self.config, latents) if rope is None else rope
        flow, _ = self.denoise(
            latents, self.embed_time(timesteps), self.embed_prompt(context), rope
        )
        return flow
