"""`export.build` of what is damaged or something else: one line says what to do, and nothing is written."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export import engine as engine_module
from export.build import main
from train.formats.names import to_diffusers
from train.formats.random_weights import CONFIGS, random_source
from train.formats.write import write_checkpoint

CONFIG = replace(CONFIGS["small"], dim=128, num_heads=1, ffn_dim=32, freq_dim=8, text_dim=4)
SOURCE = random_source(CONFIG, torch.float32, seed=0)
WEIGHTS = {name: SOURCE.read(name) for name in SOURCE.shapes}
NAME = "diffusion_pytorch_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {}
Break = Callable[[Path], Path]


def told(*words: str) -> Callable[[Break], Break]:
    """A way to break a checkpoint, and what the error must say."""

    def remember(break_it: Break) -> Break:
        BROKEN[break_it.__name__] = (break_it, words)
        return break_it

    return remember


def official(folder: Path, shard_bytes: int = 10**9) -> Path:
    write_checkpoint(folder / "wan", "official", SOURCE, shard_bytes)
    return folder / "wan"


def edited(folder: Path, **changes: Tensor | None) -> Path:
    """An official folder with some tensors replaced, added or (None) taken away."""
    path = official(folder) / NAME
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)
    return path.parent


def alone(folder: Path, tensors: dict[str, Tensor], name: str = "wan.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def cut(path: Path, share: float) -> Path:
    os.truncate(path, int(path.stat().st_size * share))
    return path


@told(NAME, "cut short", "download it again")
def truncated_safetensors(folder: Path) -> Path:
    return cut(official(folder) / NAME, 0.6).parent


@told("wan.pt", "cut short", "download it again")
def truncated_pt(folder: Path) -> Path:
    write_checkpoint(folder / "wan.pt", "self-forcing", SOURCE)
    return cut(folder / "wan.pt", 0.6)


@told("is a .pt file", "wan.pt")
def pt_under_another_name(folder: Path) -> Path:
    write_checkpoint(folder / "wan.pt", "self-forcing", SOURCE)
    return (folder / "wan.pt").rename(folder / "wan.safetensors")


@told("wan.pt", "cut short")
def truncated_legacy_pt(folder: Path) -> Path:
    torch.save(WEIGHTS, folder / "wan.pt", _use_new_zipfile_serialization=False)
    return cut(folder / "wan.pt", 0.3)


@told("1 of 69", "head.head.bias of type I32", "F32, F16, BF16")
def whole_numbers(folder: Path) -> Path:
    return edited(folder, **{"head.head.bias": torch.ones(64, dtype=torch.int32)})


@told("in_dim 16, the tensors 20", "patch_embedding.weight misshapen: expected [128, 16, 1, 2, 2]")
def wrong_channel_count(folder: Path) -> Path:
    return edited(folder, **{"patch_embedding.weight": torch.ones(128, 20, 1, 2, 2)})


@told("takes 20 channels and gives 16")
def wrong_channel_count_without_config(folder: Path) -> Path:
    return alone(folder, WEIGHTS | {"patch_embedding.weight": torch.ones(128, 20, 1, 2, 2)})


@told(
    "num_layers 2, the tensors 1",
    "27 missing",
    *(f"blocks.1.{n} missing" for n in ("ffn.0.bias", "modulation")),
)
def missing_last_layer(folder: Path) -> Path:
    return edited(folder, **{name: None for name in WEIGHTS if name.startswith("blocks.1.")})


@told("27 missing", "blocks.0.self_attn.norm_q.weight missing [128]")
def missing_first_layer_without_config(folder: Path) -> Path:
    return alone(folder, {k: w for k, w in WEIGHTS.items() if not k.startswith("blocks.0.")})


@told("num_layers 2, the tensors 3", "27 extra", "blocks.2.norm3.weight extra [128]")
def extra_layer(folder: Path) -> Path:
    more = {k.replace("s.1", "s.2"): w for k, w in WEIGHTS.items() if k.startswith("blocks.1.")}
    return edited(folder, **more)


@told(
    "3 of 69",
    "1 missing, 1 extra, 1 misshapen",
    "head.modulation missing",
    "odd extra",
    "norm3.bias misshapen",
)
def all_at_once(folder: Path) -> Path:
    changes = {"head.modulation": None, "odd": torch.ones(2), "blocks.0.norm3.bias": torch.ones(3)}
    return edited(folder, **changes)


@told("infinite or not-a-number values in time_embedding.0.bias")
def not_finite(folder: Path) -> Path:
    return edited(folder, **{"time_embedding.0.bias": torch.full((128,), float("inf"))})


@told("config.json says dim 256, the tensors 128", "misshapen")
def config_that_contradicts(folder: Path) -> Path:
    path = official(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dim": 256}))
    return path.parent


@told("a LoRA", "merge it")
def lora(folder: Path) -> Path:
    names = ("lora_A", "lora_B")
    tensors = {f"diffusion_model.blocks.0.self_attn.q.{n}.weight": torch.ones(4, 4) for n in names}
    return alone(folder, tensors)


@told("a LoRA", "lora_down")
def lora_of_kohya(folder: Path) -> Path:
    return alone(folder, {"lora_unet_blocks_0_cross_attn_k.lora_down.weight": torch.ones(4, 4)})


@told("GGUF", "fp32, fp16 or bf16")
def gguf(folder: Path) -> Path:
    (folder / "wan-Q4_K.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    return folder


@told("GGUF")
def gguf_under_another_name(folder: Path) -> Path:
    return gguf(folder).joinpath("wan-Q4_K.gguf").rename(folder / "wan.safetensors")


@told("quantised", "self_attn.q.scale_weight", "fp32, fp16 or bf16")
def scaled_fp8(folder: Path) -> Path:
    return alone(folder, WEIGHTS | {"blocks.0.self_attn.q.scale_weight": torch.ones(1)})


@told("quantised", "blocks.0.ffn.0.weight_scale")
def scaled_beside(folder: Path) -> Path:
    return alone(folder, WEIGHTS | {"blocks.0.ffn.0.weight_scale": torch.ones(1)})


@told("quantised", "head.head.bias_scale")
def scaled_under_its_own_name(folder: Path) -> Path:
    return alone(folder, WEIGHTS | {"head.head.bias_scale": torch.ones(1)})


@told("quantised", "F8_E4M3")
def fp8(folder: Path) -> Path:
    name = "blocks.0.ffn.0.weight"
    return alone(folder, WEIGHTS | {name: WEIGHTS[name].to(torch.float8_e4m3fn)})


@told("quantised", "I8")
def int8_in_a_pt(folder: Path) -> Path:
    name = "blocks.0.ffn.0.weight"
    torch.save({"generator": WEIGHTS | {name: WEIGHTS[name].to(torch.int8)}}, folder / "wan.pt")
    return folder


@told("is empty (0 bytes)", "-00002-of-")
def zero_byte_shard(folder: Path) -> Path:
    found = official(folder, 400_000)
    next(found.glob("*-00002-of-*")).write_bytes(b"")
    return found


@told("index.json", "1 of 3 files", "-00002-of-00003.safetensors", "download")
def absent_shard(folder: Path) -> Path:
    found = official(folder, 700_000)
    next(found.glob("*-00002-of-00003*")).unlink()
    return found


@told("without their index")
def absent_index(folder: Path) -> Path:
    found = official(folder, 400_000)
    next(found.glob("*.index.json")).unlink()
    return found


@told("not where the index says")
def index_of_other_shards(folder: Path) -> Path:
    path = next(official(folder, 400_000).glob("*.index.json"))
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["head.head.bias"] = files[0]
    path.write_text(json.dumps(index))
    return path.parent


@told("weight_map")
def index_that_leads_elsewhere(folder: Path) -> Path:
    path = next(official(folder, 400_000).glob("*.index.json"))
    path.write_text(
        path.read_text().replace('"diffusion_pytorch_model-', '"../diffusion_pytorch_model-')
    )
    return path.parent


@told("one shard of several", "missing")
def a_shard_alone(folder: Path) -> Path:
    return next(official(folder, 400_000).glob("*-00001-of-*"))


class Evil:
    """Pickled, it makes a file where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@told("pickled code (posix.mkdir)", "never run", ".safetensors")
def pickled_code(folder: Path) -> Path:
    torch.save({"generator_ema": WEIGHTS, "callback": Evil()}, folder / "wan.pt")
    return folder / "wan.pt"


@told("pickled code (posix.mkdir)", "never run")
def pickled_code_in_a_legacy_file(folder: Path) -> Path:
    torch.save({"a": Evil()}, folder / "wan.pt", _use_new_zipfile_serialization=False)
    return folder


@told("step (int)", "state_dict")
def no_tensors(folder: Path) -> Path:
    torch.save({"step": 3}, folder / "wan.pt")
    return folder


@told("autoencoder (VAE)", "--vae")
def vae(folder: Path) -> Path:
    torch.save(
        {"encoder.conv1.weight": torch.ones(96, 3, 3, 3, 3), "conv1.bias": torch.ones(32)},
        folder / "a.pth",
    )
    return folder / "a.pth"


@told("autoencoder (VAE)", "--vae")
def vae_of_diffusers(folder: Path) -> Path:
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    save_file({"decoder.conv_in.weight": torch.ones(4, 4, 3, 3, 3)}, folder / NAME)
    return folder


@told("text encoder", "--text-encoder")
def text_encoder(folder: Path) -> Path:
    return alone(
        folder,
        {"shared.weight": torch.ones(9, 4), "encoder.final_layer_norm.weight": torch.ones(4)},
    )


@told("text encoder", "--text-encoder")
def text_encoder_of_wan(folder: Path) -> Path:
    tensors = {
        "token_embedding.weight": torch.ones(9, 4),
        "blocks.0.attn.q.weight": torch.ones(4, 4),
    }
    torch.save(tensors, folder / "models_t5.pth")
    return folder


@told("image-to-video", "k_img")
def image_to_video(folder: Path) -> Path:
    return alone(folder, WEIGHTS | {"blocks.0.cross_attn.k_img.weight": torch.ones(128, 128)})


@told("image-to-video", "add_k_proj")
def image_to_video_of_diffusers(folder: Path) -> Path:
    tensors = {to_diffusers(name): weight for name, weight in WEIGHTS.items()}
    return alone(folder, tensors | {"blocks.0.attn2.add_k_proj.bias": torch.ones(128)})


@told("36 channels", "image-to-video")
def image_to_video_by_channels(folder: Path) -> Path:
    return edited(folder, **{"patch_embedding.weight": torch.ones(128, 36, 1, 2, 2)})


@told("VACE")
def vace(folder: Path) -> Path:
    return alone(folder, WEIGHTS | {"vace_blocks.0.after_proj.bias": torch.ones(128)})


@told("no Wan2.1 denoiser", "conv.weight")
def another_network(folder: Path) -> Path:
    return alone(folder, {"conv.weight": torch.ones(3)})


@told("transformer_2", "--checkpoint")
def two_networks(folder: Path) -> Path:
    for name in ("transformer", "transformer_2"):
        write_checkpoint(folder / name, "diffusers", SOURCE)
    return folder


@told("several files with weights", "a.safetensors, b.safetensors")
def several_files(folder: Path) -> Path:
    alone(folder, WEIGHTS, "a.safetensors")
    return alone(folder, WEIGHTS, "b.safetensors").parent


@told("Git LFS", "git lfs pull")
def lfs_pointer(folder: Path) -> Path:
    path = official(folder) / NAME
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    return path.parent


@told("model.safetensors missing", "a checkpoint is a folder with")
def empty_folder(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


@told("no such folder or file")
def nothing(folder: Path) -> Path:
    return folder / "nothing"


@told("holds no weights", "--checkpoint")
def config_given_as_checkpoint(folder: Path) -> Path:
    return official(folder) / "config.json"


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to export is a failure of the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("an export was begun")

    monkeypatch.setattr(engine_module, "export_part", refuse)


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("name", BROKEN)
def test_one_line_and_nothing_left(
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    break_it, words = BROKEN[name]
    source, out = tmp_path / "in", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    checkpoint = break_it(source)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert main(["--checkpoint", str(checkpoint), "--target", "onnx", "--out", str(out)]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1, streams.err
    assert caplog.text == ""
    for word in words:
        assert word in streams.err
    assert len(streams.err) < 4000
    assert sorted(tmp_path.rglob("*")) == before
