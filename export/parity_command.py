"""`python -m export.parity`: how far engines are from float32 torch, and whether that can be seen."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from asd_rt.backends.base import Engine, FloatArray, open_backend
from asd_rt.errors import BackendError, ConfigError, EngineError
from asd_rt.files import make_folder
from asd_rt.manifest import Manifest, late_parts, read_manifest, verify
from asd_rt.planner import is_large
from export.build import default_checkpoint
from export.drift import Drift, longest, measure_drift
from export.layer_errors import LayerError, measure_layers
from export.parity import measure, opened
from export.parity_plot import plot_frames, plot_layers
from export.parity_report import make_entry, markdown, write_report
from export.quantize import FORMATS
from export.reference import TorchEngine
from train.checkpoint import Checkpoint, load_checkpoint
from train.codec import is_tiny_world
from train.command_line import Parser, exit_code
from train.model import WanModel

BLOCKS, PROMPTS = 200, 64
EXAMPLES = """examples:
  python -m export.parity --engine engines/asd_fp16.onnx
  python -m export.parity --engine engines/asd_fp32.onnx engines/asd_int8.onnx --layers --out out
      one table of both; parity.json, parity.md and pictures into out
  python -m export.parity --engine my/asd_bf16.onnx --checkpoint my_student --blocks 24 --prompts 0
"""
log = logging.getLogger("export")
T = TypeVar("T")


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m export.parity`."""
    parser = Parser(
        prog="python -m export.parity",
        description="Measure engines against float32 torch on the same noise and plan.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--engine", type=Path, nargs="+", required=True, metavar="PATH", help="engine files")
    add(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="what they were built from (default: the shipped tiny student)",
    )
    add("--blocks", type=int, default=BLOCKS, metavar="N",
        help=f"of the rollout, 0 = none (default {BLOCKS})")  # fmt: skip
    add("--layers", action="store_true", help="say layer by layer where the error arises")
    add("--prompts", type=int, default=PROMPTS, metavar="N",
        help=f"videos of the tiny world that a classifier judges, 0 = none (default {PROMPTS})")  # fmt: skip
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for parity.json, .md and pictures, made if absent",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Reference:
    """Float32 torch, and what it made for engines before: they share noise and plan where they can."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model: WanModel = checkpoint.build_model()
        self._judge: Any = None
        self._marks: dict[str, Any] = {}
        self._latents: dict[str, FloatArray] = {}

    def engine(self, manifest: Manifest) -> TorchEngine:
        """In the place of the engine that `manifest` describes."""
        return TorchEngine(self.checkpoint, manifest, self.model)

    def drift(self, engine: Engine, blocks: int) -> Drift:
        """See `export.drift`."""
        key = _same(engine.manifest)
        reference = self.engine(engine.manifest)
        drift, latents = measure_drift(
            engine, reference, self.checkpoint, blocks, self._latents.get(key)
        )
        self._latents[key] = latents
        return drift

    def semantics(self, engine: Engine, prompts: int) -> dict[str, Any]:
        """See `export.semantics`."""
        try:
            from export.semantics import compare, show
            from train.judge import load_judge
        except ImportError as error:
            raise ConfigError(
                f"the judge of the tiny world needs the packages of training ({error}); pip install "
                "'asd-rt[train]', or leave it out: --prompts 0"
            ) from error
        if self._judge is None:
            self._judge = load_judge()
        key = _same(engine.manifest)

        def judged(one: Engine, name: str) -> Any:
            return show(one, self.checkpoint, self._judge, prompts, name)

        if key not in self._marks:
            self._marks[key] = judged(self.engine(engine.manifest), "float32 torch")
        return compare(judged(engine, engine.manifest.name), self._marks[key])


def _same(manifest: Manifest) -> str:
    """Engines with equal strings are to show the same video."""
    told = (manifest.cache, manifest.latent_hw, manifest.timestep_shift, manifest.default_plan)
    return repr(told)


def report(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all engines that `args` name; returns their entries of the report.

    Raises:
        AsdError: bad input, or an engine that cannot be measured.
    """
    for flag, value in (("--blocks", args.blocks), ("--prompts", args.prompts)):
        if value < 0:
            raise ConfigError(f"{flag} must be 0 or more, found {value}")
    if args.out is not None:
        make_folder(args.out)
    manifests = {path: read_manifest(path) for path in args.engine}
    checkpoint: Checkpoint = load_checkpoint(args.checkpoint or default_checkpoint())
    for path, manifest in manifests.items():
        verify(path, manifest, skip=late_parts(manifest))
        _check_checkpoint(path, manifest, checkpoint, args.checkpoint is not None)
    reference = _Reference(checkpoint)
    return [_entry(path, manifest, reference, args) for path, manifest in manifests.items()]


def _check_checkpoint(path: Path, manifest: Manifest, checkpoint: Checkpoint, named: bool) -> None:
    if manifest.checkpoint["sha256"] == checkpoint.sha256:
        return
    found = f"{checkpoint.name} (sha256 {checkpoint.sha256[:16]}...)"
    mend = "name that one" if named else "name it with --checkpoint"
    raise EngineError(
        f"{path}: was built from checkpoint {manifest.checkpoint['name']} (sha256 "
        f"{manifest.checkpoint['sha256'][:16]}...), found {found}; {mend}"
    )


def _entry(
    path: Path, manifest: Manifest, reference: _Reference, args: argparse.Namespace
) -> dict[str, Any]:
    """All that is asked for of one engine; of one that cannot run here, what its build found."""
    log.info("measuring %s", path)
    if manifest.backend != "onnx":
        try:
            open_backend(path).close()
        except (BackendError, EngineError) as error:  # no card, another one, or another TensorRT
            log.warning("%s: cannot run here, so these are its build's figures (%s)", path, error)
            return make_entry(path.name, manifest, manifest.parity)
    figures: dict[str, Any] = dict(manifest.parity)
    layers: Sequence[LayerError] = ()
    if manifest.backend == "onnx":
        figures, layers = _gate_figures(path, manifest, reference, args.layers)
    elif args.layers:
        log.info("%s: layers are measured on ONNX engines alone", path)
    large = is_large(manifest.model)
    if large:  # as the gate does
        manifest = replace(manifest, latent_hw=None)
    drift = semantics = None
    blocks = longest(manifest, args.blocks)
    if blocks:
        drift = _with(path, manifest, lambda engine: reference.drift(engine, blocks))
    if args.prompts and is_tiny_world(reference.checkpoint):
        semantics = _with(path, manifest, lambda engine: reference.semantics(engine, args.prompts))
    elif args.prompts:
        log.info("%s: only videos of the tiny world have a judge", path)
    return make_entry(path.name, manifest, figures, drift, layers, semantics)


def _gate_figures(
    path: Path, manifest: Manifest, reference: _Reference, layers: bool
) -> tuple[dict[str, Any], Sequence[LayerError]]:
    """Figures of the build's gate, measured anew, and of layers where asked for."""
    own = {name: value for name, value in manifest.parity.items() if name in ("speed", *FORMATS)}
    gate = measure(path, manifest, reference.checkpoint, reference.model, blocks=0)
    figures = own | gate.figures
    if not layers or gate.layers:
        return figures, gate.layers
    if is_large(manifest.model):
        manifest = replace(manifest, latent_hw=None)
    return figures, measure_layers(path, manifest, reference.checkpoint, reference.model)


def _with(path: Path, manifest: Manifest, use: Callable[[Engine], T]) -> T:
    """`use` of the opened engine, which then is closed: two large ones do not fit beside each other."""
    if manifest.backend == "onnx":
        with opened(path, manifest) as engine:
            return use(engine)
    other = open_backend(path)
    try:
        return use(other)
    finally:
        other.close()


def _write(entries: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """All files of a report; returns them."""
    files = [out / "parity.json", out / "parity.md"]
    write_report(files[0], files[1], entries)
    framed = [entry for entry in entries if entry["drift"] and "frames" in entry["drift"]]
    if framed:
        files.append(out / "parity-frames.png")
        plot_frames(framed, files[-1])
    layered = [entry for entry in entries if entry["layers"]]
    if layered:
        files.append(out / "parity-layers.png")
        plot_layers(layered, files[-1])
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)

    def work() -> None:
        entries = report(args)
        if args.out is None:
            print(markdown(entries), end="")
        else:
            print(json.dumps({"files": [str(path) for path in _write(entries, args.out)]}))

    return exit_code(work, args.debug, "nothing half-written is left")
