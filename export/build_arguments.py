"""The command line of `python -m export.build`."""

from __future__ import annotations

import argparse
from pathlib import Path

from export.codec import PRECISIONS as VAE_PRECISIONS
from export.umt5_storage import PRECISIONS as TEXT_PRECISIONS
from train.command_line import Parser

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
DRY_FRAMES = 21  # of the video that a dry run plans
EXAMPLES = """examples:
  python -m export.build --steps 1
      the shipped tiny student, for every backend that is installed
  python -m export.build --steps 1 --target tensorrt --precision fp16 --gpu sm89,sm120
      plans for RTX cards, on a machine without one
  python -m export.build --checkpoint my_student --target onnx --block-frames 1 --window-frames 6
      a checkpoint folder that does not say how it was trained
  python -m export.build --checkpoint my_student --text-encoder Wan2.1-T2V-1.3B --text-precision int8
      with UMT5 for prompts; added to an engine that is there already, it is all that is built
"""


def _latent_size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not cross or not height.isdecimal() or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 60x104, found {text!r}")
    return int(height), int(width)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _gpus(text: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m export.build`."""
    parser = Parser(
        prog="python -m export.build",
        description="Turn a checkpoint into engines: files plus a manifest, measured against torch first.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--steps",
        type=int,
        default=1,
        metavar="N",
        help="steps a block in the default plan, 1..4 (default 1)",
    )
    add("--first-steps", type=int, metavar="N", help="steps of the first block (default 4)")
    add(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="folder, or one .safetensors or .pt file (default: the shipped tiny student)",
    )
    add("--precision", choices=PRECISIONS, help="default: fp32 for onnx, fp16 for tensorrt")
    add(
        "--keep-layers",
        "--int8-keep",
        type=_names,
        default=(),
        metavar="LAYER,...",
        help="layers of an int8 or fp8 engine to keep in 16 or 32 bits, e.g. blocks.0.ffn.down, besides "
        "those that its accuracy needs",
    )
    add(
        "--int8-activations",
        choices=("int8", "float"),
        default="int8",
        help="float: int8 weights alone, computed with in floating point",
    )
    add(
        "--target",
        choices=("auto", "onnx", "tensorrt"),
        default="auto",
        help="auto: all that is installed",
    )
    add(
        "--gpu",
        type=_gpus,
        default=(),
        metavar="SM,...",
        help="TensorRT targets, e.g. sm89,sm120; no card needed",
    )
    add(
        "--out",
        type=Path,
        default=Path("engines"),
        metavar="FOLDER",
        help="where engines go, made if absent (default: %(default)s)",
    )
    add(
        "--vae",
        type=Path,
        metavar="PATH",
        help="its video codec: the vae folder of Wan2.1 (diffusers), Wan2.1_VAE.pth, or taew2_1; an engine "
        "that is up to date gets its codec parts alone",
    )
    add(
        "--vae-precision",
        choices=VAE_PRECISIONS,
        help="of the codec's weights and caches; fp16 is computed with in float32 (default fp32)",
    )
    add("--force", action="store_true", help="replace engines that differ")
    add(
        "--allow-inaccurate",
        action="store_true",
        help="take engines that miss their parity budget; they are marked, and say so when they run",
    )
    add("--block-frames", type=int, metavar="N", help="latent frames denoised together (default 3)")
    add(
        "--window-frames",
        type=int,
        metavar="N",
        help="frames that a pass attends to, 0 = all (default 0)",
    )
    add(
        "--sink-frames",
        type=int,
        metavar="N",
        help="first frames that stay in the window (default 0)",
    )
    add("--timestep-shift", type=float, metavar="S", help="of the noise schedule (default 5)")
    add(
        "--latent-size",
        type=_latent_size,
        metavar="HxW",
        help="fix the latent size, pixels / 8 with a VAE (default: any)",
    )
    add(
        "--max-frames",
        type=int,
        metavar="N",
        help="longest video without a window, 0 = no limit (default 0)",
    )
    add(
        "--text-encoder",
        type=Path,
        metavar="FOLDER",
        help="UMT5 with its tokenizer, of transformers, diffusers or Wan: engines then take any prompt",
    )
    add(
        "--text-precision",
        choices=TEXT_PRECISIONS,
        help="of its stored weights (default: fp16, fp32 where the source is); it computes in fp32",
    )
    add(
        "--text-target",
        choices=("onnx", "tensorrt"),
        help="text encoder of a plan: tensorrt compiles it for the card, onnx keeps it a graph for the CPU "
        "beside it (default: as the engine)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="build nothing; show what memory its videos would take, codec and text encoder aside",
    )
    add("--frames", type=int, metavar="N", help=f"of such a video (default {DRY_FRAMES})")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser
