"""One strict way in: everything wrong with a checkpoint is said at once, and nothing loads partially."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asd_rt.config import ModelConfig
from asd_rt.errors import AsdError, CheckpointError, ConfigError
from train import checkpoint as module
from train.checkpoint import load_checkpoint, save_checkpoint
from train.codec import LinearCodec
from train.deployment import Deployment
from train.model import WanModel

CONFIG = ModelConfig(
    dim=12,
    ffn_dim=24,
    freq_dim=4,
    text_dim=3,
    text_len=4,
    in_dim=2,
    out_dim=2,
    num_heads=2,
    num_layers=1,
)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    torch.manual_seed(0)
    weights = WanModel(CONFIG).state_dict()
    deployment = Deployment(2, 6, 1, 3.0, (4, 2), 8, 4, {"red": 1, "a": 0})
    save_checkpoint(folder, CONFIG, weights, deployment, LinearCodec(2), torch.eye(3))
    return folder


def one_line(error: pytest.ExceptionInfo[AsdError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(student: Path) -> None:
    found = load_checkpoint(student)
    assert found.name == "student"
    assert found.config == CONFIG
    assert found.deployment == Deployment(2, 6, 1, 3.0, (4, 2), 8, 4, {"red": 1, "a": 0})
    assert found.table is not None
    assert torch.equal(found.table, torch.eye(3))
    assert found.codec is not None
    model = found.build_model()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in found.weights.items())
    assert not any(p.requires_grad for p in model.parameters())
    assert sorted(p.name for p in student.parent.iterdir()) == ["student"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_stored_type_and_models_are_float32(
    student: Path, dtype: torch.dtype
) -> None:
    path = student / "model.safetensors"
    stored = {k: v.to(dtype) for k, v in load_file(path).items()}
    save_file(stored, path)
    checkpoint = load_checkpoint(student)
    assert all(torch.equal(v, stored[k]) for k, v in checkpoint.weights.items())
    assert all(v.dtype == dtype for v in checkpoint.weights.values())
    model = checkpoint.build_model().state_dict()
    assert all(torch.equal(v, stored[k].float()) for k, v in model.items())


def test_official_keys_of_golden_folders(data: Path) -> None:
    for folder in sorted(p.parent for p in (data / "golden").glob("*/config.json")):
        found = load_checkpoint(folder)
        assert found.deployment.block_frames == 3
        assert found.deployment.window_frames == max(0, found.config.local_attn_size)
        assert found.deployment.sink_frames == found.config.sink_size
        assert found.deployment.latent_hw is None
        assert found.codec is None


def test_all_wrong_tensors_in_one_error(student: Path) -> None:
    path = student / "model.safetensors"
    weights = load_file(path)
    del weights["blocks.0.ffn.0.bias"], weights["head.modulation"]
    weights["blocks.1.modulation"] = torch.zeros(1, 6, 12)
    weights["blocks.0.norm3.weight"] = torch.zeros(13)
    weights["time_embedding.0.bias"] = weights["time_embedding.0.bias"].to(torch.float64)
    save_file(weights, path)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(student)
    text = one_line(error)
    assert str(path) in text
    for part in (
        "blocks.0.ffn.0.bias missing [24]",
        "head.modulation missing [1, 2, 12]",
        "blocks.1.modulation extra [1, 6, 12]",
        "blocks.0.norm3.weight misshapen: expected [12], found [13]",
        "time_embedding.0.bias of type F64",
    ):
        assert part in text


@pytest.mark.parametrize(
    "name", ["model.safetensors", "codec.safetensors", "text_encoder.safetensors"]
)
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_files(student: Path, name: str, damage: str) -> None:
    path = student / name
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[:-5], "garbage": b"not tensors at all", "empty": b""}[damage]
    )
    with pytest.raises(CheckpointError, match=name) as error:
        load_checkpoint(student)
    one_line(error)


def test_infinite_weights(student: Path) -> None:
    path = student / "model.safetensors"
    weights = load_file(path)
    weights["head.head.bias"][0] = float("nan")
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"head\.head\.bias") as error:
        load_checkpoint(student)
    one_line(error)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_absent_files(student: Path, name: str) -> None:
    (student / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} missing") as error:
        load_checkpoint(student)
    one_line(error)


def test_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as error:
        load_checkpoint(tmp_path / "nothing")
    one_line(error)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("config.json", {"dimm": 12}, "unknown key dimm"),
        ("config.json", {"num_heads": 5}, "multiple"),
        ("config.json", {"dim": "12"}, "dim must be a whole number"),
        ("deployment.json", {"window": 3}, "unknown key window"),
        ("deployment.json", {"block_frames": 0}, "block_frames"),
        ("deployment.json", {"latent_hw": [4, 3]}, "latent_hw"),
        ("deployment.json", {"timestep_shift": "five"}, "timestep_shift"),
        ("deployment.json", {"words": {"red": -1}}, "words"),
    ],
)
def test_config_mistakes(student: Path, name: str, changes: dict[str, Any], told: str) -> None:
    edit_json(student / name, **changes)
    with pytest.raises(ConfigError, match=told) as error:
        load_checkpoint(student)
    one_line(error)


def test_metadata_keys_are_dropped(student: Path) -> None:
    edit_json(
        student / "config.json", _class_name="WanModel", _diffusers_version="0.30", model_type="t2v"
    )
    assert load_checkpoint(student).config == CONFIG


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_config_that_is_no_json_object(student: Path, text: str) -> None:
    (student / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        load_checkpoint(student)
    one_line(error)


def test_words_and_vectors_belong_together(student: Path) -> None:
    edit_json(student / "deployment.json", words={"red": 3})
    with pytest.raises(CheckpointError, match="3 rows"):
        load_checkpoint(student)
    (student / "text_encoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match="belong together"):
        load_checkpoint(student)


def test_digest_covers_every_file(student: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(student, copy)
    assert load_checkpoint(copy).sha256 == load_checkpoint(student).sha256
    edit_json(copy / "deployment.json", fps=9)
    assert load_checkpoint(copy).sha256 != load_checkpoint(student).sha256


def test_half_precision_halves_the_file(student: Path, tmp_path: Path) -> None:
    weights = load_checkpoint(student).weights
    save_checkpoint(tmp_path / "half", CONFIG, weights, half=True)
    found = load_checkpoint(tmp_path / "half").weights
    assert all(torch.equal(v, weights[k].half().float()) for k, v in found.items())
    sizes = [(f / "model.safetensors").stat().st_size for f in (tmp_path / "half", student)]
    assert sizes[0] < 0.65 * sizes[1]


def test_half_precision_overflow_is_refused(student: Path, tmp_path: Path) -> None:
    weights = load_checkpoint(student).weights
    weights["head.head.bias"] = torch.full_like(weights["head.head.bias"], 1e6)
    with pytest.raises(CheckpointError, match=r"head\.head\.bias"):
        save_checkpoint(tmp_path / "half", CONFIG, weights, half=True)
    assert not (tmp_path / "half").exists()


def test_saving_keeps_other_files_and_replaces_its_own(student: Path) -> None:
    (student / "README.md").write_text("card")
    weights = {k: v + 1 for k, v in load_checkpoint(student).weights.items()}
    save_checkpoint(student, CONFIG, weights)
    assert (student / "README.md").read_text() == "card"
    found = load_checkpoint(student)
    assert torch.equal(found.weights["head.head.bias"], weights["head.head.bias"])
    assert found.codec is None
    assert sorted(p.name for p in student.parent.iterdir()) == ["student"]


def test_saving_keeps_folders_and_links(student: Path) -> None:
    (student / "logs" / "a").mkdir(parents=True)
    (student / "logs" / "a" / "model.safetensors").write_bytes(b"another")
    (student / "logs" / "a" / "model.safetensors").chmod(0o600)
    (student / "link").symlink_to("logs/a")
    save_checkpoint(student, CONFIG, load_checkpoint(student).weights)
    kept = student / "logs" / "a" / "model.safetensors"
    assert kept.read_bytes() == b"another" and kept.stat().st_mode & 0o777 == 0o600
    assert (student / "link").readlink() == Path("logs/a")
    assert sorted(p.name for p in student.parent.iterdir()) == ["student"]


def test_saving_never_takes_the_place_of_a_file(student: Path) -> None:
    file = student.parent / "notes"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes: expected a folder.*found a file") as error:
        save_checkpoint(file, CONFIG, {})
    one_line(error)
    assert file.read_text() == "mine"


def test_failed_saving_leaves_the_old_one(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_checkpoint(student).sha256
    (student / "logs").mkdir()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(student, CONFIG, WanModel(CONFIG).state_dict())
    assert load_checkpoint(student).sha256 == before and (student / "logs").is_dir()
    assert [p.name for p in student.parent.iterdir()] == ["student"]


def test_saving_refuses_weights_of_another_network(student: Path, tmp_path: Path) -> None:
    weights = load_checkpoint(student).weights
    weights["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="extra"):
        save_checkpoint(tmp_path / "other", CONFIG, weights)
    assert not (tmp_path / "other").exists()


def test_shipped_student(root: Path) -> None:
    folder = root / "train" / "tiny_student"
    found = load_checkpoint(folder)
    assert found.deployment.words
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
