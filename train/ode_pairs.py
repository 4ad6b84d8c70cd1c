"""`python -m train.ode_pairs`: what a many-step teacher makes of noise, for the causal initialisation.

For every prompt one noise is sampled to its end, and the states at the student's own noise levels are kept: a
student that learns to find the end from each of them at once starts near the teacher. Source: CausVid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain, pairwise
from math import inf
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from asd_rt.errors import ConfigError
from asd_rt.files import make_folder
from asd_rt.schedule import MAX_STEPS, TRAIN_TIMESTEPS, Schedule
from train.checkpoint import describe_checkpoint, open_weights
from train.command_line import Parser, check_seed, exit_code
from train.deployment import check_latent_hw
from train.losses import guided_x0, shifted_sigma
from train.model import WanModel
from train.pair_shards import PairSettings, shard_name, write_settings, write_shard
from train.parallel import Parallel
from train.prompt_table import PromptTable
from train.stage import step_generator

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
EXAMPLES = """examples:
  asd-rt encode --engine ENGINE --prompts prompts.txt --out prompts.safetensors --dtype float16
  asd-rt encode --engine ENGINE --prompt "blurred, overexposed" --out negative.safetensors
  python -m train.ode_pairs --teacher Wan2.1-T2V-1.3B --prompts prompts.safetensors \\
      --negative negative.safetensors --out pairs
      a pair of every prompt; run it again after an interruption, it goes on
  python -m train.ode_pairs --teacher Wan2.1-T2V-1.3B --prompts prompts.safetensors \\
      --negative negative.safetensors --out pairs --part 3/8
      the third of eight processes that fill one folder together
"""
log = logging.getLogger("train.ode_pairs")


def sample_path(
    model: WanModel, noise: Tensor, contexts: Tensor, steps: int, guidance: float, shift: float
) -> tuple[Tensor, Tensor]:
    """Euler sampling with guidance.

    Args:
        model: the teacher.
        noise: [1, F, C, h, w].
        contexts: of the prompt and the negative prompt, [2, tokens, text_dim]; [1, ...] without guidance.
        steps: a multiple of 4, so that the student's noise levels are among the teacher's.
        guidance: scale; 1 = none.
        shift: of the noise schedule.

    Returns:
        the states at the student's 4 noise levels, noisiest first, [4, F, C, h, w], and the end [F, C, h, w].
    """
    parallel = Parallel(device=noise.device)
    sigmas = shifted_sigma(torch.linspace(1, 0, steps + 1), shift)
    clip, path = noise, []
    for index, (now, after) in enumerate(pairwise(sigmas)):
        if index % (steps // MAX_STEPS) == 0:
            path.append(clip[0])
        count = len(contexts)
        timesteps = torch.full((count, clip.shape[1]), TRAIN_TIMESTEPS * float(now))
        with parallel.autocast():
            inputs = clip.expand(count, -1, -1, -1, -1)
            flow = model(inputs, timesteps.to(clip.device), contexts).float()
        if count > 1:
            flow = guided_x0(*flow.chunk(2), guidance)
        clip = clip + (after - now) * flow
    return torch.stack(path), clip[0]


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m train.ode_pairs`."""
    parser = Parser(
        prog="python -m train.ode_pairs",
        description="Sample a many-step teacher for the causal initialisation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="PATH", help="a checkpoint of any format")
    add("--prompts", type=Path, required=True, metavar="FILE", help="made by asd-rt encode")
    add(
        "--negative",
        type=Path,
        metavar="FILE",
        help="the same, of the negative prompt; needed unless --guidance is 1",
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="made if absent; goes on if not")
    add("--frames", type=int, default=21, metavar="N", help="latent frames (default 21)")
    add("--latent-size", metavar="HxW", help="default: the checkpoint's, else 60x104")
    add("--steps", type=int, default=48, metavar="N", help="a multiple of 4 (default 48)")
    add("--guidance", type=float, default=5.0, metavar="X", help="default 5; 1 = none")
    add(
        "--timestep-shift",
        type=float,
        default=5.0,
        metavar="X",
        help="that of the student to be (default 5)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    add("--shard-pairs", type=int, default=16, metavar="N", help="pairs of a file (default 16)")
    add("--dtype", choices=DTYPES, default="bf16", help="they are stored in (default bf16)")
    add("--part", default="1/1", metavar="I/N", help="make the I-th of N parts of the files")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _check(args: argparse.Namespace) -> tuple[int, int]:
    """Raise ConfigError for flags that cannot be; returns part and parts, counted from 0."""
    for flag, value in (("--frames", args.frames), ("--shard-pairs", args.shard_pairs)):
        if value < 1:
            raise ConfigError(f"{flag} must be a whole number >= 1, found {value}")
    check_seed(args.seed)
    if args.steps < MAX_STEPS or args.steps % MAX_STEPS:
        raise ConfigError(
            f"--steps must be a multiple of {MAX_STEPS}, so that the student's noise levels are among "
            f"them, found {args.steps}"
        )
    for flag, value in (
        ("--timestep-shift", args.timestep_shift),
        ("--guidance", args.guidance),
    ):
        if not 0 < value < inf:
            raise ConfigError(f"{flag} must be a number > 0, found {value}")
    if args.guidance != 1 and args.negative is None:
        raise ConfigError("--negative is missing: guidance leads away from it; or use --guidance 1")
    part, slash, parts = args.part.partition("/")
    if (
        not slash
        or not part.isdecimal()
        or not parts.isdecimal()
        or not 1 <= int(part) <= int(parts)
    ):
        raise ConfigError(f"--part must be such as 3/8, found {args.part!r}")
    return int(part) - 1, int(parts)


def _latent_hw(text: str | None, known: tuple[int, int] | None) -> tuple[int, int]:
    if text is None:
        return known or (60, 104)
    sizes = text.lower().split("x")
    value = [int(size) for size in sizes] if all(size.isdecimal() for size in sizes) else text
    return check_latent_hw(value, "--latent-size")


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and the first values of tensors: quick, and different for other weights.

    Of an iterator one tensor at a time is in memory.
    """
    found = hashlib.sha256()
    for name, tensor in tensors:
        first = tensor.flatten()[:64].float()
        found.update(f"{name} {list(tensor.shape)} {first.tolist()}\n".encode())
    return found.hexdigest()


@torch.no_grad()
def make_pairs(args: argparse.Namespace) -> dict[str, object]:
    """Make the pairs that are not there yet; returns what was done.

    Raises:
        AsdError: bad input, or a place that cannot be written.
    """
    part, parts = _check(args)
    checkpoint = describe_checkpoint(args.teacher)
    height, width = _latent_hw(args.latent_size, checkpoint.deployment.latent_hw)
    weights = open_weights(args.teacher, checkpoint.config, "--teacher")
    table = PromptTable(args.prompts, checkpoint.config, "--prompts")
    negative = None
    if args.guidance != 1:
        negative = PromptTable(args.negative, checkpoint.config, "--negative").contexts([0])
    rows = ((prompt, table.contexts([row])) for row, prompt in enumerate(table.prompts))
    settings = PairSettings(
        teacher=_digest((name, weights[name]()) for name in sorted(weights)),
        embeddings=_digest(chain(rows, [] if negative is None else [("negative", negative)])),
        prompts=table.prompts,
        shape=[args.frames, checkpoint.config.in_dim, height, width],
        sigmas=[s.sigma for s in Schedule(args.timestep_shift).steps(MAX_STEPS)],
        steps=args.steps,
        guidance=args.guidance,
        shift=args.timestep_shift,
        seed=args.seed,
        shard_pairs=args.shard_pairs,
        dtype=args.dtype,
    )
    make_folder(args.out)
    write_settings(args.out, asdict(settings))
    left = [
        number
        for number in range(part, settings.shards, parts)
        if not (args.out / shard_name(number)).exists()
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parallel = Parallel(device=device)
    with torch.device("meta"):
        model = WanModel(checkpoint.config).to(torch.bfloat16 if parallel.bf16 else torch.float32)
    parallel.fill(model, weights)
    model.eval().requires_grad_(False)
    made = 0
    bar = tqdm(
        total=sum(len(settings.pairs_of(number)) for number in left),
        desc="ODE pairs",
        unit="pair",
        disable=None,
    )
    with bar:
        for number in left:
            paths, ends = [], []
            for index in settings.pairs_of(number):
                generator = step_generator(args.seed, "ode_pairs", index)
                noise = torch.randn(1, *settings.shape, generator=generator).to(device)
                context = table.contexts([index])
                if negative is not None:
                    context = torch.cat([context, negative])
                path, end = sample_path(
                    model,
                    noise,
                    context.to(device),
                    args.steps,
                    args.guidance,
                    args.timestep_shift,
                )
                paths.append(path.to("cpu", DTYPES[args.dtype]))
                ends.append(end.to("cpu", DTYPES[args.dtype]))
                bar.update()
            write_shard(args.out, number, paths, ends)
            made += len(paths)
    there = sum((args.out / shard_name(n)).exists() for n in range(settings.shards))
    return {
        "out": str(args.out),
        "made": made,
        "pairs": len(table.prompts),
        "files": there,
        "files_left": settings.shards - there,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    return exit_code(
        lambda: print(json.dumps(make_pairs(args))), args.debug, "run it again to go on"
    )


if __name__ == "__main__":
    sys.exit(main())
