"""Weights of video codecs from the files that users have, all or nothing, as one `VideoCodec`.

Recognised by their tensor names: diffusers' AutoencoderKLWan (a folder with config.json), the official
Wan2.1_VAE.pth or a .safetensors with its names, and TAEHV's taew2_1 (.pth or .safetensors). Stored as
float32, float16 or bfloat16, loaded as float32. A .pth is read with weights_only: no code in it runs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from asd_rt.config import from_mapping
from asd_rt.errors import CheckpointError, ConfigError
from train.formats.tensors import TORCH_ERRORS
from train.taehv import TaehvDecoder, taehv_sizes
from train.vae import Shapes, WanDecoder, WanEncoder, WanVae
from train.vae_config import SPATIAL, TEMPORAL, WanVaeConfig

CONFIG, DIFFUSERS = "config.json", "diffusion_pytorch_model.safetensors"
OFFICIAL = "Wan2.1_VAE.pth"
MAX_LISTED = 40
KINDS = (
    f"a folder with {CONFIG} and {DIFFUSERS} (or with vae/ or {OFFICIAL} in it), {OFFICIAL} itself, or "
    "taew2_1 as .pth or .safetensors"
)
# Keys of config.json that say nothing, and those that must say this, for they make another network.
_IGNORED = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "dropout"})
_FIXED: dict[str, tuple[Any, ...]] = {
    "attn_scales": ([],),
    "is_residual": (False,),
    "in_channels": (3,),
    "out_channels": (3,),
    "patch_size": (None, 1),
    "scale_factor_temporal": (TEMPORAL, None),
    "scale_factor_spatial": (SPATIAL, None),
    "clip_output": (True,),
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class VideoCodec:
    """A codec in memory, complete and checked.

    Attributes:
        kind: wan or taehv.
        name: of the file or folder it came from.
        sha256: of its weights' file (and config.json).
        channels: of the latents.
        decoder: step on latents (see `train.vae`).
        encoder: step on frames; None = there is none.
    """

    kind: str
    name: str
    sha256: str
    channels: int
    decoder: nn.Module
    encoder: nn.Module | None
    spatial: int = SPATIAL
    temporal: int = TEMPORAL


def load_codec(path: Path | str) -> VideoCodec:
    """Read a video codec; either all of it fits or nothing is loaded.

    Args:
        path: see KINDS.

    Raises:
        CheckpointError: nothing there, damaged, of another model, or tensors are missing, extra, misshapen,
            of another type or not finite (all of them in one message).
        ConfigError: config.json has unknown keys or impossible values.
    """
    config_file, file = _find(Path(path))
    told = None if config_file is None else _read_config(config_file)
    tensors = _read(file)
    files = [p for p in (config_file, file) if p is not None]
    name, sha256 = Path(path).resolve().name, _digest(files)
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    tiny = taehv_sizes(shapes)
    if tiny is not None and told is None:
        decoder = _taehv(file, tensors, *tiny)
        return VideoCodec("taehv", name, sha256, tiny[0], _ready(decoder), None)
    tensors = {_official_name(key, told): value for key, value in tensors.items()}
    config = told or _config_of(file, tensors)
    with torch.device("meta"):
        shell = WanVae(config)
    values = _checked(file, tensors, shell.stored_shapes())
    vae = shell.to_empty(device="cpu")
    vae.load_state_dict(values)
    return VideoCodec(
        "wan", name, sha256, config.z_dim, _ready(WanDecoder(vae)), _ready(WanEncoder(vae))
    )


def _ready(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _taehv(
    file: Path, tensors: Mapping[str, Tensor], channels: int, widths: tuple[int, ...]
) -> Any:
    outputs = tensors.get("decoder.22.weight")
    if outputs is not None and len(outputs) != 3:
        raise CheckpointError(
            f"{file}: a TAEHV that makes {len(outputs)} values a pixel, expected 3; it belongs to another "
            "model (Wan2.2 or HunyuanVideo 1.5): get taew2_1"
        )
    decoder = TaehvDecoder(channels, widths)
    kept = {key: value for key, value in tensors.items() if not key.startswith("encoder.")}
    values = _checked(file, kept, decoder.stored_shapes())
    decoder.layers.load_state_dict(
        {key.removeprefix("decoder."): value for key, value in values.items()}
    )
    return decoder


def _find(path: Path) -> tuple[Path | None, Path]:
    """The config.json that belongs to it, if any, and the file with the weights."""
    if path.is_file():
        return None, path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; a video codec is {KINDS}")
    for folder in (path, path / "vae"):
        if (folder / DIFFUSERS).is_file():
            if not (folder / CONFIG).is_file():
                raise CheckpointError(
                    f"{folder}: {CONFIG} missing beside {DIFFUSERS}; copy it from where the VAE came from"
                )
            return folder / CONFIG, folder / DIFFUSERS
    if (path / OFFICIAL).is_file():
        return None, path / OFFICIAL
    raise CheckpointError(f"{path}: holds no video codec; expected {KINDS}")


def _read_config(path: Path) -> WanVaeConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    kind = values.get("_class_name")
    if kind != "AutoencoderKLWan":
        raise CheckpointError(
            f"{path}: is a {kind or 'model of no named class'}, expected AutoencoderKLWan; the VAE of "
            "another model cannot read these latents: get the vae/ folder of Wan2.1"
        )
    wrong = [
        f"{key} {values[key]!r} (expected {allowed[0]!r})"
        for key, allowed in _FIXED.items()
        if key in values and values[key] not in allowed
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: not the VAE of Wan2.1 (perhaps that of Wan2.2 5B): {', '.join(wrong)}; get the "
            "vae/ folder of Wan2.1"
        )
    kept = {k: v for k, v in values.items() if k not in _IGNORED and k not in _FIXED}
    lists = ("dim_mult", "temperal_downsample", "latents_mean", "latents_std")
    for key in lists:
        if key in kept and not isinstance(kept[key], list):
            raise ConfigError(f"{path}: {key} must be a list, found {kept[key]!r}")
    try:
        return from_mapping(WanVaeConfig, kept, str(path))
    except ConfigError as error:
        where = "" if str(error).startswith(str(path)) else f"{path}: "
        raise ConfigError(f"{where}{error}") from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file}: is empty; copy or download it again")
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except (SafetensorError, *TORCH_ERRORS) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        code = " it may hold code, which is never run;" if "weights_only" in str(error) else ""
        raise CheckpointError(
            f"{file}: not readable as weights, perhaps cut short ({first_line});{code} copy or download it "
            "again"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise CheckpointError(
            f"{file}: expected tensors by name and nothing else; a video codec is {KINDS}"
        )
    return dict(found)


def _checked(file: Path, tensors: Mapping[str, Tensor], expected: Shapes) -> dict[str, Tensor]:
    """All `expected` tensors as float32, or one error that lists all that is wrong."""
    problems = [f"{k} missing {list(shape)}" for k, shape in expected.items() if k not in tensors]
    for key, value in tensors.items():
        shape = expected.get(key)
        if shape is None:
            problems.append(f"{key} extra {list(value.shape)}")
        elif tuple(value.shape) != shape:
            problems.append(f"{key} misshapen: expected {list(shape)}, found {list(value.shape)}")
        elif value.dtype not in _FLOATS:
            kind = str(value.dtype).removeprefix("torch.")
            problems.append(f"{key} of type {kind}: expected float32, float16 or bfloat16")
        elif not torch.isfinite(value).all():
            problems.append(f"{key} holds infinite or not-a-number values")
    if problems:
        more = [] if len(problems) <= MAX_LISTED else [f"and {len(problems) - MAX_LISTED} more"]
        raise CheckpointError(
            f"{file}: {len(problems)} tensors do not fit ({len(expected)} expected): "
            + "; ".join(problems[:MAX_LISTED] + more)
            + "; copy or download it again, or name the codec of Wan2.1"
        )
    return {key: tensors[key].to(torch.float32) for key in expected}


def _config_of(file: Path, tensors: Mapping[str, Tensor]) -> WanVaeConfig:
    """The hyper-parameters that official tensors tell; what they do not tell is Wan2.1's."""
    keys = ("encoder.conv1.weight", "decoder.conv1.weight", "conv2.weight")
    found = [tensors.get(key) for key in keys]
    first, last, latent = (tuple(t.shape) if t is not None else () for t in found)
    if not (len(first) == len(last) == len(latent) == 5):
        shown = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise CheckpointError(
            f"{file}: not a codec of Wan2.1; expected {' and '.join(keys)} with 5 axes, found {shown}; a "
            f"video codec is {KINDS}"
        )
    defaults = WanVaeConfig()
    if latent[0] != defaults.z_dim:
        raise CheckpointError(
            f"{file}: the VAE of another model: {latent[0]} latent channels, expected {defaults.z_dim}; get "
            f"{OFFICIAL}"
        )
    return WanVaeConfig(
        base_dim=first[0], decoder_base_dim=max(1, last[0] // defaults.dim_mult[-1])
    )


_ENDS = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_NAME = re.compile(
    r"(?P<half>(?:encoder|decoder)\.)?"
    r"(?:(?P<middle>mid_block)\.(?P<part>resnets|attentions)\.(?P<index>\d+)\."
    r"|down_blocks\.(?P<down>\d+)\."
    r"|up_blocks\.(?P<up>\d+)\.(?P<kind>resnets|upsamplers)\.(?P<block>\d+)\.)?"
    r"(?P<end>.+)\.(?P<what>weight|bias|gamma)"
)


def _official_name(key: str, told: WanVaeConfig | None) -> str:
    """diffusers' name of a tensor -> the official one; without diffusers' config it is official already."""
    match = _NAME.fullmatch(key) if told is not None else None
    if match is None or told is None:
        return key
    half, end = match["half"] or "", match["end"]
    end = _ENDS.get(end, end)
    where = ""
    if match["middle"]:
        index = int(match["index"])
        where = f"middle.{2 * index if match['part'] == 'resnets' else 1}."
    elif match["down"]:
        where = f"downsamples.{match['down']}."
    elif match["up"]:
        stage = int(match["up"]) * (told.num_res_blocks + 2)
        inside = int(match["block"]) if match["kind"] == "resnets" else told.num_res_blocks + 1
        where = f"upsamples.{stage + inside}."
    return f"{half}{where}{end}.{match['what']}"


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return whole.hexdigest()
