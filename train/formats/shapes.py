"""What a network of a configuration is made of, and one error for everything that does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from asd_rt.config import ModelConfig
from asd_rt.errors import CheckpointError
from asd_rt.progress import Progress
from train.model import WanModel

FLOAT_TYPES = ("F32", "F16", "BF16")
MAX_LISTED = 40

Shapes = Mapping[str, tuple[int, ...]]


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of every weight of a network of `config`."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in WanModel(config).state_dict().items()}


def listing(items: list[str], join: str = "; ") -> str:
    """`items` in a line, those beyond MAX_LISTED as a count."""
    more = [] if len(items) <= MAX_LISTED else [f"and {len(items) - MAX_LISTED} more"]
    return join.join(items[:MAX_LISTED] + more)


def check_shapes(
    where: str,
    found: Shapes,
    expected: Shapes,
    types: Mapping[str, str] | None = None,
    note: str = "",
) -> None:
    """Check tensors against a configuration; -1 in an expected shape stands for any size.

    Args:
        where: what to call the source in the error.
        found: official key -> shape.
        expected: official key -> shape.
        types: official key -> stored type, in the names of safetensors; None = as expected.
        note: what to say before the list.

    Raises:
        CheckpointError: lists every missing, extra, misshapen or wrongly typed tensor.
    """
    problems = [
        ("missing", f"{name} missing {list(shape)}")
        for name, shape in expected.items()
        if name not in found
    ]
    problems += [
        ("extra", f"{name} extra {list(shape)}")
        for name, shape in found.items()
        if name not in expected
    ]
    for name, shape in found.items():
        want = expected.get(name, shape)
        fits = len(shape) == len(want) and all(
            w in (-1, s) for s, w in zip(shape, want, strict=True)
        )
        if not fits:
            text = f"{name} misshapen: expected {list(want)}, found {list(shape)}"
            problems.append(("misshapen", text))
        elif types is not None and types[name] not in FLOAT_TYPES:
            text = f"{name} of type {types[name]}: expected one of {', '.join(FLOAT_TYPES)}"
            problems.append(("of another type", text))
    if problems:
        kinds = ", ".join(
            f"{n} {kind}" for kind, n in Counter(kind for kind, _ in problems).items()
        )
        raise CheckpointError(
            f"{where}: {note}{len(problems)} of {len(expected)} tensors do not fit the configuration "
            f"({kinds}): {listing([text for _, text in problems])}; "
            "copy or download the weights again, or give the config.json that belongs to them"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or not a number; a tenth of the time of isfinite, and no copy."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read every value once, tensor by tensor.

    Raises:
        CheckpointError: names all tensors with infinite or not-a-number values.
    """
    bad = []
    with Progress(f"checking {path.name}", len(tensors)) as progress:
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                bad.append(name)
            progress.advance()
    if bad:
        raise CheckpointError(
            f"{path}: infinite or not-a-number values in {listing(bad, ', ')}; copy or download it again"
        )
