"""Imports point left only: asd_rt <- train <- export <- benchmarks, tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = ("asd_rt", "train", "export", "benchmarks", "tests")
# What the runtime may import besides the standard library. The backends are optional.
RUNTIME = {"asd_rt", "numpy", "safetensors", "av"}
BACKENDS = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"}
# What the server may import besides, and nothing else of the runtime.
SERVER = {"starlette", "uvicorn", "websockets", "prometheus_client", "PIL", "h11", "ray"}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that `path` imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_layer_imports_nothing_to_its_right(root: Path, layer: str) -> None:
    right = set(LAYERS[LAYERS.index(layer) + 1 :])
    paths = sorted((root / layer).rglob("*.py"))
    assert paths
    wrong = {str(p.relative_to(root)): imported(p) & right for p in paths}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_runtime_imports_only_what_it_installs(root: Path) -> None:
    allowed = RUNTIME | BACKENDS | set(sys.stdlib_module_names)
    paths = (root / "asd_rt").rglob("*.py")
    server = root / "asd_rt" / "serve"
    wrong = {
        str(p.relative_to(root)): imported(p) - allowed - (SERVER if server in p.parents else set())
        for p in paths
    }
    assert {path: names for path, names in wrong.items() if names} == {}


def test_training_needs_no_export_packages(root: Path) -> None:
    wrong = {
        str(p.relative_to(root)): imported(p) & {"onnx", "onnxscript", "onnxruntime"}
        for p in (root / "train").rglob("*.py")
    }
    assert {path: names for path, names in wrong.items() if names} == {}


def test_import_is_quick_and_lean() -> None:
    code = (
        "import time; begin = time.process_time(); import asd_rt; took = time.process_time() - begin\n"
        "import sys\n"
        "heavy = {'torch', 'train', 'export', 'onnx', 'onnxruntime', 'av', 'PIL', 'ftfy', 'tokenizers'}\n"
        "heavy &= set(sys.modules)\n"
        "print(took, *sorted(heavy))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    found = [run.stdout.split() for run in runs]
    assert found[0][1:] == []
    assert min(float(took) for took, *_ in found) <= 0.3  # of the processor, however busy it is
