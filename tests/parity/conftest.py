"""Golden traces, random small networks, and a frame loop written a second time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from asd_rt.manifest import Part
from train.model import WanModel

GOLDEN = ("block3_4step", "block3_ffe_1step", "frame1_window_sink", "batch2_short_text_i2v")
Array = NDArray[Any]


@dataclass(frozen=True)
class Trace:
    """One golden folder."""

    folder: Path
    values: dict[str, Any]
    tensors: dict[str, Array]

    @property
    def initial(self) -> Array | None:
        frames = self.values["initial_blocks"] * self.values["block_frames"]
        return self.tensors["latents"][:, :frames] if frames else None

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of each generated block."""
        return tuple(self.values["steps_per_block"][self.values["initial_blocks"] :])


@pytest.fixture(params=GOLDEN)
def trace(request: pytest.FixtureRequest, data: Path) -> Trace:
    folder = data / "golden" / request.param
    values = json.loads((folder / "trace.json").read_text())
    return Trace(folder, values, load_file(folder / "trace.safetensors"))


@pytest.fixture
def relative_l2() -> Callable[[Array, Array], float]:
    def measure(found: Array, expected: Array) -> float:
        assert found.shape == expected.shape
        assert np.isfinite(found).all()
        difference = found.astype(np.float64) - expected
        return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))

    return measure


@dataclass
class NaiveLoop:
    """The frame loop as one would first write it: a list of frames with their keys and values.

    Shares no code with `asd_rt` and only `WanModel` with the torch engine.
    """

    model: WanModel
    block: int
    window: int
    sink: int
    shift: float

    @torch.no_grad()
    def run(
        self, noise: Array, context: Array, steps: list[int], renoise: dict[tuple[int, int], Array]
    ) -> tuple[Array, list[tuple[Array, Array]]]:
        """Latents, and per layer the keys and values [B, tokens, H, D] of all held frames."""
        config = self.model.config
        lists = {1: [1000], 2: [1000, 500], 3: [1000, 750, 500], 4: [1000, 750, 500, 250]}
        height, width = noise.shape[3] // 2, noise.shape[4] // 2
        padded = np.zeros((len(noise), config.text_len, config.text_dim), np.float32)
        padded[:, : context.shape[1]] = context
        prompt = self.model.embed_prompt(torch.from_numpy(padded))
        held: list[tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]] = []
        video = []

        def forward(x: Array, t: float, first: int) -> tuple[Array, list[Any]]:
            past = None
            if held:
                past = [
                    type(prompt[0])(
                        torch.cat([kvs[i][0] for _, kvs in held]),
                        torch.cat([kvs[i][1] for _, kvs in held]),
                    )
                    for i in range(config.num_layers)
                ]
            rope = self._rope(range(first, first + self.block), height, width)
            time = self.model.embed_time(torch.full((len(x), self.block), t))
            flow, new = self.model.denoise(torch.from_numpy(x.copy()), time, prompt, rope, past)
            return flow.numpy(), new

        for index, count in enumerate(steps):
            first = index * self.block
            while self.window and len(held) + self.block > self.window:
                held.remove(min((f for f in held if f[0] >= self.sink), key=lambda f: f[0]))
            x = clean = noise[:, first : first + self.block]
            for i, step in enumerate(lists[count]):
                u = step / 1000
                sigma = self.shift * u / (1 + (self.shift - 1) * u)
                if i:
                    x = ((1 - sigma) * clean + sigma * renoise[index, i - 1]).astype(np.float32)
                flow, _ = forward(x, 1000 * sigma, first)
                clean = (x.astype(np.float64) - sigma * flow).astype(np.float32)
            video.append(clean)
            _, new = forward(clean, 0.0, first)
            size = height * width
            for f in range(self.block):
                cut = slice(f * size, (f + 1) * size)
                held.append((first + f, [(kv.k[cut], kv.v[cut]) for kv in new]))
        held.sort(key=lambda f: f[0])
        cache = [
            tuple(torch.cat([kvs[i][j] for _, kvs in held]).transpose(0, 1).numpy() for j in (0, 1))
            for i in range(config.num_layers)
        ]
        return np.concatenate(video, axis=1), cache

    def _rope(self, frames: range, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles token by token."""
        channels = self.model.config.head_dim // 2
        spatial = channels // 3
        rows = []
        for f in frames:
            for y in range(height):
                for x in range(width):
                    angles = []
                    for place, n in ((f, channels - 2 * spatial), (y, spatial), (x, spatial)):
                        angles += [place * 10000 ** (-i / n) for i in range(n)]
                    rows.append(angles)
        table = torch.tensor(rows, dtype=torch.float64)
        return table.cos().float(), table.sin().float()


@pytest.fixture
def naive_loop() -> type[NaiveLoop]:
    return NaiveLoop


@pytest.fixture
def placeholder_parts() -> dict[str, Part]:
    """Parts of an engine that has no files, for manifests of torch engines."""
    return {name: Part(name, "0" * 64, 0) for name in ("denoiser", "time", "prompt")}
