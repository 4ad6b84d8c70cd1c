"""`python -m train.x0_similarity`: how much x0 still changes from step to step, block by block.

The paper's reason for First-Frame Enhancement: in the first block the prediction of the clean latents
changes from each denoising step to the next, in later blocks hardly. Here every block gets 4 steps, and
predictions of consecutive steps are compared by their cosine over all latents of a block and clip.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from asd_rt.errors import CheckpointError, ConfigError
from asd_rt.files import check_writable, replacing
from asd_rt.schedule import MAX_STEPS
from train.command_line import Parser, exit_code
from train.judge import BATCH
from train.rollout import rollout
from train.samplers import Student, block_noise, first_noise, open_subject
from train.scores import BOOTSTRAP
from train.threads import use_threads
from train.tiny_world import label_tokens, random_labels

SHIPPED = Path(__file__).parent / "tiny_student"
PROMPTS_SEED, NOISE_SEED = 4242, 10_000
INK, SOFT_INK, GRID = "#1c1e24", "#80848e", "#e6e7ea"
COLOURS = ("#2a5caa", "#f0a63c", "#4c9a86")
Numbers = NDArray[np.float64]
EXAMPLES = """examples:
  python -m train.x0_similarity --out docs/x0_similarity.png
      of the shipped student; the figures go to x0_similarity.json beside the picture
  python -m train.x0_similarity runs/tiny/student --blocks 24 --clips 256 --out out/x0.png
"""


@torch.no_grad()
def step_similarity(student: Student, labels: Tensor, blocks: int, seed: int) -> Numbers:
    """Cosine of the x0 predicted by consecutive steps, [clips, blocks, MAX_STEPS - 1].

    Args:
        student: that plays the clips, MAX_STEPS steps a block.
        labels: int64 [clips, 3], what it is asked for.
        blocks: of each clip.
        seed: of the noise.
    """
    config, size = student.model.config, student.block_frames
    noise = first_noise(len(labels), blocks * size, config.in_dim, size, seed)
    prompt = student.model.embed_prompt(student.text(label_tokens(labels, config.text_len)))
    seen: dict[tuple[int, int], Tensor] = {}

    def renoise(block: int, step: int, x0: Tensor) -> Tensor:
        seen[block, step] = x0.flatten(1)
        return block_noise(tuple(x0.shape), seed, block, step + 1)

    plan = [MAX_STEPS] * blocks
    done = rollout(student.model, student.cache, student.schedule, noise, prompt, plan, renoise)
    for block in range(blocks):
        last = done.latents[:, block * size : (block + 1) * size]
        seen[block, MAX_STEPS - 1] = last.flatten(1)
    found = [
        [
            torch.cosine_similarity(seen[block, step], seen[block, step + 1], dim=1)
            for step in range(MAX_STEPS - 1)
        ]
        for block in range(blocks)
    ]
    return torch.stack([torch.stack(row, dim=1) for row in found], dim=1).double().numpy()


def summarise(similarity: Numbers) -> dict[str, list[list[float]]]:
    """Means over clips and their 95 % bootstrap intervals, each [blocks][MAX_STEPS - 1]."""
    count = len(similarity)
    draws = np.random.default_rng(0).integers(0, count, (BOOTSTRAP, count))
    weights = np.stack([np.bincount(draw, minlength=count) for draw in draws]) / count
    means = np.einsum("rc,cbs->rbs", weights, similarity)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    found = {"mean": similarity.mean(axis=0), "low": low, "high": high}
    return {name: values.round(5).tolist() for name, values in found.items()}


def draw(report: dict[str, list[list[float]]], path: Path) -> None:
    """A line for each pair of steps, against the block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mean, low, high = (np.array(report[name]) for name in ("mean", "low", "high"))
    blocks = np.arange(1, len(mean) + 1)
    figure, axis = plt.subplots(figsize=(7.5, 4), dpi=130, layout="constrained")
    for step, colour in zip(range(mean.shape[1]), COLOURS, strict=True):
        axis.plot(blocks, mean[:, step], color=colour, marker="o", markersize=3.5, linewidth=1.4,
                  label=f"steps {step + 1} and {step + 2}")  # fmt: skip
        axis.fill_between(blocks, low[:, step], high[:, step], color=colour, alpha=0.2, linewidth=0)
    axis.set_xlabel("block", color=SOFT_INK)
    axis.set_xticks(blocks)
    axis.set_title("cosine of the x0 that consecutive denoising steps predict", loc="left", color=INK,
                   fontsize=10)  # fmt: skip
    axis.grid(color=GRID)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png")
    plt.close(figure)


def compare(args: argparse.Namespace) -> None:
    """Play the clips, and write and print what they show.

    Raises:
        AsdError: impossible arguments, or no checkpoint.
    """
    if args.clips < 2 or args.blocks < 1:
        raise ConfigError(
            f"--clips must be >= 2 and --blocks >= 1, found {args.clips} and {args.blocks}"
        )
    check_writable(args.out, "--out")
    student = open_subject(args.checkpoint)
    if not isinstance(student, Student):
        raise CheckpointError(f"{args.checkpoint}: expected a checkpoint, found an engine")
    labels = random_labels(args.clips, torch.Generator().manual_seed(PROMPTS_SEED))
    bar = tqdm(labels.split(BATCH), desc="clips", unit="batch", leave=False)
    found = [
        step_similarity(student, part, args.blocks, NOISE_SEED + i) for i, part in enumerate(bar)
    ]
    report = summarise(np.concatenate(found))
    told = {"checkpoint": Path(args.checkpoint).name, "clips": args.clips, **report}
    with replacing(args.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(told) + "\n")
    with replacing(args.out) as temporary:
        draw(report, temporary)
    for block, row in enumerate(report["mean"], 1):
        print(f"block {block}: " + ", ".join(f"{value:.4f}" for value in row))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="python -m train.x0_similarity",
        description="How much the predicted clean latents change from step to step, block by block.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", default=SHIPPED, help="default: the shipped student"
    )
    parser.add_argument("--out", type=Path, required=True, help="picture; a .json lies beside it")
    parser.add_argument("--clips", type=int, default=128, help="default 128")
    parser.add_argument("--blocks", type=int, default=16, help="of a clip (default 16)")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="CPU threads (default: $OMP_NUM_THREADS, else usable cores)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    use_threads(args.threads)
    return exit_code(lambda: compare(args), args.debug, "nothing half-written is left")


if __name__ == "__main__":
    sys.exit(main())
