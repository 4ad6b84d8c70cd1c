"""`asd-rt doctor`: what this machine can run, and the command that mends what it cannot."""

from __future__ import annotations

import argparse
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from asd_rt import machine, timing
from asd_rt.commands.common import Outcome, add_json, size_text, table
from asd_rt.engines import (
    BUILD,
    ENGINES_DIR,
    PACKAGED_DIR,
    best_engine,
    has_nvidia_driver,
    list_engines,
)
from asd_rt.errors import AsdError
from asd_rt.manifest import accuracy_warning, read_manifest, verify

HELP = "say what this machine can run, and how to mend what it cannot"
EXAMPLES = """examples:
  asd-rt doctor
  asd-rt doctor --json | jq .problems
"""
INSTALL_CPU = "pip install 'asd-rt[cpu]'"
# Not a command: one that replaced somebody's own engine by the shipped student's would mend nothing.
COPY = "copy it again, or build it again with the flags it was built with and --force"
PACKAGED = "pip install --force-reinstall --no-deps asd-rt"
_CORE_PACKAGES = ("numpy", "safetensors", "av")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `doctor`."""
    add_json(parser)


def execute(args: argparse.Namespace) -> Outcome:
    """Probe; exit code 1 when this machine can run no engine as it is."""
    problems: list[dict[str, str]] = []

    def problem(what: str, mend: str) -> None:
        problems.append({"problem": what, "mend": mend})

    document: dict[str, Any] = {
        "versions": timing.versions(),
        "machine": _machine(problem),
        "onnxruntime": _onnxruntime(problem),
        "openvino": _openvino(problem),
        "gpu": _gpu(problem),
        "engines": _engines(problem),
    }
    for name in _CORE_PACKAGES:
        if name not in document["versions"] and _version(name) is None:
            problem(f"package {name} is missing", "pip install asd-rt")
    document["best_engine"] = best = _best(problem)
    document["problems"] = problems
    damaged = {entry["path"] for entry in document["engines"] if not entry["ok"]}
    usable = best is not None and best not in damaged
    usable &= bool(document["onnxruntime"]["providers"] or document["gpu"]["devices"])
    document["ok"] = usable and not problems
    return Outcome(document, _text(document), code=0 if usable else 1)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine(problem: Any) -> dict[str, Any]:
    cpus = machine.affinity_cpus()
    found = timing.describe_machine()
    found |= {
        "affinity_cpus": len(cpus),
        "physical_cores": machine.physical_cores(cpus),
        "cgroup_cpus": machine.cgroup_cpu_limit(),
        "threads": machine.usable_cores(),
    }
    if not set(found["instruction_sets"]) & {"avx2", "asimd"}:
        problem(
            "this processor has neither AVX2 nor NEON: video will be slow", "use a newer machine"
        )
    return found


def _onnxruntime(problem: Any) -> dict[str, Any]:
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(both) == 2:
        problem(
            "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other",
            f"pip uninstall -y onnxruntime onnxruntime-gpu && {INSTALL_CPU}",
        )
    try:
        module = import_module("onnxruntime")
        return {"version": module.__version__, "providers": list(module.get_available_providers())}
    except (ImportError, AttributeError) as error:
        problem(f"ONNX Runtime cannot be imported ({error})", INSTALL_CPU)
        return {"version": None, "providers": []}


def _runtime(engine: Path) -> str:
    """What an engine's passes run on; nothing where its manifest cannot be read."""
    try:
        return read_manifest(engine).runtime
    except AsdError:
        return ""


def _openvino(problem: Any) -> dict[str, Any]:
    """What computes the passes of bf16 and large int8 engines, and in which type this processor does."""
    version = _version("openvino")
    fast = machine.bf16_instructions()
    needed = any(_runtime(path) == "openvino" for path in list_engines(ENGINES_DIR))
    if version is None and needed:
        problem(
            f"./{ENGINES_DIR} has an engine that needs it, but OpenVINO is not installed",
            INSTALL_CPU,
        )
    if version is not None and needed and not fast:
        problem(
            "this processor has no bfloat16 instructions: engines for OpenVINO compute in float32, slowly",
            "use an fp32 engine",
        )
    return {"version": version, "bf16_with": fast}


def _gpu(problem: Any) -> dict[str, Any]:
    """NVIDIA driver, cards and TensorRT. No CUDA library is touched where there is no driver."""
    found: dict[str, Any] = {
        "driver": _driver_version(),
        "tensorrt": _version("tensorrt"),
        "tensorrt_rtx": _version("tensorrt-rtx"),
        "devices": 0,
    }
    if found["driver"] is None:
        return found
    try:
        status, count = import_module("cuda.bindings.runtime").cudaGetDeviceCount()
        found["devices"] = int(count) if int(status) == 0 else 0
        if int(status) != 0:
            problem(f"the CUDA driver answers with error {int(status)}", "update the NVIDIA driver")
    except ImportError:
        problem("there is an NVIDIA driver, but no CUDA for Python", "pip install 'asd-rt[rtx]'")
    return found


def _driver_version() -> str | None:
    if not has_nvidia_driver():
        return None
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return "present"


def _engines(problem: Any) -> list[dict[str, Any]]:
    engines = []
    for path in (*list_engines(ENGINES_DIR), *list_engines(PACKAGED_DIR)):
        entry: dict[str, Any] = {"path": str(path), "ok": True}
        mend = PACKAGED if path.parent == PACKAGED_DIR else COPY
        try:
            manifest = read_manifest(path)
            entry |= {"backend": manifest.backend, "precision": manifest.precision}
            verify(path, manifest)
            warning = accuracy_warning(path, manifest)
            if warning:
                problem(warning, mend)
        except AsdError as error:
            entry["ok"] = False
            problem(str(error), mend)
        engines.append(entry)
    return engines


def _best(problem: Any) -> str | None:
    try:
        return str(best_engine())
    except AsdError as error:
        problem(str(error), BUILD)
        return None


def _text(document: dict[str, Any]) -> str:
    host, runtime, gpu = document["machine"], document["onnxruntime"], document["gpu"]
    limit = "none" if host["cgroup_cpus"] is None else f"{host['cgroup_cpus']:g} CPUs"
    memory = size_text(host["memory_bytes"]) if host["memory_bytes"] else "unknown"
    providers = ", ".join(runtime["providers"]) or "none"
    rows = [
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        ),
        ("processor", f"{host['cpu']}, memory {memory}"),
        ("instructions", ", ".join(host["instruction_sets"]) or "none that matter"),
        (
            "threads",
            f"{host['threads']} ({host['affinity_cpus']} CPUs by affinity, {host['physical_cores']} cores, "
            f"cgroup limit {limit})",
        ),
        (
            "ONNX Runtime",
            f"{runtime['version'] or 'absent'}; providers: {providers}",
        ),
        (
            "OpenVINO",
            f"{document['openvino']['version'] or 'absent'}; bfloat16 by "
            f"{', '.join(document['openvino']['bf16_with']) or 'nothing here'}",
        ),
        (
            "NVIDIA",
            f"driver {gpu['driver'] or 'absent'}, {gpu['devices']} cards, "
            f"TensorRT {gpu['tensorrt'] or 'absent'}, TensorRT-RTX {gpu['tensorrt_rtx'] or 'absent'}",
        ),
    ]
    for engine in document["engines"]:
        state = "ok" if engine["ok"] else "damaged"
        state = f"{engine.get('backend', '?')} {engine.get('precision', '?')}, {state}"
        rows.append(("engine", f"{engine['path']}: {state}"))
    rows.append(("default engine", document["best_engine"] or "none"))
    lines = [table(rows)]
    for item in document["problems"]:
        lines.append(f"problem: {item['problem']}\n   mend: {item['mend']}")
    if not document["problems"]:
        lines.append("no problems found")
    return "\n".join(lines)
