"""polygraphy takes our engines as they are: the commands of docs/engine.md, and its Python interface.

Most of its time goes into an fp32 engine, which other tests of this folder use too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asd_rt.manifest import Manifest, Part, read_manifest, sha256_file, write_manifest
from export.lowering import LOWERINGS
from export.onnx import export_part, serialize, tensor_specs
from export.parts import engine_parts
from export.quantize import LAYERS, Scheme
from export.weights import WeightsFile
from train.checkpoint import load_checkpoint

pytest.importorskip("polygraphy", reason="not installed: pip install polygraphy")


@pytest.fixture(scope="module")
def engines(
    student: Path, built: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An fp32 engine, and denoisers of fp16 and int8 as a build writes them, which takes long."""
    folder, made = tmp_path_factory.mktemp("engines"), {"fp32": built / "asd_fp32.onnx"}
    checkpoint, manifest = load_checkpoint(student), read_manifest(built / "asd_fp32.onnx")
    model, how = checkpoint.build_model(), LOWERINGS["onnxruntime"]
    for precision in ("fp16", "int8"):
        names = {f"blocks.0.{name}": 0.05 for name in LAYERS}
        scheme = Scheme(names) if precision == "int8" else None
        part = engine_parts(checkpoint, model, precision, (4, 2), how, scheme)["denoiser"]
        file = folder / f"asd_{precision}.onnx"
        with WeightsFile(folder / f"asd_{precision}.weights") as weights:
            file.write_bytes(serialize(export_part("denoiser", part, how.opset, weights)))
        border = tensor_specs(part.inputs), tensor_specs(part.outputs)
        entry = Part(file.name, sha256_file(file), file.stat().st_size, *border)
        parts = {**manifest.parts, "denoiser": entry}
        write_manifest(file, Manifest(**vars(manifest) | {"parts": parts, "precision": precision}))
        made[precision] = file
    return made


@pytest.fixture
def polygraphy(root: Path, student: Path):
    """Run the command; returns its exit code and what it says."""

    def run(engine: Path, *words: str | Path) -> tuple[int, str]:
        program = Path(sys.executable).with_name("polygraphy")
        found = subprocess.run(
            [program, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=root,
            env={
                **os.environ,
                "PYTHONPATH": str(root),
                "ENGINE": str(engine),
                "CHECKPOINT": str(student),
            },
        )
        return found.returncode, found.stdout + found.stderr

    return run


def test_it_reads_every_part(built: Path) -> None:
    from polygraphy.backend.onnx import onnx_from_path

    for name, part in read_manifest(built / "asd_fp32.onnx").parts.items():
        if name == "weights":
            continue
        model = onnx_from_path(str(built / part.file))
        assert [value.name for value in model.graph.input] == list(part.inputs)
        assert [value.name for value in model.graph.output] == list(part.outputs)


@pytest.mark.parametrize(
    ("precision", "shown"),
    [("fp32", "RotaryEmbedding"), ("fp16", "dtype=float16"), ("int8", "QuantizeLinear")],
)
def test_it_shows_layers(precision: str, shown: str, engines: dict[str, Path], polygraphy) -> None:
    engine = engines[precision]
    code, said = polygraphy(engine, "inspect", "model", engine, "--show", "layers")
    assert code == 0 and shown in said and "past_k.0" in said


def test_it_compares_precisions(engines: dict[str, Path], tmp_path: Path, polygraphy) -> None:
    """fp32 saves what it made of a real pass; fp16 and int8 are held against that."""
    given = ("--onnxrt", "--data-loader-script", "benchmarks/polygraphy_inputs.py")
    made = tmp_path / "out.json"
    code, said = polygraphy(engines["fp32"], "run", engines["fp32"], *given, "--save-outputs", made)
    assert code == 0, said
    against = (*given, "--load-outputs", made, "--check-error-stat", "mean")
    for precision, bound in (("fp16", "2e-3"), ("int8", "0.1")):
        engine = engines[precision]
        code, said = polygraphy(engine, "run", engine, *against, "--rtol", "0", "--atol", bound)
        assert code == 0 and "PASSED | Output: 'flow'" in said, said
    code, said = polygraphy(engine, "run", engine, *against, "--rtol", "0", "--atol", "1e-6")
    assert code != 0 and "FAILED | Output: 'flow'" in said
