"""One engine from checkpoint to folder: export, gate, compile, and move in as a whole."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx

from asd_rt.errors import AsdError, EngineError
from asd_rt.manifest import (
    Manifest,
    Part,
    manifest_path,
    read_manifest,
    sha256_file,
    verify,
    write_manifest,
)
from asd_rt.planner import is_large, runtime_of
from export.bundle import (
    added_fields,
    added_parts,
    carry_over,
    remove_unnamed,
    scratch_folder,
)
from export.calibrate import choose_scheme
from export.lowering import LOWERINGS, Lowering
from export.onnx import export_part, serialize, tensor_specs
from export.parity import BUDGETS, accept, measure
from export.parity_report import make_entry, report_files, write_report
from export.parts import PartModule, engine_parts
from export.plans import compile_plans
from export.quantize import FORMATS, NO_WISH, Scheme, Wish
from export.ranges import choose_float32
from export.settings import Settings, make_manifest
from export.speed import measure_speed
from export.weights import WeightsFile
from train.checkpoint import Checkpoint
from train.model import WanModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What to build: backend (onnx, tensorrt, tensorrt_rtx), precision, the cards of a plan, and what is
    asked of int8.
    """

    backend: str
    precision: str
    gpus: tuple[str, ...] = ()
    wish: Wish = NO_WISH

    @property
    def file(self) -> str:
        """Name of the engine file."""
        return f"asd_{self.precision}{self.suffix}"

    @property
    def suffix(self) -> str:
        return ".onnx" if self.backend == "onnx" else ".plan"


def build_engine(
    checkpoint: Checkpoint,
    settings: Settings,
    target: Target,
    out: Path,
    force: bool,
    allow_inaccurate: bool = False,
) -> Path:
    """Build one engine in a temporary folder, gate it, and move it into `out`; returns its path.

    An engine that is there already and up to date is left alone.

    Args:
        checkpoint: the weights.
        settings: geometry, schedule and plan.
        target: backend, precision and cards.
        out: an existing folder.
        force: replace an engine that differs.
        allow_inaccurate: take an engine that misses its budget; its manifest says so.

    Raises:
        EngineError: `out` cannot be written, a differing engine is there, or the result fails its gate.
    """
    engine = out / target.file
    wanted = make_manifest(
        checkpoint,
        settings,
        target.precision,
        target.backend,
        NO_PARTS,
        target.gpus,
        _asked(target),
    )
    if not force and _is_current(engine, wanted, allow_inaccurate):
        log.info("%s is up to date", engine)
        return engine
    log.info("building %s from checkpoint %s", engine, checkpoint.name)
    with scratch_folder(out) as scratch:
        began = perf_counter()
        manifest = carry_over(
            engine, _fill(scratch, checkpoint, settings, target, allow_inaccurate)
        )
        write_manifest(scratch / target.file, manifest)
        verify(scratch / target.file, manifest, skip=added_parts(manifest))
        _move_in(scratch, engine, manifest)
        size = sum(part.bytes for part in manifest.parts.values())
        log.info("wrote %s, %.1f MB in %d parts, %.0f s", engine, size / 1e6, len(manifest.parts),
                 perf_counter() - began)  # fmt: skip
    return engine


NO_PARTS = {name: Part(name, "0" * 64, 0) for name in ("denoiser", "time", "prompt")}


def _fill(
    scratch: Path,
    checkpoint: Checkpoint,
    settings: Settings,
    target: Target,
    allow_inaccurate: bool,
) -> Manifest:
    """Export, gate and, for a plan, compile every part into `scratch`, with a report.

    Returns:
        the manifest.
    """
    model, is_plan = checkpoint.build_model(), target.backend != "onnx"
    lowering = LOWERINGS[runtime_of(target.backend, target.precision, checkpoint.config)]
    large = is_large(checkpoint.config)
    scheme = _scheme(checkpoint, model, settings, target)
    # A large network is measured at small latents, so its graphs leave the size open.
    latent_hw = None if large else settings.latent_hw
    modules = engine_parts(checkpoint, model, target.precision, latent_hw, lowering, scheme)
    chosen = None if scheme is None else {target.precision: scheme.to_json()}
    del scheme  # of a large network it holds gigabytes
    if large:  # its joined part would have the runtime hold all weights twice, to save little
        modules.pop("joined", None)
    file = scratch / f"asd_{target.precision}.weights"
    parts: dict[str, Part] = {}
    with WeightsFile(file) as weights:
        for name in list(modules):
            began = perf_counter()
            parts[name] = _export(scratch, target, lowering, name, modules.pop(name), weights)
            log.info("  %-9s exported  %6.1f s", name, perf_counter() - began)
    held = {"weights": Part(file.name, sha256_file(file), file.stat().st_size)}
    log.info("  weights   %8.3f MB", held["weights"].bytes / 1e6)
    manifest = make_manifest(checkpoint, settings, target.precision, "onnx", held | parts)
    if is_plan:  # whose graphs say themselves what is computed in which type
        manifest = replace(manifest, runtime="onnxruntime")
    began = perf_counter()
    denoiser = scratch / manifest.parts["denoiser"].file
    gate = measure(denoiser, manifest, checkpoint, model)
    parity = gate.figures
    log.info("  parity    pass %.1e, rollout %.1e (budgets %.0e, %.0e) %.1f s",
             gate.worst_pass, gate.worst_rollout, parity["budget"]["pass"],
             parity["budget"]["rollout"], perf_counter() - began)  # fmt: skip
    accept(manifest.name, gate, allow_inaccurate, target.precision, is_plan)
    parity |= chosen or {}
    if not is_plan:
        speed = measure_speed(denoiser, manifest, scratch.parent)
        parity |= {} if speed is None else {"speed": speed}
    name = f"{target.file}, its graphs" if is_plan else target.file
    entry = make_entry(name, manifest, parity, gate.drift, gate.layers)
    write_report(*report_files(scratch / target.file), [entry])
    if not is_plan:
        return replace(manifest, parity=parity)

    del model
    parts = compile_plans(scratch, target.file, settings, parts, target.gpus)
    file.unlink()
    told = f"{parity['measured_with']}, on the graphs that the plans were compiled from"
    parity |= {"measured_with": told}
    made = make_manifest(
        checkpoint, settings, target.precision, target.backend, parts, target.gpus, parity
    )
    speed = measure_speed(scratch / target.file, made, scratch.parent)
    return made if speed is None else replace(made, parity=parity | {"speed": speed})


def _scheme(
    checkpoint: Checkpoint, model: WanModel, settings: Settings, target: Target
) -> Scheme | None:
    """Which products are not simply in the engine's type, by rollouts; None = none."""
    if target.precision not in ("fp16", *FORMATS):
        return None
    draft = make_manifest(checkpoint, settings, target.precision, target.backend, NO_PARTS)
    if target.precision == "fp16":
        return choose_float32(checkpoint, model, draft)
    budget, form = BUDGETS[target.precision].simulated, FORMATS[target.precision]
    return choose_scheme(checkpoint, model, draft, budget, wish=target.wish, form=form)


def _export(
    scratch: Path,
    target: Target,
    lowering: Lowering,
    name: str,
    module: PartModule,
    weights: WeightsFile,
) -> Part:
    """Write one part's graph, and its weights to theirs."""
    # OpenVINO computes in bfloat16, whatever the weights are.
    half = lowering is LOWERINGS["openvino"] and name in ("denoiser", "joined", "prompt")
    graph = serialize(
        export_part(
            name,
            module,
            lowering.opset,
            weights,
            rounded="bf16" if half else "",
            origins=lowering is LOWERINGS["tensorrt"],
        )
    )
    stem = f"asd_{target.precision}"
    file = scratch / (f"{stem}.onnx" if name == "denoiser" else f"{stem}.{name}.onnx")
    file.write_bytes(graph)
    onnx.checker.check_model(file)  # by path: so it looks for weights beside the graph
    inputs, outputs = tensor_specs(module.inputs), tensor_specs(module.outputs)
    return Part(file.name, sha256_file(file), file.stat().st_size, inputs, outputs)


def _is_current(engine: Path, wanted: Manifest, allow_inaccurate: bool) -> bool:
    """Whether the engine that is there is what would be built.

    Raises:
        EngineError: it is there, whole or damaged, and would come out differently.
    """
    if not engine.exists() and not manifest_path(engine).exists():
        return False
    mend = "use --force to replace it, or --out for another folder"
    try:
        found = read_manifest(engine)
        verify(engine, found, skip=added_parts(found))
    except AsdError as error:
        raise EngineError(f"{engine}: exists but is damaged; {mend} ({error})") from error
    # The checkpoint's hash stands for its own codec, `sources` for an added one.
    apart = {"parts", "parity", "sources", "codec"} | added_fields(found)
    old, new = (
        {k: v for k, v in manifest.to_json().items() if k not in apart}
        for manifest in (found, wanted)
    )
    differing = [key for key in new if old[key] != new[key]]
    if _wish(found) != _wish(wanted):
        differing.append(f"choice of {wanted.precision} layers")
    if differing:
        raise EngineError(
            f"{engine}: exists and was built with another {', '.join(differing)}; {mend}"
        )
    if "inaccurate" in found.parity and not allow_inaccurate:
        raise EngineError(f"{engine}: exists and was built with --allow-inaccurate; {mend}")
    return True


def _asked(target: Target) -> dict[str, Any]:
    """What a manifest's figures say of the wish behind an engine of 8 bits."""
    told = {"asked": target.wish.to_json()}
    return {target.precision: told} if target.precision in FORMATS else {}


def _wish(manifest: Manifest) -> Any:
    return manifest.parity.get(manifest.precision, {}).get("asked")


def _move_in(scratch: Path, engine: Path, manifest: Manifest) -> None:
    """Put the finished files in place, the manifest last: until then the engine does not verify."""
    old = set(engine.parent.glob(f"{engine.stem}.*{engine.suffix}"))
    added = _added_files(engine)
    manifest_path(engine).unlink(missing_ok=True)
    own = manifest.parts.keys() - added_parts(manifest)
    files = [manifest.parts[name].file for name in manifest.parts if name in own]
    for file in files:
        (scratch / file).chmod(0o644)
        (scratch / file).replace(engine.parent / file)
    for report in report_files(engine):
        (scratch / report.name).replace(report)
    for leftover in old - {engine.parent / file for file in files}:
        leftover.unlink()
    (scratch / manifest_path(engine).name).replace(manifest_path(engine))
    remove_unnamed(engine.parent, added)


def _added_files(engine: Path) -> list[str]:
    """Files of the added parts of the engine that is there, if it can be read."""
    try:
        found = read_manifest(engine)
    except AsdError:
        return []
    return [found.parts[name].file for name in added_parts(found)]
