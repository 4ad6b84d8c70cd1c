"""`asd-rt run`: a prompt in, a video out."""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

from asd_rt import timing
from asd_rt.arguments import check_can_decode, default_frames, make_plan, prompt_tokens
from asd_rt.bench import deadline_record, timing_record
from asd_rt.commands.common import (
    Outcome,
    Problems,
    add_deadline,
    add_engine,
    add_json,
    add_plan,
    find_engine,
)
from asd_rt.decoding import block_frame_count, temporal_factor
from asd_rt.embeddings import Embeddings, read_embeddings
from asd_rt.frame_loop import Block
from asd_rt.kv_cache import FrameSlots
from asd_rt.noise import MAX_SEED
from asd_rt.plan import count_blocks
from asd_rt.progress import Progress
from asd_rt.session import FloatArray, Session, open_session
from asd_rt.video import check_output, open_writer
from asd_rt.video_thread import ThreadedWriter

HELP = "generate a video from a prompt"
EXAMPLES = """examples:
  asd-rt run --prompt "a red three moving right"
  asd-rt run --prompt "a blue seven moving up and left" --seed 3 --frames 96 --out seven.gif
  asd-rt run --prompt "a green zero moving down" --steps 1 --first-steps 4 --json
  asd-rt run --prompt "a white two moving left" --fps 100 --json
  asd-rt run --engine engines/asd_fp32.onnx --prompt "a white two moving left" --out frames/
  asd-rt run --prompt "a pink nine moving up" --out - | mpv -
  asd-rt run --engine engines/asd_fp16.plan --prompt-embeds prompts.safetensors --prompt-index 2
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
        help="latent frames (default: 48); an engine whose decoder is 4 frames long shows 4 for each but the "
        "first",
    )
    parser.add_argument(
        "--seed", metavar="N", default="0", help="same seed, same video (default: 0)"
    )
    add_plan(parser)
    add_deadline(parser)
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
    frames = problems.integer("--frames", args.frames, 1)
    seed = problems.integer("--seed", args.seed, 0, MAX_SEED) or 0
    steps = problems.steps("--steps", args.steps)
    first_steps = problems.steps("--first-steps", args.first_steps)
    threads = problems.integer("--threads", args.threads, 1)
    scale = problems.integer("--scale", args.scale, 1, MAX_SCALE)
    deadline = problems.deadline(args)
    index = problems.integer("--prompt-index", args.prompt_index, 0)
    if index is not None and args.prompt_embeds is None:
        problems.usage("--prompt-index chooses from --prompt-embeds; name its file")
    if args.json and args.out == "-":
        problems.usage("--json and --out - both write to stdout; write the video to a file")
    with problems.collect():
        check_output(args.out)
    embeds: Embeddings | None = None
    if args.prompt_embeds is not None:
        with problems.collect():
            embeds = read_embeddings(args.prompt_embeds, "--prompt-embeds")
    found = find_engine(problems, args.engine)
    if found:
        path, manifest = found
        frames = frames or default_frames(manifest)

        def check_prompt() -> None:
            if args.prompt is not None:
                prompt_tokens(path, manifest, args.prompt)
            elif embeds is not None:
                embeds.check(manifest.model)
                embeds.context(index or 0)

        for check in (
            lambda: check_can_decode(path, manifest),
            check_prompt,
            lambda: FrameSlots(manifest.cache, frames),
            lambda: make_plan(manifest, steps, first_steps, deadline.block_ms(manifest)),
        ):
            with problems.collect():
                check()
    problems.raise_any()

    begin = perf_counter()
    with open_session(path, threads, device=args.device) as session:
        open_ms = (perf_counter() - begin) * 1e3
        stream = _Stream(session, args.out, frames or 0, scale or manifest.display_scale)
        asked = deadline.arguments(manifest)
        shown = args.prompt if embeds is None else embeds.context(index or 0)
        stream.run(shown, seed=seed, steps=steps, first_steps=first_steps, **asked)
        document = {
            "prompt": args.prompt if embeds is None else embeds.prompt(index or 0),
            "seed": seed,
            "engine": str(path),
            "precision": manifest.precision,
            "device": session.engine.device,
            "out": args.out,
            **asked,
            "open_ms": round(open_ms, 3),
            **stream.report(),
        }
    return Outcome(document, _text(document), to_stderr=args.out == "-")


class _Stream:
    """One video on its way from the session into its file."""

    def __init__(self, session: Session, out: str, frames: int, scale: int) -> None:
        self._session, self._out, self._frames, self._scale = session, out, frames, scale
        self._blocks: list[Block] = []
        self._written: list[int] = []
        self._first_frame_ms = 0.0

    def run(self, prompt: str | FloatArray, **asked: Any) -> None:
        """Generate and write all blocks; of the last one, only the frames that were asked for.

        `prompt` may be its embedding; `asked` is for the session's `generate`.
        """
        manifest = self._session.manifest
        size, temporal = manifest.cache.block_frames, temporal_factor(manifest)
        begin = perf_counter()
        if isinstance(prompt, str):
            blocks = self._session.generate(prompt, frames=self._frames, **asked)
        else:
            blocks = self._session.generate_from(prompt, frames=self._frames, **asked)
        with (
            ThreadedWriter(open_writer(self._out, manifest.fps)) as writer,
            Progress("blocks", count_blocks(self._frames, size)) as progress,
        ):
            for block in blocks:
                if not self._blocks:
                    self._first_frame_ms = (perf_counter() - begin) * 1e3
                frames, block.frames = block.frames, None
                if frames is None:
                    continue
                latent = min(size, self._frames - block.first_frame)
                wanted = block_frame_count(temporal, block.first_frame, latent)
                frames = frames[:wanted]
                if self._scale > 1:
                    frames = frames.repeat(self._scale, axis=1).repeat(self._scale, axis=2)
                writer.write(frames)
                self._blocks.append(block)
                self._written.append(wanted)
                progress.advance(f"{block.block_ms:.0f} ms a block")

    def report(self) -> dict[str, Any]:
        """Figures of the video; frames a second count the frames that were written."""
        frames = sum(self._written)
        whole_ms = sum(block.block_ms for block in self._blocks)
        decode_ms = sum(block.decode_ms or 0.0 for block in self._blocks)
        return {
            "frames": frames,
            "latent_frames": self._frames,
            "steps": [block.steps for block in self._blocks],
            "time_to_first_frame_ms": round(self._first_frame_ms, 3),
            "fps_with_decode": round(1e3 * frames / whole_ms, 2),
            "fps_without_decode": round(1e3 * frames / (whole_ms - decode_ms), 2),
            "blocks": [
                {"index": block.index, "frames": count, **durations(block)}
                for block, count in zip(self._blocks, self._written, strict=True)
            ],
            "summary": timing.summarise(
                [
                    {**timing_record(block), "frames": count}
                    for block, count in zip(self._blocks, self._written, strict=True)
                ]
            ),
        }


def durations(block: Block) -> dict[str, Any]:
    """Steps and durations of a block in ms, None for what did not run; and how it kept its deadline."""

    def rounded(value: float | None) -> float | None:
        return value if value is None or isinstance(value, bool) else round(value, 3)

    return {
        "steps": block.steps,
        "pass_ms": [round(ms, 3) for ms in block.pass_ms],
        "denoise_ms": rounded(block.denoise_ms),
        "cache_ms": rounded(block.cache_ms),
        "decode_ms": rounded(block.decode_ms),
        "block_ms": rounded(block.block_ms),
        **{name: rounded(value) for name, value in deadline_record(block).items()},
    }


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
