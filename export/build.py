"""The build command: a checkpoint in, verified engines out. `--help` shows examples."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import train
from asd_rt.config import ModelConfig
from asd_rt.errors import AsdError, BackendError, ConfigError
from asd_rt.files import make_folder
from asd_rt.memory_report import memory_report, memory_text
from asd_rt.plan import FixedPlan, count_blocks
from asd_rt.planner import USUAL_LATENT_HW, Video
from export.build_arguments import DRY_FRAMES
from export.build_arguments import make_parser as make_parser
from export.codec import PRECISIONS as VAE_PRECISIONS
from export.codec import CodecChoice, add_codec, check_codec
from export.engine import Target, build_engine
from export.plans import check_fp8, plan_obstacle
from export.quantize import FORMATS, Wish, check_wish
from export.settings import Overrides, Settings, resolve
from export.tensorrt import NO_CARD_TARGETS, builds_for_others, check_gpus, import_tensorrt
from export.text import add_text_encoder, check_text, check_text_memory, check_text_plan
from export.umt5_source import open_umt5
from train.checkpoint import Checkpoint, describe_checkpoint, load_checkpoint
from train.command_line import exit_code
from train.vae_weights import load_codec

log = logging.getLogger("export")


def default_checkpoint() -> Path:
    """The shipped tiny student."""
    return Path(next(iter(train.__path__))) / "tiny_student"


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
    wish = Wish(args.keep_layers, args.int8_activations)
    if wish.keep and args.precision not in FORMATS:
        raise ConfigError(f"--keep-layers is for --precision {' or '.join(FORMATS)}; add it")
    if wish.activations != "int8" and args.precision != "int8":
        raise ConfigError(
            "--int8-activations chooses how an int8 engine computes; use --precision int8"
        )
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
        gpus = check_gpus(trt, args.gpu) or _present_targets(trt)
        if precision == "fp8":
            check_fp8(gpus)
        if args.text_encoder is not None and args.text_target != "onnx":
            check_text_plan(args.text_precision)
    except AsdError as error:
        # In `auto` a plan is a bonus; a wish for one (--target, --gpu) is not.
        if args.target == "tensorrt" or args.gpu:
            raise
        log.info("skipped asd_%s.plan: %s", precision, error)
        return targets
    targets.append(Target(trt.__name__, precision, gpus, wish))
    return targets


def _present_targets(trt: ModuleType) -> tuple[str, ...]:
    """The card of this machine, or common ones where there is none.

    Raises:
        BackendError: there is none, and the module builds for no other.
    """
    from asd_rt.backends.cuda import present_gpu

    try:
        return (present_gpu(),)
    except BackendError as error:
        if not builds_for_others(trt):
            raise BackendError(
                f"{trt.__name__} {trt.__version__} builds for the present card only, and there is none "
                f"({error}); pip install tensorrt-rtx"
            ) from error
        log.info(
            "no NVIDIA card here: building for %s; choose others with --gpu",
            ", ".join(NO_CARD_TARGETS),
        )
        return NO_CARD_TARGETS


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
    _check_company(args)
    checkpoint: Checkpoint = describe_checkpoint(args.checkpoint or default_checkpoint())
    settings = _settings(args, checkpoint)
    check_wish(Wish(args.keep_layers), checkpoint.config.num_layers)
    target = choose_targets(args, settings, checkpoint.config)[0]
    hw = settings.latent_hw or USUAL_LATENT_HW
    asked = DRY_FRAMES if args.frames is None else args.frames
    if asked < 1:
        raise ConfigError(f"--frames must be a whole number >= 1, found {asked}")
    frames = count_blocks(asked, 1)
    flags = {
        "--vae": args.vae,
        "--text-encoder": args.text_encoder,
        "--keep-layers": args.keep_layers,
    }
    given = ", ".join(flag for flag, value in flags.items() if value)
    if given:
        log.info("not counted: %s", given)
    video = Video(checkpoint.config, settings.cache, target.precision, hw, frames, target.backend)
    return memory_report(video)


def build(args: argparse.Namespace) -> list[Path]:
    """Build everything that `args` ask for; returns the engine files.

    Raises:
        AsdError: bad input, an unwritable folder, or an engine that misses its parity budget.
    """
    _check_company(args)
    if args.frames is not None:
        raise ConfigError("--frames is for --dry-run; add that, or leave it out")
    FixedPlan(args.steps, args.first_steps or args.steps)  # before weights are read
    checkpoint: Checkpoint = load_checkpoint(args.checkpoint or default_checkpoint())
    settings = _settings(args, checkpoint)
    check_wish(Wish(args.keep_layers), checkpoint.config.num_layers)
    targets = choose_targets(args, settings, checkpoint.config)
    codec = _codec(args, checkpoint)
    _check_text_target(args, targets)
    text = None if args.text_encoder is None else open_umt5(args.text_encoder)
    if text is not None:
        check_text(text, checkpoint.config)
        plans = [args.out / target.file for target in targets if target.backend != "onnx"]
        if plans and args.text_target != "onnx":
            check_text_memory(text, args.text_precision, plans, args.force)
    make_folder(args.out)
    engines = [
        build_engine(checkpoint, settings, target, args.out, args.force, args.allow_inaccurate)
        for target in targets
    ]
    if text is not None:
        add_text_encoder(text, args.text_precision, engines, args.force, args.text_target)
    if codec is not None:
        add_codec(codec, engines, args.force)
    return engines


def _check_company(args: argparse.Namespace) -> None:
    """Refuse flags of a part that is not asked for.

    Raises:
        ConfigError: with the flag that is missing.
    """
    if args.text_precision is not None and args.text_encoder is None:
        raise ConfigError("--text-precision is for --text-encoder; name its folder")
    if args.vae_precision is not None and args.vae is None:
        raise ConfigError("--vae-precision is for --vae; name its codec")


def _check_text_target(args: argparse.Namespace, targets: Sequence[Target]) -> None:
    """Refuse a place for a text encoder that none of the engines has.

    Raises:
        ConfigError: there is no text encoder, or no plan.
    """
    if args.text_target is None:
        return
    if args.text_encoder is None:
        raise ConfigError("--text-target is for --text-encoder; name its folder")
    if args.text_target == "tensorrt" and all(target.backend == "onnx" for target in targets):
        raise ConfigError(
            "--text-target tensorrt: the text encoder of an ONNX engine is a graph; use --target tensorrt"
        )


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
    return CodecChoice(codec, args.vae_precision or VAE_PRECISIONS[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("train.checkpoint").setLevel(
        logging.INFO
    )  # what was read, and how it was told

    def work() -> None:
        if args.dry_run:
            report = dry_run(args)
            log.info("%s", memory_text(report))
            print(json.dumps({"memory": report}))
        else:
            print(json.dumps({"engines": [str(path) for path in build(args)]}))

    return exit_code(work, args.debug, "nothing half-written is left")


if __name__ == "__main__":
    sys.exit(main())
