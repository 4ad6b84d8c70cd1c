"""Files that are something else than the denoiser of a text-to-video model: recognised, named and refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

from asd_rt.errors import CheckpointError

_ORIGINAL = "give the original fp32, fp16 or bf16 weights"
_VARIANT = "only text-to-video networks without further inputs run here"
# (a tensor with such a bare name, what the file is, what to do)
_KINDS = (
    (
        r"(^|\.)(lora_(A|B|up|down|magnitude)\w*|lora|hada_w\w+|lokr_w\w+)(\.|$)|\.diff(_b)?$|\.lora_\w+$",
        "a LoRA (an addition to a model), not a model",
        "merge it into its base model first and give the result",
    ),
    (
        r"scale_weight$|scale_input$|int8_weight|scaled_fp8$|\.(qweight|qzeros|absmax|quant_map|comfy_quant)$"
        r"|weight_scale(_inv)?$|input_scale$",
        "quantised weights",
        _ORIGINAL,
    ),
    (
        r"(^|\.)_?flat_param",
        "the state of one FSDP process, whose tensors are flattened",
        "save a full state dict (FullStateDictConfig) and give that",
    ),
    (
        r"^(encoder|decoder)\.(conv1|conv_in|middle|mid_block|downsamples|upsamples|down_blocks|up_blocks)\."
        r"|^(post_)?quant_conv\.|^(encoder|decoder)\.\d+\.",
        "the weights of a video autoencoder (VAE), not a denoiser",
        "give it as --vae",
    ),
    (
        r"^shared\.weight$|^token_embedding\.weight$|^encoder\.(block\.\d+\.|embed_tokens\.)",
        "the weights of a text encoder, not a denoiser",
        "give it as --text-encoder",
    ),
    (
        r"^(visual|textual|vision_model|text_model|log_scale$)\b",
        "the weights of CLIP, not a denoiser",
        "text-to-video does not need it",
    ),
    (r"^vace_", "a VACE network", _VARIANT),
    (r"^(face_adapter|motion_encoder|pose_patch_embedding)\.", "a Wan-Animate network", _VARIANT),
    (
        r"^(casual_audio_encoder|audio_injector|cond_encoder)\.",
        "a speech-to-video network",
        _VARIANT,
    ),
    (r"^(control_adapter|ref_conv)\.", "a controlled (Fun-Control) network", _VARIANT),
    (
        r"^img_emb\.|\.(k_img|v_img|norm_k_img)\.|\.image_embedder\.|\.add_[kv]_proj\.|\.norm_added_[kq]\.",
        "an image-to-video network",
        _VARIANT,
    ),
)
# Types that only quantised weights have; whole numbers of 16 bits and more are merely wrong.
_SMALL_TYPE = re.compile(r"(F8_|F6_|F4$|I8$|U8$|torch\.(float8|float4|q?u?int[48]\b))")
_ODE = re.compile(r"(?<![a-z])ode(?:[-_ ]?init\w*)?(?![a-z])", re.IGNORECASE)


def refuse_others(where: str, types: Mapping[str, str]) -> None:
    """Refuse what is no text-to-video denoiser in floating point.

    Args:
        where: what to call the source in the error.
        types: bare name -> stored type.

    Raises:
        CheckpointError: names what it is.
    """
    for pattern, what, cure in _KINDS:
        hit = next((name for name in types if re.search(pattern, name)), None)
        if hit is not None:
            raise CheckpointError(f"{where}: holds {what} (it has {hit}); {cure}")
    scaled = next(
        (n for n in types if n.endswith("_scale") and n.removesuffix("_scale") in types), None
    )
    small = next((n for n, dtype in types.items() if _SMALL_TYPE.match(dtype)), None)
    if scaled or small:
        why = f"it has {scaled}" if scaled else f"{small} is of type {types[small or '']}"
        raise CheckpointError(f"{where}: holds quantised weights ({why}); {_ORIGINAL}")
    if not any(
        re.match(r"(patch_embedding|blocks\.\d+|head|condition_embedder)\.", n) for n in types
    ):
        found = ", ".join(list(types)[:3]) or "nothing"
        raise CheckpointError(
            f"{where}: holds no Wan2.1 denoiser: expected patch_embedding, blocks.0 ..., found {found}; "
            "is it the right file?"
        )


def undistilled(words: list[str]) -> str | None:
    """The word (file name, metadata) that says that weights are ODE-initialised, not distilled; or None."""
    return next((word for word in words if _ODE.search(word)), None)
