"""Names of tensors: what programs put around the official ones, and what diffusers calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable

# FSDP, activation checkpointing and torch.compile wrap modules anywhere; the others come first.
WRAPPERS = re.compile(r"(^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
PREFIXES = re.compile(r"^(?:(?:model|diffusion_model|module)\.)+")
# Rotary tables: computed here, since ours have no end.
TABLES = re.compile(r"freqs|rope\.freqs\w*")

_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{ours}.{part}": f"{theirs}.{their_part}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, their_part in (
        ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}  # fmt: skip
_TO_DIFFUSERS = (_TOP, _BLOCK)
_TO_OFFICIAL = ({v: k for k, v in _TOP.items()}, {v: k for k, v in _BLOCK.items()})


def bare(name: str) -> str:
    """`name` without the prefixes of wrappers, trainers and ComfyUI, in any combination."""
    return PREFIXES.sub("", WRAPPERS.sub("", name))


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether bare names are those of diffusers' WanTransformer3DModel."""
    return any(name.startswith(("condition_embedder.", "proj_out.")) for name in names)


def to_diffusers(name: str) -> str:
    """The name that diffusers has for an official one; any other name stays as it is."""
    return _renamed(name, _TO_DIFFUSERS)


def to_official(name: str) -> str:
    """The official name of one of diffusers'; any other name stays as it is."""
    return _renamed(name, _TO_OFFICIAL)


def _renamed(name: str, tables: tuple[dict[str, str], dict[str, str]]) -> str:
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
    if match is None:
        return name
    prefix, module, leaf = match[1] or "", match[2], match[3] or ""
    return f"{prefix}{tables[bool(prefix)].get(module, module)}{leaf}"
