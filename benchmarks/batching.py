"""Would sessions gain from sharing passes? batching.json and .md.

python -m benchmarks.batching --out out

An engine's pass serves one video, so the sessions of a server take turns. Here the same network is exported
with room for several videos, each at its own position and with its own prompt and cache, and one pass of
those takes turns with as many passes of one: a whole window behind them, one step, in ONNX Runtime with the
threads of an engine. Results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from asd_rt import timing
from asd_rt.errors import AsdError, ConfigError, EngineError
from asd_rt.files import replacing
from asd_rt.machine import usable_cores
from asd_rt.plan import FixedPlan
from asd_rt.progress import Progress
from asd_rt.rope import rope_table
from benchmarks.latency import make_folder
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


def open_session(part: PartModule) -> onnxruntime.InferenceSession:
    """The part in ONNX Runtime, with the options that an engine's passes have."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
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
    """One shared pass, and as many single ones."""

    shared: Bound
    single: Sequence[Bound]

    def worst_error(self) -> float:
        """Largest relative L2 of what the shared pass gives, of all tensors and videos."""
        return max(
            relative_l2(array[i : i + 1], one.outputs[name])
            for name, array in self.shared.outputs.items()
            for i, one in enumerate(self.single)
        )

    def time(self) -> tuple[float, float]:
        """ms of the shared pass, and of all single ones."""
        begin = perf_counter()
        self.shared.run()
        middle = perf_counter()
        for one in self.single:
            one.run()
        return 1e3 * (middle - begin), 1e3 * (perf_counter() - middle)


def contenders(name: str, counts: Sequence[int]) -> dict[int, Rivals]:
    """The rivals for each number of videos.

    Raises:
        EngineError: a shared pass gives something else than single ones.
    """
    checkpoint = load_checkpoint(default_checkpoint()) if name == TINY else random_checkpoint(name)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 1))
    model = checkpoint.build_model()
    part = engine_parts(checkpoint, model, "fp32", settings.latent_hw, LOWERING)["denoiser"]
    session = open_session(part)
    inputs = [make_inputs(part, checkpoint, settings, seed) for seed in range(max(counts))]
    single = [Bound(session, one) for one in inputs]
    found = {}
    for count in counts:
        one = Bound(open_session(shared(part, count)), stacked(inputs[:count]))
        found[count] = Rivals(one, single[:count])
        error = found[count].worst_error()
        if not error <= BUDGET:
            raise EngineError(
                f"a pass of {count} videos differs by {error:.1e} from single ones, budget {BUDGET:g}"
            )
    return found


def measure(rivals: Mapping[int, Rivals], rounds: int) -> list[dict[str, Any]]:
    """A row for each number of videos; all take turns in every round."""
    taken: dict[int, list[tuple[float, float]]] = {count: [] for count in rivals}
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
        ratios = ms[:, 1] / ms[:, 0]
        draws = np.random.default_rng(0).integers(0, rounds, (1000, rounds))
        low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
        rows.append(
            {
                "videos": count,
                "shared_ms": float(np.median(ms[:, 0])),
                "single_ms": float(np.median(ms[:, 1])),
                "gain": float(np.median(ratios)),
                "gain_low": float(low),
                "gain_high": float(high),
                "error": rivals[count].worst_error(),
            }
        )
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [
        "# Passes shared by several videos",
        "",
        f"{report['size']}, fp32, {report['threads']} threads, a full window, one step; medians of "
        f"{report['rounds']} rounds, in which shared and single passes took turns. Gain: time of the single "
        "passes over that of the shared one, with its 95 % bootstrap interval. Above 1 sharing is faster; a "
        "shared pass is also what each of its videos waits for.",
        "",
        "| videos | shared pass, ms | single passes, ms | gain |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['videos']} | {row['shared_ms']:.3f} | {row['single_ms']:.3f} | {row['gain']:.3f} "
        f"[{row['gain_low']:.3f}, {row['gain_high']:.3f}] |"
        for row in report["rows"]
    ]
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
        description="Times one pass of several videos against as many passes of one.",
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
