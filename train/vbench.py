"""`python -m train.vbench`: an engine's clips as VBench wants them, and what made each of them.

VBench (arXiv 2311.17982) reads videos by name, PROMPT-INDEX.mp4, five of each prompt, and scores them in its
own environment; this writes its input. Sources of prompts: its lists (one prompt a line), or
VBench_full_info.json, of which the chosen dimensions are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import asd_rt
from asd_rt.arguments import default_frames, make_plan
from asd_rt.decoding import frame_count, temporal_factor
from asd_rt.embeddings import Embeddings, read_embeddings
from asd_rt.errors import ConfigError
from asd_rt.files import make_folder, replacing
from asd_rt.session import Session
from asd_rt.video import enlarge, open_writer
from train.command_line import Parser, exit_code

CLIPS = 5
MAX_NAME_BYTES = 255
METADATA = "videos.json"
EXAMPLES = """examples:
  python -m train.vbench --engine engines/asd_bf16.onnx --prompts all_dimension.txt --out vbench
      five clips of every prompt
  python -m train.vbench --engine engines/asd_bf16.onnx --prompts VBench_full_info.json \\
      --dimension color object_class --out vbench
      of these dimensions alone; run again after an interruption, it goes on
"""


@dataclass(frozen=True, slots=True)
class Clip:
    """One video that is asked for: its prompt, that prompt's row in the list, which of its clips it is."""

    prompt: str
    row: int
    index: int

    @property
    def file(self) -> str:
        return f"{self.prompt}-{self.index}.mp4"


def read_prompts(path: Path, dimensions: Sequence[str] = ()) -> list[str]:
    """Prompts of a list (.txt, one a line) or of VBench's own description (.json), each once, in order.

    Raises:
        ConfigError: it cannot be read, holds none or no such dimension, or one that is no file name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: cannot be read ({error})") from error
    if path.suffix == ".json":
        prompts = _from_description(path, text, dimensions)
    elif dimensions:
        raise ConfigError(f"--dimension is for VBench_full_info.json; {path} is a plain list")
    else:
        prompts = [line.strip() for line in text.splitlines()]
    prompts = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not prompts:
        raise ConfigError(f"--prompts {path}: holds no prompt; expected one a line")
    return checked(prompts, f"--prompts {path}")


def checked(prompts: list[str], where: str) -> list[str]:
    """`prompts`, if each of them can be the name of a file.

    Raises:
        ConfigError: one cannot.
    """
    for prompt in prompts:
        name = Clip(prompt, 0, CLIPS).file
        if "/" in name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
            raise ConfigError(
                f"{where}: VBench finds a video by its prompt, and this one is no file name (it has a slash, "
                f"or over {MAX_NAME_BYTES} bytes): {prompt[:60]!r}; leave it out"
            )
    return prompts


def _from_description(path: Path, text: str, dimensions: Sequence[str]) -> list[str]:
    try:
        entries = json.loads(text)
        found = [(str(entry["prompt_en"]), set(entry["dimension"])) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--prompts {path}: is not VBench's description; expected a list of objects with prompt_en and "
            f"dimension ({type(error).__name__}: {error})"
        ) from error
    known = set().union(*(having for _, having in found))
    for name in dimensions:
        if name not in known:
            raise ConfigError(f"--dimension {name}: {path} has {', '.join(sorted(known))}")
    return [prompt for prompt, having in found if not dimensions or having & set(dimensions)]


def sample(
    session: Session,
    clips: Sequence[Clip],
    out: Path,
    settings: Mapping[str, Any],
    embeds: Embeddings | None = None,
) -> int:
    """Write the clips that are not in `out` yet, and after each the list of all; returns how many were made.

    Clip i of a prompt is drawn from seed i.

    Args:
        session: of the engine.
        clips: what is wanted.
        out: an existing folder.
        settings: `latent_frames`, `steps`, `first_steps`, `scale` and what identifies the engine; they are
            kept in videos.json.
        embeds: of the prompts, row by row, for an engine without a text encoder.

    Raises:
        ConfigError: `out` holds clips of other settings.
        OutputError: it cannot be written.
    """
    done = _done(out, settings)
    wanted = [clip for clip in clips if clip.file not in done]
    temporal, fps = temporal_factor(session.manifest), session.manifest.fps
    for clip in tqdm(wanted, desc="clips", unit="clip", disable=None):
        asked = {key: settings[key] for key in ("steps", "first_steps")}
        asked |= {"seed": clip.index, "frames": settings["latent_frames"]}
        if embeds is None:
            blocks = session.generate(clip.prompt, **asked)
        else:
            blocks = session.generate_from(embeds.context(clip.row), **asked)
        left = frame_count(temporal, settings["latent_frames"])
        with open_writer(out / clip.file, fps) as writer:
            for block in blocks:
                if block.frames is not None:
                    writer.write(enlarge(block.frames[:left], settings["scale"]))
                    left -= len(block.frames[:left])
        done[clip.file] = {"prompt": clip.prompt, "index": clip.index, "seed": clip.index}
        with replacing(out / METADATA) as temporary:
            document = {"format_version": 1, **settings, "videos": done}
            temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return len(wanted)


def _done(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The clips that `out` holds whole, by file.

    Raises:
        ConfigError: they were made otherwise.
    """
    file = out / METADATA
    if not file.exists():
        return {}
    mend = "name another --out, or remove the folder"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        videos = {str(name): dict(entry) for name, entry in found["videos"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: is damaged ({error}); {mend}") from error
    differing = [key for key, value in settings.items() if found.get(key) != value]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{file}: its clips were made with {key} {found.get(key)!r}, asked for is {settings[key]!r}; "
            f"{mend}"
        )
    return {name: entry for name, entry in videos.items() if (out / name).is_file()}


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m train.vbench`."""
    parser = Parser(
        prog="python -m train.vbench",
        description="Write the clips that VBench scores: PROMPT-INDEX.mp4, and videos.json, which tells how.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--engine", type=Path, metavar="PATH", help="engine file (default: the best one here)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a list, or VBench_full_info.json"
    )
    source.add_argument(
        "--prompt-embeds",
        type=Path,
        metavar="FILE",
        help="instead: prompts encoded by `asd-rt encode`, for an engine without a text encoder",
    )
    add("--dimension", nargs="+", default=[], metavar="NAME", help="of VBench_full_info.json alone")
    add("--out", type=Path, required=True, metavar="FOLDER", help="made if absent")
    add("--clips", type=int, default=CLIPS, metavar="N", help=f"of each prompt (default {CLIPS})")
    add("--frames", type=int, metavar="N", help="latent frames of a clip (default: as asd-rt run)")
    add("--steps", type=int, metavar="N", help="steps a block, 1..4 (default: the engine's)")
    add(
        "--first-steps",
        type=int,
        metavar="N",
        help="steps of the first block (default: the engine's)",
    )
    add("--scale", type=int, default=1, metavar="N", help="enlarge frames N times (default 1)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what `args` ask for; returns how many clips were made, and how many there are.

    Raises:
        AsdError: bad input, or a place that cannot be written.
    """
    for flag, value in (
        ("--clips", args.clips),
        ("--scale", args.scale),
        ("--frames", args.frames),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be a whole number >= 1, found {value}")
    embeds = None
    if args.prompt_embeds is not None:
        embeds = read_embeddings(args.prompt_embeds, "--prompt-embeds")
        if not embeds.prompts:
            raise ConfigError(
                f"--prompt-embeds {args.prompt_embeds}: does not say its prompts, which name the videos; "
                "make it with `asd-rt encode`"
            )
        prompts = checked(embeds.prompts, f"--prompt-embeds {args.prompt_embeds}")
    else:
        prompts = read_prompts(args.prompts, args.dimension)
    clips = [Clip(p, row, i) for row, p in enumerate(prompts) for i in range(args.clips)]
    make_folder(args.out)
    with asd_rt.open(args.engine) as session:
        manifest = session.manifest
        plan = make_plan(manifest, args.steps, args.first_steps)
        settings = {
            "engine": session.engine.path.name,
            "denoiser_sha256": manifest.parts["denoiser"].sha256,
            "checkpoint": manifest.checkpoint,
            "latent_frames": args.frames or default_frames(manifest),
            "steps": plan.steps_of(1),
            "first_steps": plan.steps_of(0),
            "scale": args.scale,
            "fps": manifest.fps,
        }
        made = sample(session, clips, args.out, settings, embeds)
    return {"made": made, "clips": len(clips), "out": str(args.out)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    return exit_code(lambda: print(json.dumps(run(args))), args.debug, "run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
