"""Prompts through an engine's text encoder against transformers: the same tokenizer, weights and cleaning."""

from __future__ import annotations

import html
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

import asd_rt  # noqa: E402
from asd_rt.config import ModelConfig  # noqa: E402
from asd_rt.manifest import read_manifest  # noqa: E402
from export.build import main  # noqa: E402
from export.text import add_text_encoder  # noqa: E402
from export.umt5 import Umt5Config, buckets_by_offset, positions  # noqa: E402
from export.umt5_source import open_umt5  # noqa: E402
from train.checkpoint import save_checkpoint  # noqa: E402
from train.model import WanModel  # noqa: E402

Array = np.ndarray[Any, Any]
MAX_TOKENS, TEXT_DIM = 512, 32
PROMPTS = (
    "",
    "   \n\t ",
    "a cat walks on the grass, realistic",
    "A Cat WALKS on the Grass!!! (realistic)",
    "一只猫在草地上走",
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰",
    "the red balloon 🎈 flies over Paris",
    "🎈",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽",
    "naïve café, Zürich, Łódź, São Paulo",
    "schÃ¶n &amp; gut",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; brave",
    "“curly” ‘quotes’ … and—dashes",
    "ｆｕｌｌ　ｗｉｄｔｈ",
    "привет мир, кот идёт по траве",
    "العربية والعبرية עברית",
    "tabs\tand\nnew lines   and  blanks",
    "x" * 200,
    "a cat walks 一只猫 🎈 " * 100,
    " ".join(f"word{i}" for i in range(600)),
)


def clean(text: str) -> str:
    """As Wan cleans, written a second time."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


@pytest.fixture(scope="module")
def umt5(tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random UMT5 encoder, and its tokenizer, saved by transformers."""
    folder = tmp_path_factory.mktemp("transformers") / "umt5"
    config = transformers.UMT5Config(
        vocab_size=300, d_model=TEXT_DIM, d_kv=8, d_ff=48, num_layers=3, num_heads=5
    )
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "relative" in name else 0.3)
    model.save_pretrained(folder)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_json), **special
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(umt5: Path) -> list[Array]:
    """Each prompt's embedding [1, tokens, text_dim] by transformers, which pads to 512."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(umt5)
    model = transformers.UMT5EncoderModel.from_pretrained(umt5).eval()
    found = []
    for prompt in PROMPTS:
        given = tokenizer(
            clean(prompt),
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            add_special_tokens=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            states = model(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
        found.append(states[:, : int(given.attention_mask.sum())].numpy())
    return found


@pytest.fixture(scope="module")
def engine(umt5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that takes 512 tokens, built with the text encoder."""
    folder = tmp_path_factory.mktemp("engine")
    config = ModelConfig(
        dim=32,
        ffn_dim=24,
        freq_dim=4,
        text_dim=TEXT_DIM,
        text_len=MAX_TOKENS,
        in_dim=2,
        out_dim=2,
        num_heads=2,
        num_layers=1,
    )
    save_checkpoint(folder / "student", config, WanModel(config).state_dict())
    (folder / "engines").mkdir()
    words = ("--checkpoint", folder / "student", "--text-encoder", umt5, "--target", "onnx")
    assert main([*map(str, words), "--out", str(folder / "engines")]) == 0
    return folder / "engines" / "asd_fp32.onnx"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes from another test's cache."""
    monkeypatch.setenv("ASD_RT_CACHE", str(tmp_path))


def test_twenty_prompts(
    engine: Path, expected: list[Array], relative_l2: Callable[[Array, Array], float]
) -> None:
    assert read_manifest(engine).tokenizer == {"kind": "umt5", "max_tokens": MAX_TOKENS}
    with asd_rt.open(engine) as session:
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            assert relative_l2(session.context(prompt), wanted) <= 1e-4, prompt
    lengths = [wanted.shape[1] for wanted in expected]
    assert len(lengths) == 20
    assert lengths[:2] == [1, 1]
    assert lengths[-2:] == [MAX_TOKENS, MAX_TOKENS]


@pytest.mark.parametrize(("precision", "budget"), [("fp16", 2e-3), ("int8", 5e-2)])
def test_smaller_weights_stay_near(
    engine: Path,
    umt5: Path,
    expected: list[Array],
    relative_l2: Callable[[Array, Array], float],
    tmp_path: Path,
    precision: str,
    budget: float,
) -> None:
    copy = tmp_path / "engines"
    shutil.copytree(engine.parent, copy)
    add_text_encoder(open_umt5(umt5), precision, [copy / engine.name], force=False)
    with asd_rt.open(copy / engine.name) as session:
        far = [
            relative_l2(session.context(p), e) for p, e in zip(PROMPTS[:8], expected, strict=False)
        ]
    assert max(far) <= budget
    assert max(far) > 1e-6  # they are other weights
    sizes = [
        read_manifest(path).parts["text_weights"].bytes for path in (engine, copy / engine.name)
    ]
    assert sizes[1] < sizes[0] * (0.6 if precision == "fp16" else 0.45)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 130, 300, 512])
def test_relative_positions(length: int) -> None:
    config = transformers.UMT5Config(num_layers=1)
    attention = transformers.models.umt5.modeling_umt5.UMT5Attention(
        config, has_relative_attention_bias=True
    )
    index = torch.arange(length)
    wanted = attention._relative_position_bucket(index[None] - index[:, None])
    ours = buckets_by_offset(Umt5Config(9, 4, 2, 4, 1, 2))
    assert torch.equal(positions(length, ours), wanted)
