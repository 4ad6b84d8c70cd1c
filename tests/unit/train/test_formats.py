"""The same network in every format that users have it in: found, named, configured and loaded alike."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from asd_rt.config import ModelConfig
from asd_rt.errors import AsdError, CheckpointError, ConfigError
from train.checkpoint import Checkpoint, load_checkpoint
from train.formats.names import bare, is_diffusers, to_diffusers, to_official
from train.formats.random_weights import CONFIGS, random_source
from train.formats.settings import diffusers_json, official_json
from train.formats.shapes import weight_shapes
from train.formats.tensors import open_file
from train.formats.write import write_checkpoint

CONFIG = replace(CONFIGS["small"], dim=128, num_heads=1, ffn_dim=48, freq_dim=16, text_dim=8)
SOURCE = random_source(CONFIG, torch.float32, seed=0)
WEIGHTS = {name: SOURCE.read(name) for name in SOURCE.shapes}
LAYOUTS: dict[str, Callable[[Path], Path]] = {}
Weights = Mapping[str, Tensor]


def layout(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    LAYOUTS[write.__name__] = write
    return write


def renamed(rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): weight for name, weight in WEIGHTS.items()}


@layout
def official(folder: Path) -> Path:
    write_checkpoint(folder / "wan", "official", SOURCE)
    return folder / "wan"


@layout
def official_shards(folder: Path) -> Path:
    write_checkpoint(folder / "wan", "official", SOURCE, shard_bytes=400_000)
    assert len(list((folder / "wan").glob("*.safetensors"))) > 2
    return folder / "wan"


@layout
def index_file(folder: Path) -> Path:
    return official_shards(folder) / "diffusion_pytorch_model.safetensors.index.json"


@layout
def shards_without_config(folder: Path) -> Path:
    found = official_shards(folder)
    (found / "config.json").unlink()
    return found


@layout
def file_in_its_folder(folder: Path) -> Path:
    return official(folder) / "diffusion_pytorch_model.safetensors"


@layout
def diffusers_pipeline(folder: Path) -> Path:
    (folder / "pipeline" / "vae").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    write_checkpoint(folder / "pipeline" / "transformer", "diffusers", SOURCE)
    return folder / "pipeline"


@layout
def diffusers_file_alone(folder: Path) -> Path:
    save_file(renamed(to_diffusers), folder / "wan.safetensors")
    return folder / "wan.safetensors"


@layout
def comfyui(folder: Path) -> Path:
    save_file(renamed(lambda name: f"model.diffusion_model.{name}"), folder / "wan.safetensors")
    return folder / "wan.safetensors"


@layout
def self_forcing(folder: Path) -> Path:
    write_checkpoint(folder / "sf.pt", "self-forcing", SOURCE)
    return folder / "sf.pt"


@layout
def self_forcing_trainer(folder: Path) -> Path:
    """With the raw weights and a critic beside the average, as a training run leaves it."""
    fsdp = renamed(
        lambda n: f"model._fsdp_wrapped_module.{n}".replace(
            ".ffn.", "._checkpoint_wrapped_module.ffn."
        )
    )
    raw = {name: weight + 1 for name, weight in fsdp.items()}
    saved = {"generator": raw, "critic": {"x": torch.ones(1)}, "generator_ema": fsdp, "step": 600}
    torch.save(saved, folder / "model.pt")
    return folder


@layout
def compiled_state_dict(folder: Path) -> Path:
    saved = {"epoch": 3, "state_dict": renamed(lambda name: f"_orig_mod.module.{name}")}
    torch.save(saved | {"generator_ema": None}, folder / "last.pth")
    return folder / "last.pth"


@layout
def bare_legacy_file_with_tables(folder: Path) -> Path:
    saved = {**WEIGHTS, "freqs": torch.zeros(1024, 64, dtype=torch.complex128)}
    torch.save(saved, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_format_gives_the_same_network(tmp_path: Path, name: str) -> None:
    found = load_checkpoint(LAYOUTS[name](tmp_path))
    assert found.config == CONFIG
    assert found.weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(found.weights[key], weight) for key, weight in WEIGHTS.items())
    assert found.deployment.block_frames == 3
    assert found.codec is None
    assert not found.name.startswith(".")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["official", "diffusers", "self-forcing"])
def test_half_precision_stays_half(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    out = tmp_path / "wan.pt"
    write_checkpoint(out, form, random_source(CONFIG, dtype, seed=0))
    found = load_checkpoint(out)
    assert all(torch.equal(found.weights[k], w.to(dtype)) for k, w in WEIGHTS.items())
    assert {t.dtype for t in found.build_model().parameters()} == {torch.float32}
    assert {t.dtype for t in found.build_model(dtype).parameters()} == {dtype}


def test_names_translate_both_ways() -> None:
    names = list(weight_shapes(CONFIG))
    theirs = [to_diffusers(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [to_official(name) for name in theirs] == names
    assert is_diffusers(theirs)
    assert not is_diffusers(names)
    assert to_official("blocks.1.attn2.to_out.0.bias") == "blocks.1.cross_attn.o.bias"
    assert to_official("blocks.1.norm2.weight") == "blocks.1.norm3.weight"
    assert to_official("blocks.0.unheard.weight") == "blocks.0.unheard.weight"


WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@given(
    name=st.sampled_from(list(WEIGHTS)),
    front=st.lists(
        st.sampled_from((*WRAPPERS, "model.", "diffusion_model.", "module.")), max_size=4
    ),
    inner=st.lists(st.sampled_from(WRAPPERS), max_size=2),
    place=st.integers(0, 5),
)
def test_prefixes_in_any_combination(
    name: str, front: list[str], inner: list[str], place: int
) -> None:
    words = name.split(".")
    place = min(place, len(words) - 1)
    middle = "".join(inner) + ".".join(words[place:])
    assert bare("".join(front) + "".join(f"{w}." for w in words[:place]) + middle) == name


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    twice = {**WEIGHTS, "model.head.head.bias": WEIGHTS["head.head.bias"].clone()}
    save_file(twice, tmp_path / "wan.safetensors")
    with pytest.raises(
        CheckpointError, match=r"head\.head\.bias and model\.head|model\.head.*and head"
    ):
        load_checkpoint(tmp_path)


def test_sha256_of_a_file_is_its_own(tmp_path: Path) -> None:
    path = self_forcing(tmp_path)
    assert load_checkpoint(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_sha256_of_shards_covers_each(tmp_path: Path) -> None:
    folder = official_shards(tmp_path)
    before = load_checkpoint(folder).sha256
    shard = sorted(folder.glob("*.safetensors"))[1]
    weights = load_file(shard)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, shard)
    assert load_checkpoint(folder).sha256 != before


def test_shipped_student_keeps_its_sha256(root: Path) -> None:
    manifest = json.loads(next((root / "asd_rt" / "engine").glob("*.onnx.json")).read_text())
    assert (
        load_checkpoint(root / "train" / "tiny_student").sha256 == manifest["checkpoint"]["sha256"]
    )


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    form=st.sampled_from(("zip", "legacy", "safetensors")),
    suffix=st.sampled_from((".pt", ".safetensors")),
)
def test_damage_anywhere_is_one_line_or_harmless(
    data: st.DataObject, form: str, suffix: str
) -> None:
    whole = io.BytesIO()
    saved = {f"blocks.{i}.weight": torch.ones(3, 4) for i in range(2)}
    if form == "safetensors":
        whole.write(save(saved))
    else:
        torch.save({"generator": saved}, whole, _use_new_zipfile_serialization=form == "zip")
    content = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        problem = ""
        try:
            tensors = open_file(path).tensors
            shapes = {name: tuple(tensor.read().shape) for name, tensor in tensors.items()}
        except CheckpointError as error:
            problem = str(error)
    assert "\n" not in problem
    assert problem or shapes == {name: tensor.shape for name, tensor in tensors.items()}


class TestConfiguration:
    """From config.json where there is one, else from the tensors."""

    def folder(self, tmp_path: Path, values: dict[str, Any], weights: Weights = WEIGHTS) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(values))
        save_file(dict(weights), tmp_path / "model.safetensors")
        return tmp_path

    def load(self, tmp_path: Path, values: dict[str, Any]) -> Checkpoint:
        return load_checkpoint(self.folder(tmp_path, values))

    def test_of_wan(self, tmp_path: Path) -> None:
        """As Wan2.1 ships it: no text_dim, which only the tensors say."""
        values = official_json(CONFIG) | {"_diffusers_version": "0.30.0"}
        assert "text_dim" not in values
        assert self.load(tmp_path, values).config == CONFIG

    def test_of_causal_trainers(self, tmp_path: Path) -> None:
        values = official_json(CONFIG) | {
            "_class_name": "CausalWanModel", "local_attn_size": 12, "sink_size": 3, "qk_norm": True,
            "cross_attn_norm": True, "window_size": [-1, -1],
        }  # fmt: skip
        found = self.load(tmp_path, values)
        assert found.config == replace(CONFIG, local_attn_size=12, sink_size=3)
        assert (found.deployment.window_frames, found.deployment.sink_frames) == (12, 3)

    def test_of_diffusers_with_a_window_and_another_length(self, tmp_path: Path) -> None:
        config = replace(CONFIG, text_len=100, local_attn_size=9, sink_size=1)
        source = replace_source(config)
        write_checkpoint(tmp_path / "transformer", "diffusers", source)
        assert load_checkpoint(tmp_path).config == config
        assert diffusers_json(CONFIG).keys().isdisjoint({"text_len", "local_attn_size"})

    def test_of_nothing_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            load_checkpoint(self_forcing(tmp_path))
        assert "weights of generator_ema" in caplog.text
        for part in (
            "dim 128 (tensors)",
            "num_heads 1 (dim / 128)",
            "text_len 512 (default)",
            "eps 1e-06",
        ):
            assert part in caplog.text

    def test_of_a_narrow_network_needs_its_heads(self, tmp_path: Path) -> None:
        source = replace_source(replace(CONFIG, dim=96))
        save_file({k: source.read(k) for k in source.shapes}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=r"config\.json missing.* width 96.*num_heads"):
            load_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text('{"num_heads": 2}')
        assert load_checkpoint(tmp_path).config == replace(CONFIG, dim=96, num_heads=2)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"dim": 256}, r"config\.json says dim 256, the tensors 128: \d+ of"),
            (
                {"num_layers": 3, "text_dim": 9},
                "text_dim 9, the tensors 8; num_layers 3, the tensors 2",
            ),
            ({"model_type": "i2v"}, "model_type i2v"),
            ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan"),
            ({"qk_norm": False}, "qk_norm False"),
            ({"eps": "small"}, "eps"),
            ({"num_frames": 3}, "unknown key num_frames"),
            ({"sink_size": "3"}, "sink_size"),
            ({"patch_size": [1, 4, 4]}, "patch_size"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
        with pytest.raises(AsdError, match=told) as error:
            self.load(tmp_path, official_json(CONFIG) | changes)
        assert "\n" not in str(error.value)
        assert "config.json" in str(error.value)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"attention_head_dim": "128"}, "whole numbers"),
            ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim 5120"),
            ({"image_dim": 1280}, "image_dim 1280"),
            ({"surprise": 1}, "unknown surprise"),
        ],
    )
    def test_mistakes_in_theirs(self, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigError, match=told):
            self.load(tmp_path, diffusers_json(CONFIG) | changes)


def replace_source(config: ModelConfig) -> Any:
    return random_source(config, torch.float32, seed=0)


class TestUndistilled:
    """ODE-initialised weights load, with a warning."""

    @pytest.mark.parametrize(
        "name", ["ode_init.pt", "wan_causal_ode_checkpoint_003000.pt", "ODE-init.pth"]
    )
    def test_by_name(self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
        torch.save({"generator": dict(WEIGHTS)}, tmp_path / name)
        load_checkpoint(tmp_path / name)
        assert [r.levelname for r in caplog.records if "ODE-initialised" in r.message] == [
            "WARNING"
        ]

    def test_by_metadata(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        save_file(WEIGHTS, tmp_path / "a.safetensors", metadata={"stage": "ode_init"})
        load_checkpoint(tmp_path)
        assert "ODE-initialised" in caplog.text

    def test_by_an_entry(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        torch.save({"generator": dict(WEIGHTS), "stage": "ode"}, tmp_path / "a.pt")
        load_checkpoint(tmp_path)
        assert "ODE-initialised" in caplog.text

    @pytest.mark.parametrize("name", ["model.pt", "self_forcing_dmd.pt", "code.pt", "diode_1.pt"])
    def test_not_of_others(
        self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        torch.save({"generator": dict(WEIGHTS)}, tmp_path / name)
        load_checkpoint(tmp_path / name)
        assert "ODE" not in caplog.text
