"""Finding engines on this machine: ./engines first, else the small one inside the package."""

from __future__ import annotations

from pathlib import Path

from asd_rt.errors import EngineError

ENGINES_DIR = Path("engines")
PACKAGED_DIR = Path(__file__).parent / "engine"
DEVICES = ("auto", "cpu", "cuda")  # that an ONNX engine may be asked to run on
BUILD = "python -m export.build --steps 1"
_PREFERENCE = (".plan", ".onnx")


def list_engines(folder: Path) -> list[Path]:
    """Engine files in `folder`: those with a manifest beside them, sorted by name."""
    if not folder.is_dir():
        return []
    found = (path.with_suffix("") for path in folder.glob("*.json"))
    return sorted(path for path in found if path.suffix in _PREFERENCE and path.is_file())


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded, found out without touching any CUDA library."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()


def best_engine(folder: Path | None = None) -> Path:
    """The engine that serves this machine best.

    Plans need an NVIDIA driver and come first where there is one. Among equals fp32 wins on a CPU (it is
    fastest there and exact) and the lower precision on a GPU.

    Args:
        folder: where built engines lie; None = ./engines.

    Raises:
        EngineError: there is none.
    """
    gpu = has_nvidia_driver()
    for place in (folder or ENGINES_DIR, PACKAGED_DIR):
        candidates = [p for p in list_engines(place) if gpu or p.suffix != ".plan"]
        if candidates:
            return min(candidates, key=lambda p: _rank(p, gpu))
    raise EngineError(
        f"no engine for this machine in ./{ENGINES_DIR} or inside the package; build one with: {BUILD}"
    )


def _rank(path: Path, gpu: bool) -> tuple[int, int, str]:
    order = ("fp16", "bf16", "int8", "fp32") if gpu else ("fp32", "int8", "bf16", "fp16")
    precision = next((i for i, name in enumerate(order) if name in path.name), len(order))
    return (_PREFERENCE.index(path.suffix) if gpu else 0, precision, path.name)
