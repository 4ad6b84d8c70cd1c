"""Flags of `run` that steer a video: later prompts, a start from a file, refreshes; and their checks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asd_rt.arguments import check_can_encode, prompt_tokens
from asd_rt.commands.common import Problems
from asd_rt.decoding import block_frame_count, temporal_factor
from asd_rt.errors import AsdError, ConfigError, PromptError
from asd_rt.manifest import Manifest
from asd_rt.plan import count_blocks
from asd_rt.video_reader import Pixels, read_clip, read_picture

_PROMPT_AT = re.compile(r"([0-9]{1,15}):(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PromptAt:
    """Another prompt from the first block on that begins at `frame` of the output or behind it."""

    frame: int
    prompt: str


@dataclass(frozen=True, slots=True)
class Start:
    """What a video begins with.

    Attributes:
        path: the file.
        frames: uint8 [F, rows, columns, 3].
        shown: it is written into the output as well.
    """

    path: str
    frames: Pixels
    shown: bool


def add_steering(parser: argparse.ArgumentParser) -> None:
    """--prompt-at, --recache, --image, --video, --show-start and --refresh-every."""
    parser.add_argument(
        "--prompt-at",
        metavar="FRAME:TEXT",
        action="append",
        default=[],
        help="a new prompt from the first block that begins at this frame of the output or later; repeatable",
    )
    parser.add_argument(
        "--recache",
        action="store_true",
        help="with --prompt-at: compute what is remembered anew under the new prompt (default: keep it)",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--image", metavar="FILE", help="a picture that the video starts from")
    start.add_argument("--video", metavar="FILE", help="a clip from whose end the video goes on")
    parser.add_argument(
        "--show-start",
        action="store_true",
        help="write what --image or --video gave into the output as well (default: only what follows)",
    )
    parser.add_argument(
        "--refresh-every",
        metavar="N",
        help="blocks after which the cache starts over from the first one, so that a long video does not "
        "drift; the picture jumps then (default: never)",
    )


def read_prompts_at(problems: Problems, texts: Sequence[str]) -> list[PromptAt]:
    """The prompts of --prompt-at by frame; what is wrong with them is noted."""
    found: dict[int, PromptAt] = {}
    for text in texts:
        match = _PROMPT_AT.fullmatch(text)
        if match is None or int(match[1]) < 1 or not match[2].strip():
            problems.usage(
                "--prompt-at must be a frame >= 1, a colon and a prompt, such as "
                f'48:"a blue four moving down", found {text!r}'
            )
        elif int(match[1]) in found:
            problems.usage(f"--prompt-at {int(match[1])}: is given twice; leave one of them out")
        else:
            found[int(match[1])] = PromptAt(int(match[1]), match[2].strip())
    return [found[frame] for frame in sorted(found)]


def check_prompts_at(
    path: Path, manifest: Manifest, prompts: Sequence[PromptAt], problems: Problems
) -> None:
    """Note prompts that the engine at `path` cannot read."""
    for one in prompts:
        try:
            prompt_tokens(path, manifest, one.prompt)
        except AsdError as error:
            problems.note(PromptError(f"--prompt-at {one.frame}: {error}"))


def check_ends(
    manifest: Manifest, prompts: Sequence[PromptAt], frames: int, start: Start | None
) -> None:
    """Refuse prompts that no block of a video of `frames` latent frames (0 = endless) would show.

    Raises:
        ConfigError: the last block begins before one of them.
    """
    size, temporal = manifest.cache.block_frames, temporal_factor(manifest)
    given = 0 if start is None else len(start.frames)
    first = 0 if not given else (given - 1) // temporal + 1  # latent frames of the start
    before = (count_blocks(frames, size) - 1) * size
    last = block_frame_count(temporal, first, before)
    last += given if start is not None and start.shown else 0
    late = [one.frame for one in prompts if frames and one.frame > last]
    if late:
        raise ConfigError(
            f"--prompt-at {late[0]}: no block begins so late, the last one begins at frame {last}; ask for "
            "more --frames, or for an earlier frame"
        )


def read_start(path: Path, manifest: Manifest, args: argparse.Namespace) -> Start | None:
    """What --image or --video name, as frames for the engine at `path`.

    Raises:
        AsdError: the file is of no use, or the engine has no encoder.
    """
    file = args.image if args.video is None else args.video
    if file is None:
        return None
    check_can_encode(path, manifest)
    read = read_picture if args.video is None else read_clip
    return Start(file, read(file, manifest), args.show_start)
