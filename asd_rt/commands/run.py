"""`asd-rt run`: a prompt in, a video out."""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

from asd_rt.arguments import check_can_decode, default_frames, make_plan, prompt_tokens
from asd_rt.commands.common import (
    Outcome,
    Problems,
    add_deadline,
    add_engine,
    add_json,
    add_plan,
    find_engine,
)
from asd_rt.commands.recording import Recording
from asd_rt.commands.steer import (
    Start,
    add_steering,
    check_ends,
    check_prompts_at,
    read_prompts_at,
    read_start,
)
from asd_rt.decoding import latent_count, temporal_factor
from asd_rt.embeddings import Embeddings, read_embeddings
from asd_rt.kv_cache import FrameSlots
from asd_rt.noise import MAX_SEED
from asd_rt.session import open_session
from asd_rt.steering import check_refresh
from asd_rt.video import check_output

HELP = "generate a video from a prompt"
EXAMPLES = """examples:
  asd-rt run --prompt "a red three moving right"
  asd-rt run --prompt "a blue seven moving up and left" --seed 3 --frames 96 --out seven.gif
  asd-rt run --prompt "a green zero moving down" --steps 1 --first-steps 4 --json
  asd-rt run --prompt "a white two moving left" --fps 100 --json
  asd-rt run --engine engines/asd_fp32.onnx --prompt "a white two moving left" --out frames/
  asd-rt run --prompt "a pink nine moving up" --out - | mpv -
  asd-rt run --engine engines/asd_fp16.plan --prompt-embeds prompts.safetensors --prompt-index 2
  asd-rt run --prompt "a red three moving right" --prompt-at 24:"a blue four moving down" --recache
  asd-rt run --prompt "a red three moving right" --frames 0 --refresh-every 16 --out - | mpv -
  asd-rt run --prompt "a red three moving right" --video clip.mp4 --show-start
"""
MAX_SCALE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `run`."""
    add_engine(parser)
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--prompt", metavar="TEXT", help="what to show")
    shown.add_argument(
        "--prompt-embeds",
        metavar="FILE",
        help="the same as embeddings, made by asd-rt encode; needs no text encoder",
    )
    parser.add_argument(
        "--prompt-index", metavar="N", help="which prompt of --prompt-embeds (default: 0)"
    )
    parser.add_argument(
        "--frames",
        metavar="N",
        help="latent frames (default: 48), 0 = until Ctrl-C; an engine whose decoder is 4 frames long shows "
        "4 for each but the first",
    )
    parser.add_argument(
        "--seed", metavar="N", default="0", help="same seed, same video (default: 0)"
    )
    add_plan(parser)
    add_deadline(parser)
    add_steering(parser)
    parser.add_argument(
        "--out",
        metavar="PATH",
        default="out.mp4",
        help="FILE.mp4, FILE.gif, FOLDER/ for PNG files, or - for y4m on stdout (default: out.mp4; "
        "an existing video is replaced)",
    )
    parser.add_argument(
        "--scale", metavar="N", help="enlarge frames N times (default: the engine's)"
    )
    add_json(parser)


def execute(args: argparse.Namespace) -> Outcome:
    """Check everything, then open the engine, stream, and write.

    Raises:
        AsdError: anything the user can mend.
    """
    problems = Problems()
    frames = problems.integer("--frames", args.frames, 0)
    seed = problems.integer("--seed", args.seed, 0, MAX_SEED) or 0
    steps = problems.steps("--steps", args.steps)
    first_steps = problems.steps("--first-steps", args.first_steps)
    threads = problems.integer("--threads", args.threads, 1)
    scale = problems.integer("--scale", args.scale, 1, MAX_SCALE)
    deadline = problems.deadline(args)
    index = problems.integer("--prompt-index", args.prompt_index, 0)
    if index is not None and args.prompt_embeds is None:
        problems.usage("--prompt-index chooses from --prompt-embeds; name its file")
    later = read_prompts_at(problems, args.prompt_at)
    if args.recache and not args.prompt_at:
        problems.usage("--recache goes with --prompt-at; name a later prompt, or leave it out")
    if args.show_start and args.image is None and args.video is None:
        problems.usage("--show-start goes with --image or --video; name a file, or leave it out")
    refresh_every = problems.integer("--refresh-every", args.refresh_every, 1)
    if args.json and args.out == "-":
        problems.usage("--json and --out - both write to stdout; write the video to a file")
    with problems.collect():
        check_output(args.out)
    embeds: Embeddings | None = None
    if args.prompt_embeds is not None:
        with problems.collect():
            embeds = read_embeddings(args.prompt_embeds, "--prompt-embeds")
    start: Start | None = None
    found = find_engine(problems, args.engine)
    if found:
        path, manifest = found
        with problems.collect():
            start = read_start(path, manifest, args)
        given = 0 if start is None else latent_count(temporal_factor(manifest), len(start.frames))
        frames = default_frames(manifest, given) if frames is None else frames
        total = frames and frames + given
        check_prompts_at(path, manifest, later, problems)

        def check_prompt() -> None:
            if args.prompt is not None:
                prompt_tokens(path, manifest, args.prompt)
            elif embeds is not None:
                embeds.check(manifest.model)
                embeds.context(index or 0)

        for check in (
            lambda: check_can_decode(path, manifest),
            check_prompt,
            lambda: FrameSlots(manifest.cache, total, given),
            lambda: check_refresh(refresh_every or 0, manifest.cache),
            lambda: check_ends(manifest, later, frames, start),
            lambda: make_plan(manifest, steps, first_steps, deadline.block_ms(manifest)),
        ):
            with problems.collect():
                check()
    problems.raise_any()

    begin = perf_counter()
    with open_session(path, threads, device=args.device) as session:
        open_ms = (perf_counter() - begin) * 1e3
        video = Recording(session, args.out, frames or 0, scale or manifest.display_scale)
        asked = deadline.arguments(manifest)
        shown = args.prompt if embeds is None else embeds.context(index or 0)
        video.run(
            shown,
            later,
            args.recache,
            start,
            seed=seed,
            steps=steps,
            first_steps=first_steps,
            refresh_every=refresh_every or 0,
            **asked,
        )
        document = {
            "prompt": args.prompt if embeds is None else embeds.prompt(index or 0),
            "seed": seed,
            "engine": str(path),
            "precision": manifest.precision,
            "device": session.engine.device,
            "out": args.out,
            **asked,
            **_steering(start, refresh_every),
            "open_ms": round(open_ms, 3),
            **video.report(),
        }
    return Outcome(document, _text(document), to_stderr=args.out == "-")


def _steering(start: Start | None, refresh_every: int | None) -> dict[str, Any]:
    """What a report says of a start and of refreshes; nothing where there are none."""
    said: dict[str, Any] = {}
    if start is not None:
        said["start"] = {"file": start.path, "frames": len(start.frames), "shown": start.shown}
    if refresh_every:
        said["refresh_every_blocks"] = refresh_every
    return said


def _text(document: dict[str, Any]) -> str:
    steps = document["steps"]
    shown = ", ".join(map(str, steps[:4])) + (", ..." if len(steps) > 4 else "")
    late = document["summary"]["misses"]
    kept = f", {late['with_decode']['count']} blocks came late" if late else ""
    return (
        f"{document['out']}: {document['frames']} frames in {len(steps)} blocks of {shown} steps{kept}\n"
        f"first frame after {document['time_to_first_frame_ms']:.0f} ms, "
        f"{document['fps_with_decode']:.0f} frames a second ({document['fps_without_decode']:.0f} without "
        f"decoding), {document['engine']} on {document['device']}"
    )
