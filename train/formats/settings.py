"""Configurations of networks: config.json of ours, of Wan2.1 and of diffusers, else the tensors' shapes.

What neither says has Wan2.1's value: eps 1e-6, text_len 512, and heads of 128 channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asd_rt.config import ModelConfig, from_mapping
from asd_rt.errors import CheckpointError, ConfigError
from train.formats.files import read_json
from train.formats.shapes import Shapes

HEAD_DIM = 128
METADATA_KEYS = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "model_type"})
CLASSES = ("WanModel", "CausalWanModel", "WanTransformer3DModel")
# Settings of Wan2.1 that have one value here.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "cross_attn_norm": (True,),
    "qk_norm": (True, "rms_norm_across_heads"),
    "window_size": ([-1, -1],),
    "add_img_emb": (False, None),
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
}
DIFFUSERS = {
    "in_channels": "in_dim", "out_channels": "out_dim", "num_attention_heads": "num_heads",
    **{name: name for name in ("num_layers", "ffn_dim", "freq_dim", "text_dim", "eps", "patch_size")},
    # Not diffusers' own: we write them where they are not Wan2.1's, for the way back.
    **{name: name for name in ("text_len", "local_attn_size", "sink_size")},
}  # fmt: skip
# Setting -> tensors whose shape says it, and where.
_SOURCES = {
    "dim": (("patch_embedding.weight", 5, 0), ("patch_embedding.bias", 1, 0), ("head.modulation", 3, 2),
            ("text_embedding.2.bias", 1, 0), ("time_embedding.2.bias", 1, 0)),
    "in_dim": (("patch_embedding.weight", 5, 1),),
    "text_dim": (("text_embedding.0.weight", 2, 1),),
    "freq_dim": (("time_embedding.0.weight", 2, 1),),
    "ffn_dim": (("ffn.0.weight", 2, 0), ("ffn.0.bias", 1, 0), ("ffn.2.weight", 2, 1)),
}  # fmt: skip
# Wan2.1's values, of what tensors do not say (or only tensors that are missing, which is told apart later).
_DEFAULTS: Mapping[str, Any] = {
    "in_dim": 16, "out_dim": 16, "text_dim": 4096, "freq_dim": 256, "text_len": 512, "eps": 1e-6,
    "num_layers": 30,
}  # fmt: skip


def told_by_tensors(shapes: Shapes) -> dict[str, int]:
    """The settings that shapes of official tensors say; what their tensors are missing for is left out."""
    told: dict[str, int] = {}
    for setting, sources in _SOURCES.items():
        for key, rank, axis in sources:
            shape = shapes.get(key, ())
            if key.startswith("ffn."):  # of whichever block has it
                shape = next(
                    (shapes[n] for n in shapes if re.fullmatch(rf"blocks\.\d+\.{key}", n)), ()
                )
            if len(shape) == rank:
                told.setdefault(setting, shape[axis])
    for key in ("head.head.weight", "head.head.bias"):
        if shapes.get(key):
            told.setdefault("out_dim", shapes[key][0] // 4)
    blocks = [int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))]
    if blocks:
        told["num_layers"] = 1 + max(blocks)
    return told


def told_by_file(path: Path) -> dict[str, Any]:
    """The settings that a config.json says, ours, Wan2.1's or diffusers', in our names.

    Raises:
        CheckpointError: it cannot be read, or is of another kind of model.
        ConfigError: unknown keys, or settings that the network here does not have.
    """
    values = read_json(path)
    kind, task = values.get("_class_name"), values.get("model_type")
    if kind is not None and kind not in CLASSES:
        raise CheckpointError(
            f"{path}: is of a {kind}, expected {' or '.join(CLASSES)}; is it the right folder?"
        )
    # Official files have the task under model_type, transformers' the architecture.
    if task is not None and task != "t2v":
        raise CheckpointError(
            f"{path}: model_type {task} is not supported, expected t2v; only text-to-video networks run here"
        )
    wrong = [f"{k} {v!r}" for k, v in values.items() if k in FIXED and v not in FIXED[k]]
    if wrong:
        known = "; ".join(f"{k} {FIXED[k][0]!r}" for k in values if k in FIXED)
        raise ConfigError(f"{path}: {', '.join(wrong)} is not supported; expected {known}")
    values = {k: v for k, v in values.items() if k not in METADATA_KEYS and k not in FIXED}
    if "num_attention_heads" not in values and kind != "WanTransformer3DModel":
        return values
    values.pop("rope_max_seq_len", None)  # our positions have no end
    head_dim = values.pop("attention_head_dim", HEAD_DIM)
    unknown = sorted(set(values) - set(DIFFUSERS))
    if unknown:
        known = ", ".join(sorted({*DIFFUSERS, *FIXED, "attention_head_dim"}))
        raise ConfigError(f"{path}: unknown {', '.join(unknown)}; known: {known}")
    found = {DIFFUSERS[key]: value for key, value in values.items()}
    if found.get("out_dim", 0) is None:
        found["out_dim"] = found.get("in_dim", _DEFAULTS["in_dim"])
    heads = found.get("num_heads")
    if type(head_dim) is not int or type(heads) is not int:
        raise ConfigError(
            f"{path}: num_attention_heads and attention_head_dim must be whole numbers, found {heads!r} and "
            f"{head_dim!r}"
        )
    return found | {"dim": heads * head_dim}


def network_config(
    where: str, path: Path | None, shapes: Shapes
) -> tuple[ModelConfig, dict[str, str]]:
    """The configuration of a network, from its config.json as far as that goes, else from its tensors.

    Args:
        where: what to call the tensors in an error.
        path: of config.json, or None.
        shapes: official key -> shape.

    Returns:
        the configuration, and where each setting that config.json does not say comes from.

    Raises:
        CheckpointError: there is too little to go by, or the network is of a kind that is not supported.
        ConfigError: config.json is wrong.
    """
    by_file = {} if path is None else told_by_file(path)
    by_tensors = told_by_tensors(shapes)
    values = {**_DEFAULTS, **by_tensors, **by_file}
    origin = {k: "tensors" if k in by_tensors else "default" for k in values if k not in by_file}
    if "dim" not in values:
        raise CheckpointError(
            f"{where}: neither patch_embedding nor another tensor that says the width is there; "
            "is it the right file?"
        )
    dim = values["dim"]
    values.setdefault("ffn_dim", 4 * dim if type(dim) is int else dim)
    if "num_heads" not in values:
        if type(dim) is not int or dim % HEAD_DIM:
            lacking = "has no num_heads" if path else "missing"
            raise CheckpointError(
                f"{path or where}: config.json {lacking}, and tensors of width {dim}, not a multiple of "
                f"Wan2.1's {HEAD_DIM}, do not tell the number of heads; put a config.json with num_heads "
                "beside the weights and give the folder"
            )
        values["num_heads"], origin["num_heads"] = dim // HEAD_DIM, f"dim / {HEAD_DIM}"
    try:
        config = from_mapping(ModelConfig, values, str(path or where))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(
            text if text.startswith(str(path or where)) else f"{path or where}: {text}"
        ) from error
    if by_tensors.get("in_dim") == 36:
        raise CheckpointError(
            f"{where}: patch_embedding takes 36 channels: an image-to-video network; only text-to-video "
            "networks run here"
        )
    if config.in_dim != config.out_dim:
        raise CheckpointError(
            f"{path or where}: the network takes {config.in_dim} channels and gives {config.out_dim}; "
            "expected as many in as out, as text-to-video networks have"
        )
    return config, origin


def contradictions(path: Path | None, config: ModelConfig, shapes: Shapes) -> str:
    """What config.json says otherwise than the tensors, as a note before a list of tensors; often empty."""
    told = told_by_tensors(shapes)
    wrong = [
        f"{k} {getattr(config, k)}, the tensors {v}"
        for k, v in told.items()
        if getattr(config, k) != v
    ]
    return f"{path.name} says {'; '.join(wrong)}: " if wrong and path is not None else ""


def official_json(config: ModelConfig) -> dict[str, Any]:
    """config.json as Wan2.1 has it, with a window where there is one."""
    names = (
        "dim",
        "eps",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "num_heads",
        "num_layers",
        "out_dim",
        "text_len",
    )
    told = {name: getattr(config, name) for name in names}
    return {"_class_name": "WanModel", "model_type": "t2v"} | told | _window(config)


def diffusers_json(config: ModelConfig) -> dict[str, Any]:
    """config.json of a WanTransformer3DModel."""
    ours = {
        v: k for k, v in DIFFUSERS.items() if v not in ("text_len", "local_attn_size", "sink_size")
    }
    told = {theirs: getattr(config, name) for name, theirs in ours.items()}
    told |= {"_class_name": "WanTransformer3DModel", "attention_head_dim": config.head_dim}
    told |= {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
    if config.text_len != _DEFAULTS["text_len"]:
        told["text_len"] = config.text_len
    return told | _window(config)


def _window(config: ModelConfig) -> dict[str, int]:
    told = {"local_attn_size": config.local_attn_size, "sink_size": config.sink_size}
    return told if (config.local_attn_size, config.sink_size) != (-1, 0) else {}
