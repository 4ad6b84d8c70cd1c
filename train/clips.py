"""`python -m train.clips`: a folder of videos and captions becomes sharded latents to train from.

Every video has its caption beside it (cat.mp4, cat.txt), or in captions.jsonl ({"file": ..., "caption": ...}
a line). What cannot be used is listed with its reason. A folder of clips is whole after every shard, so an
interrupted run goes on by the same command.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from asd_rt.decoding import latent_count
from asd_rt.errors import ConfigError, MediaError
from asd_rt.files import make_folder
from asd_rt.video import from_uint8
from asd_rt.video_reader import read_frames
from train.checkpoint import load_checkpoint
from train.clip_shards import INDEX, Clip, ClipIndex, read_index, write_index, write_shard
from train.codec import PATCH
from train.command_line import Parser, exit_code
from train.vae_weights import load_codec

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif", ".ogv", ".flv", ".y4m")
CAPTIONS = "captions.jsonl"
CHUNK = 4  # latent frames that are encoded at a time: what a VAE holds grows with them
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
EXAMPLES = """examples:
  python -m train.clips --videos footage --vae Wan2.1-T2V-1.3B-Diffusers/vae --size 480x832 --out clips
      81 frames at 16 a second from the start of every video
  python -m train.clips --videos footage --vae vae --size 240x416 --per-video 0 --out clips
      every stretch of 81 frames
"""
log = logging.getLogger("train.clips")
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Encoder:
    """What turns frames into latents.

    Attributes:
        encode: uint8 [F, rows, columns, 3] -> latents [F', C, h, w] float32.
        spatial: pixels a latent is wide.
        temporal: frames of a latent frame after the first; 1 = of every one.
        name, sha256: of its weights.
    """

    encode: Callable[[Pixels], Tensor]
    spatial: int
    temporal: int
    name: str
    sha256: str


def vae_encoder(path: Path) -> Encoder:
    """Wan2.1's VAE.

    Raises:
        AsdError: it cannot be loaded, or only decodes.
    """
    codec = load_codec(path)
    step = codec.encoder
    if step is None:
        raise ConfigError(f"--vae {path}: a {codec.kind} only decodes; take Wan2.1's VAE")

    @torch.inference_mode()
    def encode(frames: Pixels) -> Tensor:
        x = torch.from_numpy(from_uint8(frames)[0])
        made, caches = step(x[:1], None)
        found = [made]
        for part in x[1:].split(CHUNK * codec.temporal):
            made, caches = step(part, caches)
            found.append(made)
        return torch.cat(found)

    return Encoder(encode, codec.spatial, codec.temporal, codec.name, codec.sha256)


def checkpoint_encoder(path: Path) -> Encoder:
    """The codec of a student of the tiny world.

    Raises:
        AsdError: it cannot be loaded, or has none.
    """
    checkpoint = load_checkpoint(path)
    codec = checkpoint.codec
    if codec is None:
        raise ConfigError(f"--checkpoint {path}: has no codec of its own; name a VAE with --vae")

    def encode(frames: Pixels) -> Tensor:
        return codec.encode((torch.from_numpy(from_uint8(frames)) + 1) / 2)[0]

    return Encoder(encode, PATCH, 1, checkpoint.name, checkpoint.sha256)


def find_videos(folder: Path) -> dict[str, str]:
    """Captions of the videos in `folder` and below, by path relative to it; "" where there is none.

    Raises:
        ConfigError: no such folder, no video, captions that cannot be read or are of no video.
    """
    if not folder.is_dir():
        raise ConfigError(f"--videos {folder}: is not a folder")
    found = {
        path.relative_to(folder).as_posix(): ""
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    }
    if not found:
        raise ConfigError(f"--videos {folder}: holds no video ({', '.join(VIDEO_SUFFIXES)})")
    listed = _listed_captions(folder / CAPTIONS)
    for name in found:
        text = (folder / name).with_suffix(".txt")
        if text.is_file():
            listed[name] = _read_text(text)
    lost = [name for name in listed if name not in found]
    stems = {name.rpartition(".")[0] for name in found}
    texts = (path.relative_to(folder) for path in sorted(folder.rglob("*.txt")))
    lost += [text.as_posix() for text in texts if text.with_suffix("").as_posix() not in stems]
    if lost:
        raise ConfigError(
            f"--videos {folder}: {len(lost)} captions have no video, the first is {lost[0]}; remove them, or "
            "bring the videos"
        )
    return found | {name: " ".join(caption.split()) for name, caption in listed.items()}


def _listed_captions(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    listed = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            listed[str(entry["file"])] = str(entry["caption"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{path}, line {number}: expected {{"file": ..., "caption": ...}}, found {line[:60]!r}'
            ) from error
    return listed


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def stretches(
    video: Path, fps: float, frames: int, size: tuple[int, int], most: int
) -> Iterator[Pixels]:
    """Stretches of `frames` frames of a video, one after the other, at most `most` (0 = all).

    Returns:
        uint8 [frames, rows, columns, 3] each.

    Raises:
        MediaError: no video, damaged, or too short for one.
    """
    held: list[Pixels] = []
    given = 0
    for frame in read_frames(video, fps, size):
        held.append(frame)
        if len(held) == frames:
            yield np.stack(held)
            held.clear()
            given += 1
            if given == most:
                return
    if not given:
        raise MediaError(
            f"{video}: has {len(held)} frames at {fps:g} a second, a clip needs {frames} "
            f"({frames / fps:.1f} s)"
        )


def make_clips(folder: Path, encoder: Encoder, out: Path, args: argparse.Namespace) -> ClipIndex:
    """Encode what is in `folder` and not yet in `out`; returns the index of all.

    Raises:
        AsdError: bad input, or no video can be used.
    """
    rows, columns = args.size
    settings = {
        "rows": rows,
        "columns": columns,
        "fps": args.fps,
        "frames": args.frames,
        "latent_frames": latent_count(encoder.temporal, args.frames),
        "per_video": args.per_video,
        "dtype": args.dtype,
        "codec": {"name": encoder.name, "sha256": encoder.sha256},
    }
    videos = find_videos(folder)
    make_folder(out)
    # What was rejected is tried again: a caption may have come, or a whole file.
    index = replace(read_index(out, settings), rejected={})
    waiting: list[tuple[Clip, Tensor]] = []
    left = [name for name in videos if name not in index.seen()]
    for name in tqdm(left, desc="videos", unit="video", disable=None):
        reason, made = "", []
        try:
            if not videos[name]:
                raise MediaError(f"has no caption, neither {Path(name).stem}.txt nor in {CAPTIONS}")
            shape = args.frames, (rows, columns), args.per_video
            for number, pixels in enumerate(stretches(folder / name, args.fps, *shape)):
                clip = Clip(name, videos[name], number * args.frames / args.fps, "", 0)
                made.append((clip, encoder.encode(pixels).to(DTYPES[args.dtype])))
        except MediaError as error:
            reason = str(error)
            log.warning("left out: %s", reason)
        # Damage behind whole stretches costs what comes after it, not them.
        waiting += made
        if reason and not made:
            index.rejected[name] = reason
        if len(waiting) >= args.shard_clips:
            index = write_shard(out, index, waiting)
            waiting = []
    index = write_shard(out, index, waiting) if waiting else write_index(out, index)
    if not index.clips:
        raise ConfigError(
            f"--videos {folder}: none of {len(videos)} videos can be used; {out / INDEX} says why, the "
            f"first: {next(iter(index.rejected.values()))}"
        )
    return index


def _size(text: str) -> tuple[int, int]:
    rows, cross, columns = text.lower().partition("x")
    if not cross or not rows.isdecimal() or not columns.isdecimal():
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 480x832, found {text!r}")
    return int(rows), int(columns)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m train.clips`."""
    parser = Parser(
        prog="python -m train.clips",
        description="Encode videos with captions into latents for the teacher and the causal start.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--videos",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="videos, and captions beside them",
    )
    codec = parser.add_mutually_exclusive_group(required=True)
    codec.add_argument(
        "--vae", type=Path, metavar="PATH", help="Wan2.1's VAE: diffusers' folder, or its .pth"
    )
    codec.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="instead: a student with a codec of its own"
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="made if absent; one that holds clips goes on",
    )
    add("--size", type=_size, default=(480, 832), metavar="HxW", help="in pixels; videos are cropped to "
        "their middle (default 480x832)")  # fmt: skip
    add("--fps", type=float, default=16.0, metavar="N", help="frames a second (default 16)")
    add("--frames", type=int, default=81, metavar="N", help="of a clip (default 81)")
    add(
        "--per-video",
        type=int,
        default=1,
        metavar="N",
        help="clips of a video, 0 = all (default 1)",
    )
    add("--shard-clips", type=int, default=64, metavar="N", help="of a file, about (default 64)")
    add("--dtype", choices=DTYPES, default="bf16", help="of the latents (default bf16)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _check(args: argparse.Namespace, encoder: Encoder) -> None:
    """Raise ConfigError for what cannot be encoded."""
    for flag, value, least in (
        ("--frames", args.frames, 1),
        ("--per-video", args.per_video, 0),
        ("--shard-clips", args.shard_clips, 1),
    ):
        if value < least:
            raise ConfigError(f"{flag} must be a whole number >= {least}, found {value}")
    if not 0 < args.fps < 1000:
        raise ConfigError(f"--fps must be a number above 0 and below 1000, found {args.fps}")
    unit = 2 * encoder.spatial  # a patch is two latents wide
    if any(n < unit or n % unit for n in args.size):
        raise ConfigError(
            f"--size: rows and columns must be multiples of {unit}, found {args.size[0]}x{args.size[1]}"
        )
    if (args.frames - 1) % encoder.temporal:
        near = args.frames - (args.frames - 1) % encoder.temporal
        raise ConfigError(
            f"--frames must be 1 + {encoder.temporal} n for this VAE, found {args.frames}; {near} is near"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")

    def work() -> None:
        encoder = checkpoint_encoder(args.checkpoint) if args.vae is None else vae_encoder(args.vae)
        _check(args, encoder)
        index = make_clips(args.videos, encoder, args.out, args)
        document = {"out": str(args.out), "clips": len(index.clips), "rejected": index.rejected}
        print(json.dumps(document, ensure_ascii=False))

    return exit_code(work, args.debug, "run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
