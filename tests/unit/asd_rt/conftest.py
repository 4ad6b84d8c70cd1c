"""A toy engine: a few random numbers behind the contract's tensor names, built without torch or export.

`ToyNetwork` computes in numpy what the toy ONNX graphs compute, with a cache that is a plain list of frames;
the frame loop over both must agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from asd_rt.backends import cuda
from asd_rt.config import CacheConfig, ModelConfig
from asd_rt.kv_cache import Move
from asd_rt.manifest import Manifest, Part, TensorSpec, sha256_file, write_manifest
from asd_rt.rope import rope_table
from tests.unit.asd_rt.fake_card import FakeCuda, FakeRuntime, FakeTrt

MODEL = ModelConfig(
    dim=12,
    ffn_dim=24,
    freq_dim=4,
    text_dim=3,
    text_len=4,
    in_dim=2,
    out_dim=2,
    num_heads=2,
    num_layers=2,
)
WORDS = {"red": 1, "blue": 2, "three": 3, "3": 3, "right": 4, "a": 0, "moving": 0}
LATENT_HW = (4, 2)
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
FloatArray = NDArray[np.float32]
_rng = np.random.default_rng(5)
W_KEY = [_rng.standard_normal((8, 12)).astype(np.float32) for _ in range(2)]
W_VALUE = [_rng.standard_normal((8, 12)).astype(np.float32) for _ in range(2)]
W_TIME = _rng.standard_normal((1, 12)).astype(np.float32)
W_PROMPT = _rng.standard_normal((3, 12)).astype(np.float32)
TABLE = _rng.standard_normal((5, 3)).astype(np.float32)
W_PIXEL = _rng.standard_normal((2, 3)).astype(np.float32)


class ToyNetwork:
    """The toy denoiser in numpy, behind the Denoiser protocol. Its cache maps slot -> keys and values."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, range, int]] = []
        self.joined_calls: list[tuple[float, range, int, list[int]]] = []
        self.copied_frames = 0

    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        self.token_hw = (latent_hw[0] // 2, latent_hw[1] // 2)
        self.slots: list[list[tuple[FloatArray, FloatArray]] | None] = [None] * capacity_frames

    def set_prompt(self, context: FloatArray) -> None:
        self.prompt = np.tanh(context @ W_PROMPT).mean(axis=(1, 2))

    can_join = True

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        self.calls.append((timestep, frames, past_frames))
        return self._pass(latents, timestep, frames, past_frames, range(past_frames))

    def denoise_joined(
        self,
        clean: FloatArray,
        noisy: FloatArray,
        timestep: float,
        frames: range,
        past_frames: int,
        hidden: Sequence[int],
    ) -> FloatArray:
        self.joined_calls.append((timestep, frames, past_frames, list(hidden)))
        size = len(frames) // 2
        self._pass(clean, 0.0, frames[:size], past_frames, range(past_frames))
        end = past_frames + size
        seen = [slot for slot in range(end) if slot not in hidden]
        return self._pass(noisy, timestep, frames[size:], end, seen)

    def _pass(
        self,
        latents: FloatArray,
        timestep: float,
        frames: range,
        start: int,
        seen: Sequence[int],
    ) -> FloatArray:
        """Write into the slots from `start` on; attend to the slots `seen` and to those."""
        batch, count = latents.shape[:2]
        tokens = latents.reshape(batch, -1, 8).swapaxes(0, 1)
        cos, sin = rope_table(MODEL.head_dim, frames, *self.token_hw)
        turn = (cos - sin).mean(axis=1).reshape(-1, 1, 1, 1)
        flow = (
            0.3 * latents
            + np.tanh(W_TIME * timestep / 1000).mean()
            + self.prompt.reshape(-1, 1, 1, 1, 1)
        )
        new = [
            tuple((tokens @ w[i]).reshape(-1, batch, 2, 6) * turn for w in (W_KEY, W_VALUE))
            for i in range(2)
        ]
        size = len(tokens) // count
        for j in range(count):
            own = slice(j * size, (j + 1) * size)
            self.slots[start + j] = [(k[own], v[own]) for k, v in new]
        visible = [self.slots[slot] for slot in (*seen, *range(start, start + count))]
        for i in range(2):
            held = [slot[i] for slot in visible if slot is not None]
            keys, values = (np.concatenate(parts) for parts in zip(*held, strict=True))
            mean = np.tanh(keys).mean(axis=0, keepdims=True) * values.mean(axis=0, keepdims=True)
            flow = flow + mean.mean(axis=(0, 2, 3)).reshape(-1, 1, 1, 1, 1)
        return flow.astype(np.float32)

    def move(self, moves: Sequence[Move]) -> None:
        for move in moves:
            for i in range(move.frames):
                self.slots[move.target + i] = self.slots[move.source + i]
                self.copied_frames += 1

    def read_cache(self, layer: int, slots: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        held = [slot[layer] for slot in (self.slots[s] for s in slots) if slot is not None]
        k, v = (np.concatenate(parts).swapaxes(0, 1) for parts in zip(*held, strict=True))
        return k, v


@dataclass(frozen=True)
class ToyEngine:
    """Where a toy engine lies and what its manifest says."""

    path: Path
    manifest: Manifest


class _Graph:
    """Collects nodes and constants of one toy graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def const(self, value: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def __call__(self, op: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        name = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def shape(self, x: str, *sizes: int, out: str | None = None) -> str:
        return self("Reshape", x, self.const(sizes, np.int64), out=out)

    def mean(self, x: str, *axes: int, keepdims: int = 1) -> str:
        return self("ReduceMean", x, self.const(axes, np.int64), keepdims=keepdims)

    def save(
        self, path: Path, inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec]
    ) -> Part:
        def info(specs: dict[str, TensorSpec]) -> list[onnx.ValueInfoProto]:
            kind = {"float32": FLOAT, "int64": INT64}
            return [
                helper.make_tensor_value_info(n, kind[s.dtype], list(s.shape))
                for n, s in specs.items()
            ]

        graph = helper.make_graph(self.nodes, "toy", info(inputs), info(outputs), self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return Part(path.name, sha256_file(path), path.stat().st_size, inputs, outputs)


def f32(*shape: int | str) -> TensorSpec:
    return TensorSpec("float32", shape)


def _denoiser(path: Path) -> Part:
    g = _Graph()
    inputs = {
        "latents": f32(1, "F", 2, "h", "w"),
        "modulation": f32(14, 12),
        "rope_cos": f32("T", 3),
        "rope_sin": f32("T", 3),
    }
    outputs = {"flow": f32(1, "F", 2, "h", "w")}
    tokens = g("Reshape", "latents", g.const([1, -1, 8], np.int64))
    turn = g.shape(g.mean(g("Sub", "rope_cos", "rope_sin"), 1), 1, -1, 1)
    flow = g("Mul", "latents", g.const(0.3))
    flow = g("Add", flow, g.shape(g.mean("modulation", 0, 1, keepdims=0), 1, 1, 1, 1, 1))
    for i in range(2):
        whole = {}
        for kind, weights in (("k", W_KEY), ("v", W_VALUE)):
            inputs[f"prompt_{kind}.{i}"] = f32(1, 4, 12)
            inputs[f"past_{kind}.{i}"] = f32(1, "P", 12)
            outputs[f"new_{kind}.{i}"] = f32(1, "T", 12)
            y = g("MatMul", tokens, g.const(weights[i]))
            new = g("Mul", y, turn, out=f"new_{kind}.{i}")
            whole[kind] = g("Concat", f"past_{kind}.{i}", new, axis=1)
        seen = g("Mul", g.mean(g("Tanh", whole["k"]), 1), g.mean(whole["v"], 1))
        seen = g.shape(g.mean(seen, 1, 2, keepdims=0), 1, 1, 1, 1, 1)
        # Half of the prompt's mean comes from each of keys and values, summed over two layers.
        prompt = g(
            "Add",
            g.mean(f"prompt_k.{i}", 1, 2, keepdims=0),
            g.mean(f"prompt_v.{i}", 1, 2, keepdims=0),
        )
        prompt = g.shape(g("Mul", prompt, g.const(0.25)), 1, 1, 1, 1, 1)
        flow = g("Add", g("Add", flow, seen), prompt, out="flow" if i == 1 else None)
    return g.save(path, inputs, outputs)


def _time(path: Path) -> Part:
    g = _Graph()
    t = g.shape(g("Mul", "timestep", g.const(1e-3)), 1, 1)
    embedding = g("Tanh", g("Mul", t, g.const(W_TIME)))
    g("Tile", embedding, g.const([14, 1], np.int64), out="modulation")
    return g.save(path, {"timestep": f32(1)}, {"modulation": f32(14, 12)})


def _step(path: Path) -> Part:
    g = _Graph()
    first, second = (_cut_axis(g, "sigmas", i) for i in range(2))
    clean = g("Sub", "latents", g("Mul", first, "flow"))
    rest = g("Mul", g("Sub", g.const(1.0), second), clean)
    g("Add", rest, g("Mul", second, "noise"), out="next")
    shape = f32(1, "F", 2, "h", "w")
    given = dict.fromkeys(("latents", "flow", "noise"), shape) | {"sigmas": f32(2)}
    return g.save(path, given, {"next": shape})


def _cut_axis(g: _Graph, x: str, place: int) -> str:
    return g("Slice", x, *(g.const([n], np.int64) for n in (place, place + 1, 0)))


def _prompt(path: Path) -> Part:
    g = _Graph()
    y = g("Tanh", g("MatMul", "context", g.const(W_PROMPT)))
    outputs = {}
    for name in ("prompt_k.0", "prompt_v.0", "prompt_k.1", "prompt_v.1"):
        g("Identity", y, out=name)
        outputs[name] = f32(1, 4, 12)
    return g.save(path, {"context": f32(1, 4, 3)}, outputs)


def _text(path: Path) -> Part:
    g = _Graph()
    g("Gather", g.const(TABLE), "tokens", out="context")
    return g.save(path, {"tokens": TensorSpec("int64", ("B", 4))}, {"context": f32("B", 4, 3)})


def _decoder(path: Path) -> Part:
    g = _Graph()
    pixels = g("MatMul", g("Transpose", "latents", perm=[0, 1, 3, 4, 2]), g.const(W_PIXEL))
    g("Transpose", g("Tanh", pixels), perm=[0, 1, 4, 2, 3], out="frames")
    return g.save(
        path, {"latents": f32("B", "F", 2, "h", "w")}, {"frames": f32("B", "F", 3, "h", "w")}
    )


def _write_stream_codec(folder: Path) -> dict[str, Part]:
    """A codec of 2 frames a latent frame that remembers one: see `whole_decode` and `whole_encode`."""
    parts, size = {}, ("h", "w")
    for first in (True, False):
        g = _Graph()
        inputs, count = {"latents": f32(1, 1 if first else "F", 2, *size)}, "2F"
        pairs, kept = "latents", "latents"
        if not first:
            inputs["state.0"] = f32(1, 1, 2, *size)
            whole = g("Concat", "state.0", "latents", axis=1)
            before, kept = _cut(g, whole, 0, -1), _cut(g, whole, -1, BIG)
            both = [g("Unsqueeze", x, g.const([2], np.int64)) for x in (before, "latents")]
            mean = g("Mul", g("Add", *both), g.const(0.5))
            pairs = g("Reshape", g("Concat", mean, both[1], axis=2), _pair_shape(g, "latents", 2))
        g("Identity", kept, out="new_state.0")
        pixels = g("MatMul", g("Transpose", pairs, perm=[0, 1, 3, 4, 2]), g.const(W_PIXEL))
        g("Transpose", g("Tanh", pixels), perm=[0, 1, 4, 2, 3], out="frames")
        outputs = {
            "frames": f32(1, 1 if first else count, 3, *size),
            "new_state.0": f32(1, 1, 2, *size),
        }
        name = "decoder_first" if first else "decoder"
        parts[name] = g.save(folder / f"toy_fp32.{name}.onnx", inputs, outputs)

        g = _Graph()
        inputs = {"frames": f32(1, 1 if first else count, 3, *size)}
        mixed, kept = "frames", "frames"
        if not first:
            inputs["state.0"] = f32(1, 1, 3, *size)
            whole = g("Concat", "state.0", "frames", axis=1)
            kept = _cut(g, whole, -1, BIG)
            taps = [_cut(g, whole, 0, -1, 2), _cut(g, whole, 1, BIG, 2), _cut(g, whole, 2, BIG, 2)]
            scaled = [g("Mul", x, g.const(2.0**i)) for i, x in enumerate(taps)]
            mixed = g("Sum", *scaled)
        g("Identity", kept, out="new_state.0")
        y = g("MatMul", g("Transpose", mixed, perm=[0, 1, 3, 4, 2]), g.const(W_PIXEL.T))
        g("Transpose", y, perm=[0, 1, 4, 2, 3], out="latents")
        outputs = {
            "latents": f32(1, 1 if first else "F", 2, *size),
            "new_state.0": f32(1, 1, 3, *size),
        }
        name = "encoder_first" if first else "encoder"
        parts[name] = g.save(folder / f"toy_fp32.{name}.onnx", inputs, outputs)
    return parts


BIG = 2**31


def _cut(g: _Graph, x: str, start: int, end: int, step: int = 1) -> str:
    return g("Slice", x, *(g.const([n], np.int64) for n in (start, end, 1, step)))


def _pair_shape(g: _Graph, like: str, times: int) -> str:
    """Shape of `like` with `times` as many frames."""
    return g("Mul", g("Shape", like), g.const([1, times, 1, 1, 1], np.int64))


def whole_decode(latents: FloatArray) -> FloatArray:
    """What the stream codec makes of a whole clip [1, F, 2, h, w], in numpy."""
    pairs = [latents[:, 0]]
    for i in range(1, latents.shape[1]):
        pairs += [(latents[:, i - 1] + latents[:, i]) / 2, latents[:, i]]
    return np.tanh(np.einsum("bfchw,cp->bfphw", np.stack(pairs, axis=1), W_PIXEL))


def whole_encode(frames: FloatArray) -> FloatArray:
    """What the stream codec makes of a whole clip [1, 1 + 2n, 3, h, w], in numpy."""
    mixed = [frames[:, 0]]
    for i in range(1, frames.shape[1], 2):
        mixed.append(frames[:, i - 1] + 2 * frames[:, i] + 4 * frames[:, i + 1])
    return np.einsum("bfphw,cp->bfchw", np.stack(mixed, axis=1), W_PIXEL)


def build_toy(
    folder: Path, cache: CacheConfig, latent_hw: tuple[int, int] | None = LATENT_HW
) -> ToyEngine:
    """Write a toy engine into `folder`."""
    path = folder / "toy_fp32.onnx"
    parts = {
        "denoiser": _denoiser(path),
        "time": _time(folder / "toy_fp32.time.onnx"),
        "prompt": _prompt(folder / "toy_fp32.prompt.onnx"),
        "step": _step(folder / "toy_fp32.step.onnx"),
        "text": _text(folder / "toy_fp32.text.onnx"),
        "decoder": _decoder(folder / "toy_fp32.decoder.onnx"),
    }
    manifest = Manifest(
        name="toy_fp32",
        precision="fp32",
        backend="onnx",
        model=MODEL,
        cache=cache,
        latent_hw=latent_hw,
        timestep_shift=5.0,
        step_lists={},
        default_plan={"steps": 1, "first_steps": 4},
        fps=16,
        display_scale=2,
        tokenizer={"kind": "vocabulary", "words": WORDS},
        parts=parts,
        checkpoint={"name": "toy", "sha256": "0" * 64},
        tools={"onnx": onnx.__version__},
        codec={"kind": "linear", "spatial": 1, "temporal": 1},
    )
    write_manifest(path, manifest)
    return ToyEngine(path, manifest)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyEngine:
    """Window of 6 frames with 1 sink, blocks of 2."""
    cache = CacheConfig(block_frames=2, window_frames=6, sink_frames=1)
    return build_toy(tmp_path_factory.mktemp("toy"), cache)


@pytest.fixture
def own_toy(tmp_path: Path) -> ToyEngine:
    """A toy engine that a test may spoil; no window, at most 9 frames of 3-frame blocks."""
    return build_toy(tmp_path, CacheConfig(block_frames=3, max_frames=9))


@pytest.fixture(scope="session")
def stream_toy(tmp_path_factory: pytest.TempPathFactory) -> ToyEngine:
    """As `toy`, with blocks of 3 and a codec that is 2 frames long and remembers one."""
    toy = build_toy(tmp_path_factory.mktemp("stream"), CacheConfig(block_frames=3))
    parts = {name: part for name, part in toy.manifest.parts.items() if name != "decoder"}
    parts |= _write_stream_codec(toy.path.parent)
    codec = {"kind": "wan", "spatial": 1, "temporal": 2}
    manifest = replace(toy.manifest, parts=parts, codec=codec)
    write_manifest(toy.path, manifest)
    return ToyEngine(toy.path, manifest)


@pytest.fixture
def respell() -> Callable[..., ToyEngine]:
    """Write a toy engine's manifest again with other fields."""

    def change(engine: ToyEngine, **fields: object) -> ToyEngine:
        manifest = replace(engine.manifest, **fields)
        write_manifest(engine.path, manifest)
        return ToyEngine(engine.path, manifest)

    return change


@pytest.fixture
def network() -> ToyNetwork:
    return ToyNetwork()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCuda]:
    """Install a fake TensorRT and a fake CUDA with so many cards."""

    def install(kind: type[FakeCuda] = FakeCuda, **settings: Any) -> FakeCuda:
        runtime = kind(**settings)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTrt("tensorrt_rtx", runtime))
        monkeypatch.setattr("asd_rt.backends.tensorrt.import_cuda", lambda: runtime)
        monkeypatch.setattr(cuda, "import_cuda", lambda: runtime)
        FakeRuntime.made = 0
        return runtime

    return install
