"""Text encoders on disk: every layout gives the same weights, and what does not fit is named."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from asd_rt.errors import AsdError, CheckpointError, ConfigError
from export.umt5 import TABLE, Umt5Config, buckets_by_offset, is_matrix
from export.umt5_source import open_umt5
from export.umt5_storage import StoredWeights, TensorFile, store, stored_tensors


@pytest.fixture(scope="session")
def transformers(write_umt5: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_umt5(tmp_path_factory.mktemp("umt5") / "umt5")


@pytest.fixture
def copy(transformers: Path, tmp_path: Path) -> Path:
    """A text encoder that a test may spoil."""
    shutil.copytree(transformers, tmp_path / "copy")
    return tmp_path / "copy"


def official_name(name: str) -> str:
    """A weight's name in Wan's file, spelled out a second time."""
    name = name.replace("shared.", "token_embedding.").replace("encoder.final_layer_norm", "norm")
    name = re.sub(r"encoder\.block\.(\d+)\.layer\.", r"blocks.\1.", name)
    for theirs, ours in (
        (".0.SelfAttention.relative_attention_bias", ".pos_embedding.embedding"),
        (".0.SelfAttention", ".attn"),
        (".0.layer_norm", ".norm1"),
        (".1.layer_norm", ".norm2"),
        (".1.DenseReluDense.wi_0", ".ffn.gate.0"),
        (".1.DenseReluDense.wi_1", ".ffn.fc1"),
        (".1.DenseReluDense.wo", ".ffn.fc2"),
    ):
        name = name.replace(theirs, ours)
    return name


def write_official(source: Path, folder: Path) -> Path:
    """Wan's layout: a .pth, the tokenizer two folders below, and the denoiser's config.json."""
    tensors = {official_name(k): v for k, v in load_file(source / "model.safetensors").items()}
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    torch.save(tensors, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copy(source / "tokenizer.json", folder / "google" / "umt5-xxl")
    (folder / "config.json").write_text(json.dumps({"model_type": "t2v", "dim": 1536}))
    return folder


def write_diffusers(source: Path, folder: Path) -> Path:
    """Two shards in text_encoder/ and the tokenizer beside it."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "text_encoder").mkdir()
    shutil.copy(source / "config.json", folder / "text_encoder")
    shutil.copy(source / "tokenizer.json", folder / "tokenizer")
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    files = {}
    for i, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / "text_encoder" / file)
        files |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class TestLayouts:
    def test_all_give_the_same(self, transformers: Path, tmp_path: Path) -> None:
        one = open_umt5(transformers)
        official = open_umt5(write_official(transformers, tmp_path / "wan"))
        diffusers = open_umt5(write_diffusers(transformers, tmp_path / "diffusers"))
        assert list(one) == list(official) == list(diffusers) == list(one.config.shapes())
        assert one.config == official.config == diffusers.config
        assert one.tokenizer == official.tokenizer == diffusers.tokenizer
        for name, shape in one.config.shapes().items():
            assert tuple(one[name].shape) == shape
            assert torch.equal(one[name], official[name])
            assert torch.equal(one[name], diffusers[name])

    def test_its_own_folder_of_a_diffusers_checkpoint(
        self, transformers: Path, tmp_path: Path
    ) -> None:
        folder = write_diffusers(transformers, tmp_path / "diffusers")
        assert open_umt5(folder / "text_encoder").sha256 == open_umt5(folder).sha256

    def test_decoder_and_second_names_are_left_out(self, copy: Path) -> None:
        before = open_umt5(copy)
        tensors = load_file(copy / "model.safetensors")
        more = ("encoder.embed_tokens.weight", "lm_head.weight", "decoder.block.0.any.weight")
        tensors |= {name: torch.zeros(2) for name in more}
        save_file(tensors, copy / "model.safetensors")
        after = open_umt5(copy)
        assert list(after) == list(before)
        assert after.sha256 != before.sha256

    def test_embedding_under_its_second_name(self, copy: Path) -> None:
        tensors = load_file(copy / "model.safetensors")
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        save_file(tensors, copy / "model.safetensors")
        assert tuple(open_umt5(copy)[TABLE].shape) == (256, 16)

    def test_says_whether_matrices_are_stored_in_half(
        self, write_umt5: Any, tmp_path: Path
    ) -> None:
        assert open_umt5(write_umt5(tmp_path / "half", half=True)).is_half
        assert not open_umt5(write_umt5(tmp_path / "full")).is_half

    def test_sentencepiece_is_converted(self, transformers: Path, tmp_path: Path) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        from tokenizers import Tokenizer

        shutil.copytree(transformers, tmp_path / "copy")
        (tmp_path / "copy" / "tokenizer.json").unlink()
        sentences = ["a cat walks on the grass", "一只猫在草地上走", "the red balloon flies"] * 20
        options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_prefix=str(tmp_path / "copy" / "spiece"),
            vocab_size=60,
            hard_vocab_limit=False,
            **options,
        )
        made = Tokenizer.from_str(open_umt5(tmp_path / "copy").tokenizer.decode())
        reader = sentencepiece.SentencePieceProcessor(str(tmp_path / "copy" / "spiece.model"))
        for text in (*sentences[:3], "", "a red cat 猫"):
            assert made.encode(text).ids == [*reader.encode(text), 1]


def spoil_index(folder: Path) -> None:
    index = {"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        key = f"encoder.block.0.layer.{name.replace('__', '.')}.weight"
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tokenizer(folder: Path, change: str) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    if change == "no end":
        values["post_processor"] = None
    else:
        values["model"]["vocab"] += [[f"word{i}", -9.0] for i in range(300)]
    path.write_text(json.dumps(values))


class Surprise:
    def __reduce__(self) -> Any:
        return print, ("code that came with a checkpoint",)


def spoil_pth(folder: Path, write: Callable[[Any, Path], None]) -> None:
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    write({"norm.weight": Surprise()}, folder / "models_t5_umt5.pth")


BROKEN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        ("no tokenizer", "tokenizer.json", "spiece.model"),
    ),
    "damaged tokenizer": (
        lambda f: os.truncate(f / "tokenizer.json", 100),
        ("tokenizer.json: cannot be read as a tokenizer",),
    ),
    "tokenizer of a larger model": (
        lambda f: change_tokenizer(f, "more words"),
        ("tokenizer.json: has", "the text encoder 256"),
    ),
    "tokenizer of another kind": (
        lambda f: change_tokenizer(f, "no end"),
        ("tokenizer.json: does not end prompts with </s>",),
    ),
    "sentencepiece that is none": (
        lambda f: (f / "tokenizer.json").rename(f / "spiece.model"),
        ("spiece.model: cannot be converted", "tokenizer.json"),
    ),
    "truncated weights": (
        lambda f: os.truncate(f / "model.safetensors", 9000),
        ("model.safetensors: not a readable safetensors file, perhaps cut short",),
    ),
    "zero bytes": (
        lambda f: os.truncate(f / "model.safetensors", 0),
        ("model.safetensors: ",),
    ),
    "index that names an absent shard": (
        spoil_index,
        ("model.safetensors.index.json: names model-00001-of-00002.safetensors, absent",),
    ),
    "two files without an index": (
        lambda f: shutil.copy(f / "model.safetensors", f / "other.safetensors"),
        ("found model.safetensors, other.safetensors",),
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("found none",)),
    "nothing": (
        lambda f: [path.unlink() for path in f.iterdir()],
        ("holds no text encoder", "config.json"),
    ),
    "T5": (lambda f: change_config(f, model_type="t5"), ("type 't5', expected 'umt5'",)),
    "CLIP": (lambda f: change_config(f, model_type="clip_text_model"), ("'clip_text_model'",)),
    "relu": (
        lambda f: change_config(f, feed_forward_proj="relu"),
        ("feed_forward_proj is 'relu'",),
    ),
    "no size": (lambda f: change_config(f, d_kv=0), ("config.json", "d_kv must be", "found 0")),
    "config that is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ("config.json: cannot be read as JSON",),
    ),
    "another width": (
        lambda f: change_config(f, d_ff=32),
        ("6 of 22 weights", "blocks.0.ffn.fc1.weight misshapen: expected [32, 16], found [24, 16]"),
    ),
    "missing, extra, misshapen and of another type": (
        lambda f: change_tensors(
            f,
            **{
                "0__SelfAttention__q": None,
                "0__SelfAttention__x": torch.zeros(2),
                "0__layer_norm": torch.zeros(3),
                "1__layer_norm": torch.zeros(16, dtype=torch.int64),
            },
        ),
        (
            "blocks.0.attn.q.weight missing [12, 16]",
            "encoder.block.0.layer.0.SelfAttention.x.weight extra [2]",
            "blocks.0.norm1.weight misshapen: expected [16], found [3]",
            "blocks.0.norm2.weight of type I64",
        ),
    ),
    "quantised": (
        lambda f: change_tensors(f, **{"0__SelfAttention__q__scale_weight": torch.zeros(1)}),
        ("is quantised", "scale_weight", "--text-precision int8"),
    ),
    "code in a .pth": (
        lambda f: spoil_pth(f, torch.save),
        ("models_t5_umt5.pth: holds pickled code",),
    ),
    "a pickle": (
        lambda f: spoil_pth(f, lambda value, path: path.write_bytes(pickle.dumps(value, 2))),
        ("models_t5_umt5.pth: holds pickled code (print)",),
    ),
}


@pytest.mark.parametrize(("spoil", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_what_does_not_fit_is_one_line(
    copy: Path, spoil: Any, told: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(copy)
    with pytest.raises(AsdError) as error:
        open_umt5(copy)
    message = str(error.value)
    assert "\n" not in message
    for words in told:
        assert words in message
    assert capsys.readouterr().out == ""


def test_wan_file_without_the_matrices_of_a_text_encoder(tmp_path: Path) -> None:
    torch.save({"decoder.conv1.weight": torch.zeros(2)}, tmp_path / "models_t5_umt5.pth")
    with pytest.raises(CheckpointError, match=r"no matrix token_embedding\.weight"):
        open_umt5(tmp_path)


@given(st.integers(1, 8), st.integers(1, 300))
def test_buckets_fall_apart_into_two_halves(quarter: int, more: int) -> None:
    config = Umt5Config(9, 4, 2, 4, 1, 2, 4 * quarter, quarter + more)
    buckets = buckets_by_offset(config).tolist()
    distance, half = quarter + more, 2 * quarter
    assert len(buckets) == 2 * distance + 1
    behind, ahead = buckets[distance::-1], buckets[distance:]
    assert behind[:quarter] == list(range(quarter))
    assert behind == sorted(behind)
    assert behind[-1] == half - 1
    assert [b - half for b in ahead[1:]] == behind[1:]


@given(st.integers(0, 2**31), st.sampled_from(["fp32", "fp16", "int8"]))
def test_stored_weights_are_near_the_source(
    transformers: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, precision: str
) -> None:
    source = open_umt5(transformers)
    generator = torch.Generator().manual_seed(seed)
    names = (TABLE, "blocks.0.attn.q", "blocks.1.ffn.fc2", "norm")
    values = {
        name: 100 ** (torch.rand((), generator=generator) - 0.5)
        * torch.randn(source.config.shapes()[name], generator=generator)
        for name in names
    }
    values[TABLE][3] = 0  # a row without a scale
    file = tmp_path_factory.getbasetemp() / "stored.weights"
    with TensorFile(file) as weights:
        for name, value in values.items():
            store(Named(source, value), name, precision, weights)
    stored = StoredWeights(weights, stored_tensors(source, precision))
    assert file.stat().st_size == weights.size
    for name, value in values.items():
        found = stored[name].float()
        if precision == "int8" and is_matrix(name):
            scale = stored[f"{name}.scale"]
            assert stored[name].dtype == torch.int8
            assert ((found * scale - value).abs() <= 0.501 * scale).all()
        elif precision == "fp16" and is_matrix(name):
            np.testing.assert_allclose(found.numpy(), value.numpy(), rtol=1e-3, atol=1e-7)
        else:
            assert torch.equal(found, value)


class Named:
    """A source whose every weight is one value."""

    def __init__(self, source: Any, value: torch.Tensor) -> None:
        self.name, self.config, self._value = source.name, source.config, value

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._value


@pytest.mark.parametrize(
    ("value", "precision", "told"),
    [
        (float("nan"), "fp32", "not-a-number values in blocks.0.attn.q"),
        (float("inf"), "int8", "infinite"),
        (1e6, "fp16", "too large for float16; use --text-precision fp32"),
    ],
)
def test_values_that_cannot_be_stored(
    transformers: Path, tmp_path: Path, value: float, precision: str, told: str
) -> None:
    source = Named(open_umt5(transformers), torch.full((16, 12), value))
    with (
        TensorFile(tmp_path / "stored.weights") as weights,
        pytest.raises(CheckpointError, match=told),
    ):
        store(source, "blocks.0.attn.q", precision, weights)


@pytest.mark.parametrize("size", [0, 100, 9000])
def test_damaged_pth(transformers: Path, tmp_path: Path, size: int) -> None:
    folder = write_official(transformers, tmp_path / "wan")
    os.truncate(folder / "models_t5_umt5-xxl-enc-bf16.pth", size)
    told = r"bf16\.pth: (not a readable \.pt file, perhaps cut short|is empty)"
    with pytest.raises(CheckpointError, match=told):
        open_umt5(folder)


def test_impossible_settings() -> None:
    with pytest.raises(ConfigError, match="buckets of relative positions"):
        Umt5Config(9, 4, 2, 4, 1, 2, relative_attention_num_buckets=30)
