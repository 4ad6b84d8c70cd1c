"""The planner's arithmetic: what grows, what is allocated, and that what it suggests fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import asd_rt
from asd_rt import fitting, planner
from asd_rt.backends.ort_denoiser import OrtDenoiser
from asd_rt.config import CacheConfig, ModelConfig
from asd_rt.errors import ConfigError
from asd_rt.fitting import check_fits, fits, suggest
from asd_rt.manifest import Part, TensorSpec
from asd_rt.memory_report import memory_report, memory_text
from asd_rt.planner import Video, is_large, plan_memory, video_of

WAN = ModelConfig(
    dim=1536, ffn_dim=8960, freq_dim=256, text_dim=4096, text_len=512, in_dim=16, out_dim=16,
    num_heads=12, num_layers=30,
)  # fmt: skip
GB = 10**9


@st.composite
def videos(draw: st.DrawFn) -> Video:
    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    heads = number(1, 16)
    model = ModelConfig(
        dim=heads * 2 * number(3, 64), ffn_dim=number(1, 9000), freq_dim=2 * number(1, 128),
        text_dim=number(1, 4096), text_len=number(1, 512), in_dim=number(1, 16), out_dim=16,
        num_heads=heads, num_layers=number(1, 40),
    )  # fmt: skip
    block = number(1, 4)
    window = draw(st.sampled_from([0, block, 3 * block, number(block, 30)]))
    return Video(
        model=model,
        cache=CacheConfig(block, window),
        precision=draw(st.sampled_from(sorted(planner.WEIGHT_BYTES))),
        latent_hw=(2 * number(1, 60), 2 * number(1, 60)),
        frames=number(1, 100),
        backend=draw(st.sampled_from(["onnx", "tensorrt"])),
        batch=number(1, 4),
        joined=draw(st.booleans()),
        dumped=draw(st.booleans()),
        state={"state.0": TensorSpec("float16", (2, number(1, 96), "h", "8w"))},
    )


ASKED = ("frames", "rows", "columns", "batch", "window")
BUILT = ("num_layers", "ffn_dim", "text_len", "text_dim")


def grown(video: Video, what: str, by: int) -> Video:
    """`video` with more of one thing."""
    rows, columns = video.latent_hw
    if what == "rows":
        return replace(video, latent_hw=(rows + 2 * by, columns))
    if what == "columns":
        return replace(video, latent_hw=(rows, columns + 2 * by))
    if what == "window":
        wider = replace(video.cache, window_frames=video.cache.window_frames + by)
        return replace(video, cache=wider)
    if what in BUILT:
        model = replace(video.model, **{what: getattr(video.model, what) + by})
        return replace(video, model=model)
    return replace(video, **{what: getattr(video, what) + by})


@given(videos(), st.sampled_from(ASKED + BUILT), st.integers(1, 50))
def test_more_of_anything_never_needs_less(video: Video, what: str, by: int) -> None:
    assume(what != "window" or video.cache.window_frames)
    more = grown(video, what, by)
    assume(is_large(more.model) == is_large(video.model))  # large networks are held differently
    old, new = plan_memory(video).to_json(), plan_memory(more).to_json()
    assert all(new[key] >= old[key] for key in old)


@given(videos(), st.sampled_from(ASKED), st.integers(1, 50))
def test_cache_is_counted_exactly(video: Video, what: str, by: int) -> None:
    plan = plan_memory(video)
    assert plan.total == sum(plan.to_json().values()) == plan.needed + plan.mapped
    half = video.precision == "fp16" or video.on_openvino or video.backend != "onnx"
    video = grown(video, what, by) if what != "window" else video
    tokens = video.capacity_frames * video.latent_hw[0] * video.latent_hw[1] // 4
    values = 2 * video.batch * video.model.num_layers * tokens * video.model.dim
    assert plan_memory(video).cache == values * (2 if half else 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(["fp32", "bf16"]),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([(2, 2), (4, 2), (6, 8)]),
    st.sampled_from([0, 6, 9]),
)
def test_cache_and_prompt_are_what_is_allocated(toy, precision, batch, frames, hw, window) -> None:
    cache = CacheConfig(block_frames=3, window_frames=window)
    spec = toy.manifest.parts["denoiser"]
    latents = TensorSpec("float32", (1, "F", 2, "h", "w"))
    free = Part(
        spec.file, spec.sha256, spec.bytes, {**spec.inputs, "latents": latents}, spec.outputs
    )
    manifest = replace(
        toy.manifest,
        precision=precision,
        runtime=planner.runtime_of("onnx", precision, toy.manifest.model),
        cache=cache,
        latent_hw=None,
        parts={**toy.manifest.parts, "denoiser": free},
    )
    denoiser = OrtDenoiser(toy.path, manifest, lambda *_: None)
    plan = plan_memory(video_of(manifest, frames, hw, batch))
    denoiser.prepare(batch, hw, video_of(manifest, frames, hw, batch).capacity_frames)
    assert plan.cache == sum(buffer.nbytes for buffer in denoiser._cache.values())
    assert plan.prompt == sum(buffer.nbytes for buffer in denoiser._prompt.values())


@given(videos(), st.floats(0.05, 1.0), st.booleans())
def test_what_is_suggested_fits(video: Video, share: float, free_size: bool) -> None:
    available = int(plan_memory(video).needed * share)
    assume(not fits(video, available))
    for suggestion in suggest(video, available, free_size):
        assert fits(suggestion.video, available)
        assert suggestion.video != video
        assert suggestion.text


def test_suggestions_are_the_nearest() -> None:
    video = Video(WAN, CacheConfig(3), "bf16", (60, 104), 81)
    texts = [s.text for s in suggest(video, 14 * GB, free_size=True)]
    assert texts == [
        "at most 30 frames",
        "an engine of --window-frames 30",
        "latents of 38x66",
    ]
    longest = replace(video, frames=30)
    assert fits(longest, 14 * GB)
    assert not fits(replace(video, frames=33), 14 * GB)
    (other,) = suggest(replace(video, precision="fp32", frames=3), 7 * GB, free_size=False)[-1:]
    assert other.text == "an engine of --precision bf16"


def test_where_one_change_is_not_enough_two_are_named() -> None:
    video = Video(WAN, CacheConfig(3), "fp32", (60, 104), 81)
    found = suggest(video, 5 * GB, free_size=True)
    assert [s.video.precision for s in found] == ["bf16"] * len(found)
    assert found[0].text == "an engine of --precision bf16 and latents of 16x28"
    assert suggest(video, 1 * GB, free_size=True) == []


def test_states_of_a_decoder_grow_with_the_latents() -> None:
    state = {
        "state.0": TensorSpec("float16", (2, 96, "8h", "8w")),
        "state.1": TensorSpec("float32", (1, 16, "h", "w")),
    }
    video = Video(WAN, CacheConfig(3), "bf16", (60, 104), 3, state=state)
    assert plan_memory(video).state == 2 * 96 * 480 * 832 * 2 + 16 * 60 * 104 * 4
    halved = replace(video, latent_hw=(30, 52))
    assert plan_memory(halved).state * 4 == plan_memory(video).state


def test_known_sizes_of_the_1_3b_network() -> None:
    """Figures that are known from elsewhere: 6.04 GB of cache for 21 frames, 94 MB of prompt."""
    plan = plan_memory(Video(WAN, CacheConfig(3), "bf16", (60, 104), 21))
    assert plan.cache / GB == pytest.approx(6.04, abs=0.01)
    assert plan.prompt / 1e6 == pytest.approx(94, abs=1)
    assert is_large(WAN)
    assert not is_large(replace(WAN, num_layers=8))


def test_refusal_is_one_line_that_says_what_fits(toy) -> None:
    with pytest.raises(ConfigError) as error:
        check_fits(toy.path, toy.manifest, 48, (4, 2), available=1000)
    assert "\n" not in str(error.value)
    assert "48 frames of 4x2 latents" in str(error.value)
    assert "no setting of it does" in str(error.value)
    card = replace(toy.manifest, backend="tensorrt")
    check_fits(toy.path, card, 48, (4, 2), available=1000)  # a card's memory is not ours to judge


def test_a_session_refuses_before_anything_is_allocated(toy, monkeypatch) -> None:
    with asd_rt.open(toy.path) as session:
        monkeypatch.setattr(fitting, "available_memory_bytes", lambda: 0)
        monkeypatch.setattr(fitting, "resident_memory_bytes", lambda: 1000)
        with pytest.raises(ConfigError, match="of memory"):
            session.generate("red", frames=8)
        assert not session.engine.denoiser._cache
    with pytest.raises(ConfigError, match="of memory"):
        asd_rt.open(toy.path)


def test_without_figures_nothing_is_refused(toy, monkeypatch) -> None:
    monkeypatch.setattr(fitting, "available_memory_bytes", lambda: None)
    check_fits(toy.path, toy.manifest, 10**9, (4, 2))


def test_report_has_a_column_for_every_precision(monkeypatch) -> None:
    video = Video(WAN, CacheConfig(3), "bf16", (60, 104), 21)
    monkeypatch.setattr("asd_rt.memory_report.available_memory_bytes", lambda: 20 * GB)
    report = memory_report(video)
    assert report["plans"]["bf16"]["total_bytes"] == plan_memory(video).total
    assert [plan["fits"] for plan in report["plans"].values()] == [False, True, True, None]
    lines = memory_text(report).splitlines()
    assert "21 frames of 60x104 latents" in lines[0]
    assert lines[1].split() == ["fp32", "bf16*", "int8", "fp16"]


def test_a_report_is_of_what_was_built() -> None:
    """An int8 plan is a card's, though an int8 engine is usually a CPU's."""
    model = ModelConfig(
        dim=16, ffn_dim=16, freq_dim=16, text_dim=16, text_len=4, in_dim=4, out_dim=4,
        num_heads=2, num_layers=1,
    )  # fmt: skip
    video = Video(model, CacheConfig(3), "int8", (4, 4), 3, "tensorrt_rtx")
    plans = memory_report(video)["plans"]
    assert plans["int8"]["fits"] is None
    assert plans["fp32"]["fits"] is not None
    on_cpu = memory_report(replace(video, backend="onnx"))["plans"]["int8"]
    assert on_cpu["fits"] is not None and plans["int8"]["cache"] < on_cpu["cache"]
