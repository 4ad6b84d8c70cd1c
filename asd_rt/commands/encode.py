"""`asd-rt encode`: prompts in, an embeddings file out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from asd_rt.arguments import prompt_tokens
from asd_rt.commands.common import Outcome, Problems, add_engine, add_json, find_engine
from asd_rt.embeddings import FloatArray, write_embeddings
from asd_rt.errors import ConfigError
from asd_rt.files import check_writable
from asd_rt.manifest import Manifest, is_text_plan, late_parts
from asd_rt.progress import Progress
from asd_rt.session import open_session
from asd_rt.text_encoder import TextEncoder

HELP = "turn prompts into an embeddings file, for runs without a text encoder"
EXAMPLES = """examples:
  asd-rt encode --prompt "a red three moving right" --out three.safetensors
  asd-rt encode --engine engines/asd_fp32.onnx --prompts prompts.txt --out prompts.safetensors
  asd-rt run --engine engines/asd_fp16.plan --prompt-embeds prompts.safetensors --prompt-index 2

result: context [prompts, tokens, text_dim], zero behind each prompt's tokens, and tokens [prompts]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `encode`."""
    add_engine(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="one prompt")
    given.add_argument(
        "--prompts", metavar="FILE", help="UTF-8 text, one prompt a line; empty lines do not count"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="default: float32"
    )
    add_json(parser)


def execute(args: argparse.Namespace) -> Outcome:
    """Read the prompts, encode one after the other, write.

    Raises:
        AsdError: anything the user can mend.
    """
    problems = Problems()
    threads = problems.integer("--threads", args.threads, 1)
    with problems.collect():
        check_writable(args.out, "--out")
    prompts = [] if args.prompt is None else [args.prompt]
    if args.prompts is not None:
        with problems.collect():
            prompts = read_prompts(Path(args.prompts))
    found = find_engine(problems, args.engine)
    if found:
        with problems.collect():
            for prompt in prompts[:1]:  # what is wrong with the engine shows at the first one
                prompt_tokens(*found, prompt)
    problems.raise_any()
    path, manifest = found  # type: ignore[misc]

    begin = perf_counter()
    contexts: list[FloatArray] = []
    with ExitStack() as stack:
        encode = _opened(stack, path, manifest, threads, args.device)
        progress = stack.enter_context(Progress("prompts", len(prompts)))
        for prompt in prompts:
            contexts.append(encode(prompt))
            progress.advance()
    write_embeddings(args.out, contexts, prompts, half=args.dtype == "float16")
    document = {
        "engine": str(path),
        "out": args.out,
        "dtype": args.dtype,
        "prompts": prompts,
        "tokens": [context.shape[1] for context in contexts],
        "text_dim": contexts[0].shape[2],
        "seconds": round(perf_counter() - begin, 3),
    }
    noun = "prompt" if len(prompts) == 1 else "prompts"
    return Outcome(
        document, f"{args.out}: {len(prompts)} {noun}, {document['seconds']:.1f} s, {path}"
    )


def _opened(
    stack: ExitStack, path: Path, manifest: Manifest, threads: int | None, device: str
) -> Callable[[str], FloatArray]:
    """What encodes a prompt: of a UMT5 text encoder nothing else is opened, and it stays until the end.

    Raises:
        ConfigError: a card is asked for, and the encoder runs on the CPU.
    """
    if late_parts(manifest) and not is_text_plan(manifest):
        if device == "cuda":
            raise ConfigError(
                f"--device cuda: the text encoder of {path} is a graph, which runs on the CPU; leave it "
                "out, or build an engine whose text encoder is a plan"
            )
        return stack.enter_context(TextEncoder(path, manifest, threads, keep=True)).encode
    return stack.enter_context(open_session(path, threads, device=device)).context


def read_prompts(path: Path, name: str = "--prompts") -> list[str]:
    """The lines of a text file that are not blank; `name` is of the setting that names it.

    Raises:
        ConfigError: it is absent, no UTF-8, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{name} {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} {path}: is not UTF-8 text (byte {error.start}); save it as UTF-8, one prompt a line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{name} {path}: holds no prompt; write one a line")
    return prompts
