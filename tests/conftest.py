"""Shared by all tests: where things lie, and which tests this machine can run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHORT = ROOT / "tests" / "unit" / "asd_rt"  # many files of a few seconds each
# An example that takes long says that the machine is busy, not that the code is wrong.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")
MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is remembered between runs stays among the tests, those of commands included."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ASD_RT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """`make_once(name, fill)`: a folder, filled by whichever process asks first, for all to read.

    Session fixtures are made once in each of pytest-xdist's processes; what takes long is made once by this.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose own folder lies within that of the whole run
        base = base.parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, unfinished = base / "shared" / name, base / "shared" / f"{name}.part"
        folder.parent.mkdir(exist_ok=True)
        with Path(f"{folder}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it should the process die
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def data(root: Path) -> Path:
    """tests/data, with the golden traces."""
    return root / "tests" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with tests marked slow first and short ones last, so that all processes end together.

    Skip tests marked gpu where there is no NVIDIA driver.
    """
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: (item.path not in slow, item.path.is_relative_to(SHORT)))
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA driver on this machine"))


SENTENCES = (
    "a cat walks on the grass, realistic",
    "一只猫在草地上走，色调艳丽，过曝，静态",
    "the red balloon 🎈 flies over Paris; naïve café",
)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of UMT5's kind, trained on three sentences: <pad> 0, </s> 1, <unk> 2, then its pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def write_umt5(tokenizer_json: Path) -> Callable[..., Path]:
    """Write a random UMT5 encoder as transformers saves one, with its tokenizer, into a folder."""

    def write(folder: Path, d_model: int = 16, half: bool = False, **settings: Any) -> Path:
        import torch
        from safetensors.torch import save_file

        config = {
            "vocab_size": 256,
            "d_model": d_model,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 3,
        } | settings
        generator = torch.Generator().manual_seed(0)
        inner, wide = config["num_heads"] * config["d_kv"], config["d_ff"]
        shapes: dict[str, tuple[int, ...]] = {"shared": (config["vocab_size"], d_model)}
        for i in range(config["num_layers"]):
            attention, forward = (f"encoder.block.{i}.layer.{part}." for part in (0, 1))
            for name in "qkv":
                shapes[f"{attention}SelfAttention.{name}"] = (inner, d_model)
            shapes[f"{attention}SelfAttention.o"] = (d_model, inner)
            shapes[f"{attention}SelfAttention.relative_attention_bias"] = (32, config["num_heads"])
            shapes[f"{attention}layer_norm"] = shapes[f"{forward}layer_norm"] = (d_model,)
            for name in ("wi_0", "wi_1"):
                shapes[f"{forward}DenseReluDense.{name}"] = (wide, d_model)
            shapes[f"{forward}DenseReluDense.wo"] = (d_model, wide)
        shapes["encoder.final_layer_norm"] = (d_model,)
        dtype = torch.bfloat16 if half else torch.float32
        tensors = {
            f"{name}.weight": (0.3 * torch.randn(shape, generator=generator)).to(dtype)
            for name, shape in shapes.items()
        }
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        described = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", **config}
        (folder / "config.json").write_text(json.dumps(described))
        shutil.copy(tokenizer_json, folder / "tokenizer.json")
        return folder

    return write
