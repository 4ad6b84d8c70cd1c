"""Inputs for polygraphy: a denoising pass that the student really meets, behind a full window.

    ENGINE=engines/asd_int8.onnx polygraphy run engines/asd_int8.onnx --onnxrt \
        --data-loader-script benchmarks/polygraphy_inputs.py

ENGINE is an ONNX engine of the shipped student (default: engines/asd_fp32.onnx) or, with CHECKPOINT, of
another one. Numbers drawn at random would not do: int8 knows the ranges that calibration saw.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from asd_rt.manifest import read_manifest
from export.build import default_checkpoint
from export.metrics import Array
from export.passes import checkpoint_cases
from train.checkpoint import load_checkpoint


def load_data() -> Iterator[dict[str, Array]]:
    """What polygraphy asks for: one set of inputs of the denoiser part, in the engine's types.

    Raises:
        AsdError: no such engine or checkpoint.
    """
    manifest = read_manifest(Path(os.environ.get("ENGINE", "engines/asd_fp32.onnx")))
    checkpoint = load_checkpoint(os.environ.get("CHECKPOINT") or default_checkpoint())
    cases = checkpoint_cases(manifest, checkpoint, checkpoint.build_model())
    passes = [case.inputs for case in cases if case.part == "denoiser"]
    inputs = manifest.parts["denoiser"].inputs
    # The last three are behind a full window: at timesteps 1000, 625 and 0.
    yield {name: x.numpy().astype(np.dtype(inputs[name].dtype)) for name, x in passes[-2].items()}
