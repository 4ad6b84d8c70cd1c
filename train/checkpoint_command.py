"""`python -m train.checkpoint`: random checkpoints of real sizes, and conversion between formats."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from train.checkpoint import load_checkpoint
from train.command_line import MAX_SEED, Parser, exit_code
from train.formats.files import CODEC, DEPLOYMENT, TEXT, locate
from train.formats.random_weights import CONFIGS, random_source
from train.formats.write import FORMATS, SHARD_BYTES, Source, write_checkpoint

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
EXAMPLES = """examples:
  python -m train.checkpoint random --config wan_1_3b --format official --out /data/random-1.3b
      1.4e9 random weights as Wan2.1 stores them, 2.8 GB in bf16, to try and to measure without the real ones
  python -m train.checkpoint random --config small --format self-forcing --dtype fp32 --out small.pt
      a small network in the layout of Wan2.1, as Self-Forcing stores it
  python -m train.checkpoint convert self_forcing_dmd.pt --format diffusers --out student --shard-size 2GB
      the same weights, bit for bit, for WanTransformer3DModel.from_pretrained
"""


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 2GB, found {text!r}")
    return size


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to {MAX_SEED}, found {text!r}"
        )
    return int(text)


def _layers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, found {text!r}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m train.checkpoint`."""
    parser = Parser(
        prog="python -m train.checkpoint",
        description="Make random denoisers of real sizes, and convert denoisers between formats.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{random,convert}")
    random = commands.add_parser("random", help="random weights in a real format")
    random.add_argument("--config", choices=CONFIGS, required=True, help="which network")
    random.add_argument("--seed", type=_seed, default=0, metavar="N", help="default 0")
    random.add_argument(
        "--layers", type=_layers, metavar="N", help="a network of only N layers (default: all)"
    )
    convert = commands.add_parser("convert", help="a checkpoint in another format")
    convert.add_argument(
        "source", type=Path, metavar="IN", help="a checkpoint: a folder or one file"
    )
    for command, types in ((random, "bf16"), (convert, "as stored")):
        add = command.add_argument
        add("--format", choices=FORMATS, required=True, dest="layout", help="what to write")
        add(
            "--out",
            type=Path,
            required=True,
            metavar="PATH",
            help="a new folder; self-forcing: a .pt file",
        )
        add("--dtype", choices=DTYPES, help=f"type of the weights (default: {types})")
        add(
            "--shard-size",
            type=_size,
            default=SHARD_BYTES,
            metavar="SIZE",
            help="largest file of a folder, e.g. 2GB (default 10GB)",
        )
        add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def write(args: argparse.Namespace) -> None:
    """Do what `args` ask for.

    Raises:
        AsdError: a source that cannot be loaded, or a place that cannot be written.
    """
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    if args.command == "random":
        config = CONFIGS[args.config]
        config = replace(config, num_layers=args.layers or config.num_layers)
        source = random_source(config, dtype or torch.bfloat16, args.seed)
        write_checkpoint(args.out, args.layout, source, args.shard_size)
        return
    checkpoint = load_checkpoint(args.source)
    weights = checkpoint.weights
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    dtypes = {name: dtype or tensor.dtype for name, tensor in weights.items()}
    folder = locate(args.source).folder
    parts = {} if folder is None else {n: folder / n for n in (DEPLOYMENT, CODEC, TEXT)}
    write_checkpoint(
        args.out,
        args.layout,
        Source(checkpoint.config, shapes, dtypes, weights.__getitem__),
        args.shard_size,
        {name: path for name, path in parts.items() if path.is_file()},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")

    def work() -> None:
        write(args)
        files = sorted(p for p in args.out.rglob("*") if p.is_file()) or [args.out]
        size = sum(path.stat().st_size for path in files)
        print(json.dumps({"checkpoint": str(args.out), "files": len(files), "bytes": size}))

    return exit_code(work, args.debug, "nothing half-written is left")
