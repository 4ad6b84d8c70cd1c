"""The shipped recipe at toy size: every stage in seconds, the judge untrained in all but name."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from train.codec import LinearCodec
from train.config import TrainConfig, load_config
from train.handover import hand_on
from train.model import WanModel
from train.tiny_world import TinyWorld

SHIPPED = Path(__file__).parents[3] / "train" / "configs" / "tiny.toml"
SIZES = {
    "dim": "32", "ffn_dim": "48", "freq_dim": "16", "num_heads": "2", "num_layers": "2",
    "compile": "false", "eval_clips": "4", "clip_frames": "6", "in_dim": "8", "out_dim": "8",
}  # fmt: skip
STAGES = {
    "classifier": {"steps": "2", "batch": "4"},
    "teacher": {"steps": "4", "batch": "2"},
    "init": {"steps": "4", "batch": "1", "frames": "6"},
    "distill": {"steps": "4", "batch": "2", "frames": "9", "asd_warmup": "1", "ema_start": "1",
                "select_every": "2", "select_clips": "2"},
}  # fmt: skip


def toy_toml(folder: Path, **steps: int) -> Path:
    """Write toy.toml into `folder`; `steps` by stage."""
    text = SHIPPED.read_text()
    for key, value in SIZES.items():
        text = re.sub(rf"(?m)^{key} = \S+", f"{key} = {value}", text)
    for stage, changes in STAGES.items():
        changes = changes | ({"steps": str(steps[stage])} if stage in steps else {})
        head, tail = text.split(f"[{stage}]\n")
        part, *rest = tail.split("\n[", 1)
        for key, value in changes.items():
            part, count = re.subn(rf"(?m)^{key} = \S+", f"{key} = {value}", part)
            assert count == 1, (stage, key)
        text = head + f"[{stage}]\n" + "\n[".join([part, *rest])
    path = folder / "toy.toml"
    path.write_text(text)
    return path


def toy_start(folder: Path, toml: Path) -> tuple[Path, Path]:
    """A teacher and a causal start of it, hardly more than random: `folder`/teacher and /init."""
    from train.handover import take_up

    config: TrainConfig = load_config(toml)
    codec = LinearCodec(config.model.in_dim)
    codec.fit(TinyWorld("train"), 0)
    torch.manual_seed(0)
    network = WanModel(config.model)
    torch.nn.init.normal_(network.head.head.weight, std=0.1)  # zero at first: nothing would flow
    weights = dict(network.state_dict())
    hand_on(folder / "teacher", config, weights, codec, {"stage": "teacher"})
    teacher = take_up(folder / "teacher", "teacher", config)
    weights = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in weights.items()}
    origin = {"stage": "init", "teacher_sha256": teacher.sha256}
    hand_on(folder / "init", config, weights, codec, origin)
    return folder / "teacher", folder / "init"
