"""The build command: a checkpoint in, verified engines out. `--help` shows examples."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train
from asd_rt.config import ModelConfig
from asd_rt.errors import AsdError, BackendError, ConfigError, EngineError
from asd_rt.memory_report import memory_report, memory_text
from asd_rt.plan import FixedPlan, count_blocks
from asd_rt.planner import USUAL_LATENT_HW, Video
from export.codec import PRECISIONS as VAE_PRECISIONS
from export.codec import CodecChoice, add_codec, check_codec
from export.engine import Target, build_engine
from export.plans import check_fp8, plan_obstacle
from export.quantize import Wish, check_wish
from export.settings import Overrides, Settings, resolve
from export.tensorrt import NO_CARD_TARGETS, check_gpus, import_tensorrt
from export.text import add_text_encoder, check_text
from export.umt5_source import open_umt5
from export.umt5_storage import PRECISIONS as TEXT_PRECISIONS
from train.checkpoint import Checkpoint, describe_checkpoint, load_checkpoint
from train.command_line import Parser
from train.vae_weights import load_codec

DEFAULT_OUT = Path("engines")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
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
log = logging.getLogger("export")


def default_checkpoint() -> Path:
    """The shipped tiny student."""
    return Path(next(iter(train.__path__))) / "tiny_student"


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
        "--int8-keep",
        type=_names,
        default=(),
        metavar="LAYER,...",
        help="layers of an int8 engine to keep in floating point, e.g. blocks.0.ffn.down, besides those that "
        "its accuracy needs",
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
        metavar="FOLDER",
        help="an existing folder (default: engines, made if absent)",
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
        default="fp32",
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
        "--dry-run",
        action="store_true",
        help="build nothing; show what memory its videos would take",
    )
    add("--frames", type=int, default=21, metavar="N", help="of such a video (default 21)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def choose_targets(
    args: argparse.Namespace, settings: Settings, model: ModelConfig
) -> list[Target]:
    """What to build, in order; what `auto` leaves out is logged with its reason.

    Raises:
        AsdError: an explicit wish that cannot be met.
    """
    if args.gpu and args.target == "onnx":
        raise ConfigError("--gpu is for TensorRT; leave it out, or use --target tensorrt")
    if args.precision == "fp8" and args.target != "tensorrt":
        raise ConfigError("an fp8 engine is for cards; use --target tensorrt --gpu sm89,sm120")
    wish = Wish(args.int8_keep, args.int8_activations)
    if wish != Wish() and args.precision != "int8":
        raise ConfigError("--int8-keep and --int8-activations are for --precision int8; add it")
    targets = []
    if args.target != "tensorrt":
        targets.append(Target("onnx", args.precision or "fp32", wish=wish))
    if args.target == "onnx":
        return targets
    precision = args.precision or "fp16"
    try:
        obstacle = plan_obstacle(settings, precision, model)
        if obstacle:
            raise ConfigError(obstacle)
        trt = import_tensorrt()
        gpus = check_gpus(trt, args.gpu) or _present_targets()
        if precision == "fp8":
            check_fp8(gpus)
    except AsdError as error:
        # In `auto` a plan is a bonus; a wish for one (--target, --gpu) is not.
        if args.target == "tensorrt" or args.gpu:
            raise
        log.info("skipped asd_%s.plan: %s", precision, error)
        return targets
    targets.append(Target(trt.__name__, precision, gpus, wish))
    return targets


def _present_targets() -> tuple[str, ...]:
    """The card of this machine, or common ones where there is none."""
    from asd_rt.backends.cuda import present_gpu

    try:
        return (present_gpu(),)
    except BackendError:
        log.info(
            "no NVIDIA card here: building for %s; choose others with --gpu",
            ", ".join(NO_CARD_TARGETS),
        )
        return NO_CARD_TARGETS


def _output_folder(out: Path | None) -> Path:
    folder = DEFAULT_OUT if out is None else out
    if folder.exists() and not folder.is_dir():
        raise EngineError(f"--out {folder}: is not a folder; name another")
    if not folder.exists():
        if out is not None:
            raise EngineError(f"--out {folder}: no such folder; make it: mkdir -p {folder}")
        try:
            folder.mkdir()
        except OSError as error:
            raise EngineError(
                f"{folder}: cannot be made ({error.strerror}); name another with --out"
            ) from error
    return folder


def _settings(args: argparse.Namespace, checkpoint: Checkpoint) -> Settings:
    steps = FixedPlan(args.steps).steps
    plan = FixedPlan(steps, 4 if args.first_steps is None else args.first_steps)
    flags = Overrides(
        args.block_frames,
        args.window_frames,
        args.sink_frames,
        args.timestep_shift,
        args.latent_size,
        args.max_frames,
    )
    return resolve(checkpoint, flags, plan)


def dry_run(args: argparse.Namespace) -> dict[str, Any]:
    """What the engines that `args` ask for need of memory, without reading a weight; see memory_report.

    Raises:
        AsdError: bad input.
    """
    checkpoint: Checkpoint = describe_checkpoint(args.checkpoint or default_checkpoint())
    settings = _settings(args, checkpoint)
    target = choose_targets(args, settings, checkpoint.config)[0]
    hw = settings.latent_hw or USUAL_LATENT_HW
    if args.frames < 1:
        raise ConfigError(f"--frames must be a whole number >= 1, found {args.frames}")
    frames = count_blocks(args.frames, 1)
    video = Video(checkpoint.config, settings.cache, target.precision, hw, frames, target.backend)
    return memory_report(video)


def build(args: argparse.Namespace) -> list[Path]:
    """Build everything that `args` ask for; returns the engine files.

    Raises:
        AsdError: bad input, an unwritable folder, or an engine that misses its parity budget.
    """
    FixedPlan(args.steps, args.first_steps or args.steps)  # before weights are read
    checkpoint: Checkpoint = load_checkpoint(args.checkpoint or default_checkpoint())
    settings = _settings(args, checkpoint)
    check_wish(Wish(args.int8_keep), checkpoint.config.num_layers)
    targets = choose_targets(args, settings, checkpoint.config)
    codec = _codec(args, checkpoint)
    if args.text_precision is not None and args.text_encoder is None:
        raise ConfigError("--text-precision is for --text-encoder; name its folder")
    text = None if args.text_encoder is None else open_umt5(args.text_encoder)
    if text is not None:
        check_text(text, checkpoint.config)
    out = _output_folder(args.out)
    engines = [
        build_engine(checkpoint, settings, target, out, args.force, args.allow_inaccurate)
        for target in targets
    ]
    if text is not None:
        add_text_encoder(text, args.text_precision, engines, args.force)
    if codec is not None:
        add_codec(codec, engines, args.force)
    return engines


def _codec(args: argparse.Namespace, checkpoint: Checkpoint) -> CodecChoice | None:
    """What --vae names.

    Raises:
        AsdError: it cannot be read, or does not belong to the checkpoint.
    """
    if args.vae is None:
        return None
    if checkpoint.codec is not None:
        raise ConfigError(
            f"--vae {args.vae}: checkpoint {checkpoint.name} has its own codec; leave the flag out"
        )
    codec = load_codec(args.vae)
    check_codec(codec, checkpoint.config.out_dim, f"checkpoint {checkpoint.name}")
    return CodecChoice(codec, args.vae_precision)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("train.checkpoint").setLevel(
        logging.INFO
    )  # what was read, and how it was told
    try:
        if args.dry_run:
            report = dry_run(args)
            log.info("%s", memory_text(report))
            print(json.dumps({"memory": report}))
            return 0
        engines = build(args)
    except AsdError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    print(json.dumps({"engines": [str(path) for path in engines]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
