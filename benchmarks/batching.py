"""How several videos share a CPU best: in turns, in one pass, or side by side? batching.json and .md.

python -m benchmarks.batching --out out

An engine's pass serves one video. Videos take turns, each pass on all cores, or are made side by side, each
on a core of its own (`asd_rt.serve.opening`). The third way is not built: here the same network is exported
with room for several videos, each at its own position and with its own prompt and cache. All ways take turns:
a whole window behind the videos, one step, in ONNX Runtime. Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from asd_rt import timing
from asd_rt.errors import AsdError, ConfigError, EngineError
from asd_rt.files import make_folder, replacing
from asd_rt.machine import usable_cores
from asd_rt.plan import FixedPlan
from asd_rt.progress import Progress
from asd_rt.rope import rope_table
from benchmarks.sizes import SIZES, random_checkpoint
from export.build import default_checkpoint
from export.lowering import LOWERINGS
from export.metrics import relative_l2
from export.onnx import export_part, serialize
from export.parts import PartModule, TensorShape, engine_parts
from export.settings import Overrides, Settings, resolve
from train.checkpoint import Checkpoint, load_checkpoint

TINY = "tiny"
LOWERING = LOWERINGS["onnxruntime"]
BUDGET = 1e-5  # relative L2 of a shared pass against single ones, as of passes against torch
WARM_UP = 5
POSITION_STEP = 30  # frames that the videos are apart
TURNS = "turns"
WAYS = (TURNS, "one_pass", "side_by_side")

Arrays = dict[str, NDArray[np.float32]]


def shared(part: PartModule, videos: int) -> PartModule:
    """`part` of an engine with room for `videos`: all tensors have one row each, but for the modulation."""

    def widened(name: str, spec: TensorShape) -> TensorShape:
        dtype, shape = spec
        if name == "modulation":
            return spec
        return dtype, (videos, *(shape if name.startswith("rope") else shape[1:]))

    inputs, outputs = (
        {name: widened(name, spec) for name, spec in tensors.items()}
        for tensors in (part.inputs, part.outputs)
    )
    return replace(part, inputs=inputs, outputs=outputs)


def open_session(part: PartModule, threads: int) -> onnxruntime.InferenceSession:
    """The part in ONNX Runtime, with the options that an engine's passes have."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = serialize(export_part("denoiser", part, LOWERING.opset))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def make_inputs(part: PartModule, checkpoint: Checkpoint, settings: Settings, seed: int) -> Arrays:
    """Random inputs of one video behind a full window, shapes as of the single pass."""
    config, cache = checkpoint.config, settings.cache
    height, width = settings.latent_hw or (0, 0)
    tokens = (height // 2) * (width // 2)
    own = cache.block_frames
    past = cache.window_frames - own
    begin = past + seed * POSITION_STEP
    rope = rope_table(config.head_dim, range(begin, begin + own), height // 2, width // 2)
    sizes = {"F": own, "T": own * tokens, "P": past * tokens}
    random = np.random.default_rng(seed)
    made: Arrays = {"rope_cos": rope[0], "rope_sin": rope[1]}
    for name, (_, shape) in part.inputs.items():
        if name not in made:
            size = [sizes.get(n, n) for n in shape]
            made[name] = random.standard_normal(size, np.float32)
    made["modulation"] = np.random.default_rng(0).standard_normal(
        made["modulation"].shape, np.float32
    )
    return made


def stacked(videos: Sequence[Arrays]) -> Arrays:
    """The inputs of a shared pass."""
    found = {}
    for name in videos[0]:
        rows = [one[name] for one in videos]
        if name == "modulation":
            found[name] = rows[0]
        else:
            found[name] = np.stack(rows) if name.startswith("rope") else np.concatenate(rows)
    return found


class Bound:
    """A pass with its inputs and outputs bound once, as an engine has it."""

    def __init__(self, session: onnxruntime.InferenceSession, inputs: Arrays) -> None:
        self._session, self._inputs = session, inputs
        self._binding = session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        names = [output.name for output in session.get_outputs()]
        made = session.run(names, dict(inputs))
        self.outputs: Arrays = dict(zip(names, made, strict=True))
        for name, array in self.outputs.items():
            self._binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


@dataclass(frozen=True)
class Rivals:
    """One shared pass, as many single ones on all cores, and as many on a core each."""

    shared: Bound
    single: Sequence[Bound]
    beside: Sequence[Bound]
    cores: Executor

    def worst_error(self) -> float:
        """Largest relative L2 of what the shared pass gives, of all tensors and videos."""
        return max(
            relative_l2(array[i : i + 1], one.outputs[name])
            for name, array in self.shared.outputs.items()
            for i, one in enumerate(self.single)
        )

    def time(self) -> tuple[float, float, float]:
        """ms of the single passes in turns, of the shared pass, and of the passes side by side."""
        marks = [perf_counter()]
        for one in self.single:
            one.run()
        marks.append(perf_counter())
        self.shared.run()
        marks.append(perf_counter())
        for _ in self.cores.map(Bound.run, self.beside):
            pass
        marks.append(perf_counter())
        turns, shared, beside = (1e3 * (b - a) for a, b in pairwise(marks))
        return turns, shared, beside


def contenders(name: str, counts: Sequence[int]) -> dict[int, Rivals]:
    """The rivals for each number of videos.

    Raises:
        EngineError: a shared pass gives something else than single ones.
    """
    checkpoint = load_checkpoint(default_checkpoint()) if name == TINY else random_checkpoint(name)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 1))
    model = checkpoint.build_model()
    part = engine_parts(checkpoint, model, "fp32", settings.latent_hw, LOWERING)["denoiser"]
    all_cores, one_core = (open_session(part, threads) for threads in (usable_cores(), 1))
    inputs = [make_inputs(part, checkpoint, settings, seed) for seed in range(max(counts))]
    single, beside = ([Bound(s, one) for one in inputs] for s in (all_cores, one_core))
    cores = ThreadPoolExecutor(usable_cores())
    found = {}
    for count in counts:
        one = Bound(open_session(shared(part, count), usable_cores()), stacked(inputs[:count]))
        found[count] = Rivals(one, single[:count], beside[:count], cores)
        error = found[count].worst_error()
        if not error <= BUDGET:
            raise EngineError(
                f"a pass of {count} videos differs by {error:.1e} from single ones, budget {BUDGET:g}"
            )
    return found


def measure(rivals: Mapping[int, Rivals], rounds: int) -> list[dict[str, Any]]:
    """A row for each number of videos; all take turns in every round."""
    taken: dict[int, list[tuple[float, float, float]]] = {count: [] for count in rivals}
    with Progress("rounds", WARM_UP + rounds) as progress:
        for number in range(WARM_UP + rounds):
            for count, pair in rivals.items():
                times = pair.time()
                if number >= WARM_UP:
                    taken[count].append(times)
            progress.advance()
    rows = []
    for count, times in taken.items():
        ms = np.array(times)
        draws = np.random.default_rng(0).integers(0, rounds, (1000, rounds))
        row: dict[str, Any] = {"videos": count, "error": rivals[count].worst_error()}
        for column, way in enumerate(WAYS):
            gains = ms[:, 0] / ms[:, column]
            low, high = np.percentile(np.median(gains[draws], axis=1), [2.5, 97.5])
            gain = {"value": float(np.median(gains)), "low": float(low), "high": float(high)}
            row[way] = {"ms": float(np.median(ms[:, column])), "gain": gain}
        rows.append(row)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [
        "# Several videos on one CPU",
        "",
        f"{report['size']}, fp32, {report['threads']} cores, a full window, one step; medians of "
        f"{report['rounds']} rounds, in which all ways took turns. In brackets: the time of turns over this "
        "one's, with a 95 % bootstrap interval. One pass for all is also what each of its videos waits for.",
        "",
        "| videos | in turns, ms | in one pass, ms | side by side, ms |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [f"{row[TURNS]['ms']:.2f}"]
        for way in WAYS[1:]:
            gain = row[way]["gain"]
            told = f"{gain['value']:.2f}x [{gain['low']:.2f}, {gain['high']:.2f}]"
            cells.append(f"{row[way]['ms']:.2f} ({told})")
        lines.append(f"| {row['videos']} | {' | '.join(cells)} |")
    machine = report["machine"]
    lines += [
        "",
        f"- machine: {machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}",
        f"- command: `{report['command']}`",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batching",
        description="Times passes of several videos in turns, in one pass, and side by side.",
        epilog="example: python -m benchmarks.batching --videos 2 4 --out out",
    )
    parser.add_argument(
        "--size", choices=[TINY, *SIZES], default=TINY, help="network (default: the tiny student)"
    )
    parser.add_argument("--videos", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder, made if absent")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if min(args.videos) < 2 or args.rounds < 1:
            raise ConfigError("--videos must be at least 2 and --rounds at least 1")
        make_folder(args.out)
        report = {
            "format_version": 1,
            "size": args.size,
            "threads": usable_cores(),
            "rounds": args.rounds,
            "rows": measure(contenders(args.size, args.videos), args.rounds),
            "machine": timing.describe_machine(),
            "versions": timing.versions(),
            "command": " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)]),
        }
        text = markdown(report)
        for suffix, content in (("json", json.dumps(report, indent=1) + "\n"), ("md", text)):
            with replacing(args.out / f"batching.{suffix}") as temporary:
                temporary.write_text(content)
        print(text)
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
