"""A dry run: what a step takes is what it takes when it runs, and every problem with its files is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.train.real_toy import LATENT_HW, write_config, write_inputs
from train.__main__ import main
from train.clip_data import ClipData
from train.config import load_config
from train.distill import DistillStage
from train.dry_run import make_plan, tasks
from train.model import WanModel
from train.scoring import start_networks
from train.step_costs import Products, measure, only_steps

WAN = Path(__file__).parents[3] / "train" / "configs" / "wan_1_3b_asd.toml"


def test_a_step_of_wan_1_3b() -> None:
    """Random weights are enough, and none are made: everything is on the meta device."""
    config = load_config(WAN)
    plan = make_plan(config, config.data.latent_hw, 8)
    assert plan.sizes["student"] == plan.sizes["critic"] == plan.sizes["teacher"] == 1_418_996_800
    assert plan.tokens == 64 * 21 * 1560
    assert plan.micro_batches == (64, 8)
    memory = plan.memory
    # Of two rollouts of 7 blocks, without the last one of each; the runtime's is one of these.
    assert memory.kv_cache == 2 * 6_038_323_200 * 6 // 7
    assert memory.optimizer == 8 * (2 * 1_418_996_800 + plan.sizes["discriminator"]) // 8
    # Without checkpoints a layer keeps all of its intermediate results, with them its input alone.
    assert memory.activations > 4 * memory.activations_checkpointed
    # More denoising steps, more passes; one more teaches the step before it.
    assert plan.flops_of[1] < plan.flops_of[2] < plan.flops_of[3]
    # A pass over a clip: twice the weights a token, and attention beside it.
    least = 2 * 1.4e9 * plan.tokens
    assert 20 * least < plan.flops_of[1] < 200 * least


def test_passes_in_float32_take_twice_the_memory(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    half, single = (
        make_plan(load_config(write_config(tmp_path, parallel={"precision": name})), LATENT_HW, 2)
        for name in ("bf16", "fp32")
    )
    for name in ("gathered", "kv_cache"):
        assert getattr(single.memory, name) == 2 * getattr(half.memory, name)
    assert single.memory.activations > 1.3 * half.memory.activations  # norms are float32 in both
    more = single.memory.parameters - half.memory.parameters
    assert more == 2 * half.sizes["teacher"] // 2
    assert single.flops == half.flops


@pytest.mark.long
def test_products_are_those_of_a_real_step(tmp_path: Path) -> None:
    """Counted on the meta device over shallow networks, against real steps of a deeper one."""
    write_inputs(tmp_path)
    config = load_config(write_config(tmp_path, parallel={"micro_batches": 1}))
    config = replace(config, model=replace(config.model, num_layers=5))
    measured = measure(config, LATENT_HW, checkpointed=False)
    weights = WanModel(config.model).state_dict()
    kinds = tasks(config)
    assert len(kinds) == 7  # n = 1, 2, 3 with and without more steps for the first block, and n = 4
    for task, _ in kinds:
        fixed = only_steps(config, task.n)
        distill = replace(fixed.distill, first_steps_share=float(task.enhanced))
        fixed = replace(fixed, distill=distill)
        networks = start_networks(config.model, 0, weights, weights)
        stage = DistillStage(fixed, 0, ClipData(fixed, 0), networks)
        stage.separation = dict.fromkeys(stage.separation, 1.0)
        with Products() as products:
            stage.advance(0)
        # A fused attention's backward pass computes its scores once more: a little more than is real here.
        found, real = measured.flops(task, config.distill.critic_updates), products.total
        assert 0.99 * real <= found <= 1.05 * real, task


def test_it_says_everything_and_checks_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    config = str(write_config(tmp_path))
    assert main(["--config", config, "--dry-run", "--world-size", "2"]) == 0
    said = capsys.readouterr().out
    for word in ("student", "FLOPs", "KV cache of rollouts", "optimizer", "sum", "tokens"):
        assert word in said
    assert main(["--config", config, "--dry-run", "--world-size", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    memory = document["memory"]
    assert memory["sum"] == sum(
        v for k, v in memory.items() if k not in ("sum", "activations_checkpointed")
    )
    assert main(["--config", config, "--dry-run", "--world-size", "3"]) == 1
    assert "cannot be shared evenly by 3 processes" in capsys.readouterr().err


def test_all_problems_at_once_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n \n")
    (tmp_path / "negative.safetensors").write_bytes(b"junk")
    (tmp_path / "student" / "model.safetensors").unlink()
    config = write_config(tmp_path, model={"num_layers": 3})
    assert main(["--config", str(config), "--dry-run"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    told = [
        "weights.teacher",
        "another shape: num_layers 2 (expected 3)",
    ]
    assert sum(all(word in line for word in told) for line in lines) == 1
    for word in ("model.safetensors missing", "data.negative", "data.prompts"):
        assert sum(word in line for line in lines) == 1, (word, lines)
    assert len(lines) == 4
