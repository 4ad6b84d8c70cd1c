"""What share of the machine a pass reaches, and which part of it takes the time: roofline-NAME.json and .md.

python -m benchmarks.roofline --out out                  # the best engine here
python -m benchmarks.roofline --size 113m --precision bf16 --out out

Peaks are measured here: matrix products of 2048 x 2048 in PyTorch, and copying 256 MB. A pass behind a full
window is timed as it is, and once more with the runtime's own profile, whose shares are then applied to that
time.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import asd_rt
from asd_rt import joining, timing
from asd_rt.backends.openvino import HALVED_PREFIXES, keep_keys_whole, to_bf16
from asd_rt.engines import best_engine
from asd_rt.errors import AsdError
from asd_rt.files import make_folder, replacing
from asd_rt.machine import bf16_instructions, usable_cores
from asd_rt.manifest import Manifest, part_path, read_manifest
from asd_rt.plan import FixedPlan
from asd_rt.session import Session
from benchmarks import loop_cost
from benchmarks.sizes import SIZES, random_checkpoint
from export.engine import Target, build_engine
from export.settings import Overrides, resolve

KINDS = ("linear", "attention", "rest")
PASSES = 30
PRODUCT = re.compile(r"node_matmul(_\d+)?")


def best_s(work: Callable[[], object], repeats: int) -> float:
    """Shortest of several runs, after two to warm up."""
    found = []
    for turn in range(repeats + 2):
        begin = perf_counter()
        work()
        if turn > 1:
            found.append(perf_counter() - begin)
    return min(found)


def peaks() -> dict[str, float]:
    """GFLOP/s of matrix products, and GB/s of a copy (read and written).

    Products in bfloat16 are measured where the processor has such, for elsewhere one takes minutes.
    """
    found = {}
    dtypes = {"fp32": torch.float32}
    if bf16_instructions():
        dtypes["bf16"] = torch.bfloat16
    for name, dtype in dtypes.items():
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        found[f"gemm_{name}_gflops"] = 2 * 2048**3 / best_s(lambda a=a, b=b: a @ b, 10) / 1e9
    source, target = np.ones(2**25, np.float64), np.empty(2**25, np.float64)
    found["copy_gbs"] = 2 * source.nbytes / best_s(lambda: np.copyto(target, source), 5) / 1e9
    return found


def flops(manifest: Manifest, tokens: int, past: int) -> dict[str, float]:
    """Multiplications and additions of a pass, by kind."""
    c = manifest.model
    linear = 6 * c.dim * c.dim + 2 * c.dim * c.ffn_dim  # q, k, v, o; cross q, o; feed-forward
    ends = 4 * (c.in_dim + c.out_dim) * c.dim
    return {
        "linear": 2.0 * tokens * (c.num_layers * linear + ends),
        "attention": 4.0 * tokens * c.num_layers * c.dim * (past + tokens + c.text_len),
    }


def kind_of_onnx(op: str) -> str:
    """Kind of an operator in ONNX Runtime's profile."""
    return {"MatMul": "linear", "Gemm": "linear", "Attention": "attention"}.get(op, "rest")


def kind_of_openvino(node_type: str, name: str) -> str:
    """Kind of a node in OpenVINO's profile; what was fused keeps the name of its last operator.

    Products with weights are FullyConnected, so a product by another name is one of attention's.
    """
    if node_type.startswith("FullyConnected"):
        return "linear"
    return "attention" if PRODUCT.fullmatch(name) else "rest"


def _feeds(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {
        name: draw.standard_normal(
            [sizes[n] if isinstance(n, str) else n for n in spec.shape]
        ).astype(np.float32)
        for name, spec in manifest.parts["denoiser"].inputs.items()
    }


def profile_onnx(file: Path, manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, float]:
    """Milliseconds by kind in ONNX Runtime's profile of a pass."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.enable_profiling = True
    feeds = _feeds(manifest, sizes)
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "pass")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for _ in range(PASSES):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    found = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            found[kind_of_onnx(event["args"]["op_name"])] += event["dur"] / 1e3 / PASSES
    return found


def profile_openvino(file: Path, manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, float]:
    """Milliseconds by kind in OpenVINO's profile of a pass."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(file))
    feeds = _feeds(manifest, sizes)
    model.reshape({name: list(array.shape) for name, array in feeds.items()})
    keep_keys_whole(ov, model)
    halved = [name for name in feeds if name.startswith(HALVED_PREFIXES)]
    ends = ov.preprocess.PrePostProcessor(model)
    for name in halved:
        ends.input(name).tensor().set_element_type(ov.Type.bf16)
    for name in manifest.parts["denoiser"].outputs:
        if name.startswith(HALVED_PREFIXES):
            ends.output(name).tensor().set_element_type(ov.Type.bf16)
    model = ends.build()
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": usable_cores(),
        "PERF_COUNT": True,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    for name, array in feeds.items():
        if name in halved:
            half = to_bf16(array)
            request.set_tensor(name, ov.Tensor(half, list(half.shape), ov.Type.bf16))
        else:
            request.set_tensor(name, ov.Tensor(array))
    for _ in range(5):
        request.infer()
    found = dict.fromkeys(KINDS, 0.0)
    for node in request.get_profiling_info():
        kind = kind_of_openvino(node.node_type, node.node_name)
        found[kind] += node.real_time.total_seconds() * 1e3
    return found


def measure(file: Path) -> dict[str, Any]:
    """Everything about one pass of the engine `file`, behind a full window."""
    manifest = read_manifest(file)
    cache, hw = manifest.cache, manifest.latent_hw
    if hw is None or not cache.window_frames:
        raise AsdError(f"{file}: needs a window and one latent size; build it with both")
    frame, size = hw[0] * hw[1] // 4, cache.block_frames
    past = cache.window_frames - size
    sizes = {"F": size, "T": size * frame, "P": past * frame, "S": (past + size) * frame}
    with asd_rt.open(file) as session:
        denoiser = session.engine.denoiser
        denoiser.prepare(1, hw, cache.window_frames)
        denoiser.set_prompt(
            np.zeros((1, manifest.model.text_len, manifest.model.text_dim), np.float32)
        )
        x = np.random.default_rng(0).standard_normal((1, size, manifest.model.in_dim, *hw))
        x = x.astype(np.float32)
        own = range(past, past + size)
        pass_ms = 1e3 * best_s(lambda: denoiser.denoise(x, 1000.0, own, past), PASSES)
        device = session.engine.device
        loop = loop_cost.measure(Session(session.engine, join=False))
        apart, joined = joining.measure(denoiser, manifest, (1, size, manifest.model.in_dim, *hw))
        loop |= {"separate_ms": 1e3 * apart, "joined_ms": 1e3 * joined}
    half = manifest.runtime == "openvino"
    profile = profile_openvino if half else profile_onnx
    shares = profile(part_path(file, manifest, "denoiser"), manifest, sizes)
    work = flops(manifest, sizes["T"], sizes["P"])
    top = peaks()
    peak = top["gemm_fp32_gflops"]
    if half:  # OpenVINO computes in bfloat16 where there is such a thing
        peak = top.get("gemm_bf16_gflops", peak)
    rows = []
    for kind in KINDS:
        share = shares[kind] / sum(shares.values())
        ms, amount = share * pass_ms, work.get(kind)
        rate = None if amount is None else amount / ms / 1e6
        rows.append({"kind": kind, "share": share, "ms": ms, "gflops": rate,
                     "of_peak": None if rate is None else rate / peak})  # fmt: skip
    return {
        "engine": str(file),
        "precision": manifest.precision,
        "device": device,
        "tokens": sizes["T"],
        "past_tokens": sizes["P"],
        "pass_ms": pass_ms,
        "of_peak": sum(work.values()) / pass_ms / 1e6 / peak,
        "peaks": top,
        "rows": rows,
        "loop": loop,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report for a reader."""
    top, machine = report["peaks"], report["machine"]
    half = f"{top['gemm_bf16_gflops']:.0f}" if "gemm_bf16_gflops" in top else "no instructions for"
    lines = [
        f"# Where a pass of {report['name']} spends its time",
        "",
        f"{report['tokens']} tokens over {report['past_tokens']}, {report['precision']} on "
        f"{report['device']}: {report['pass_ms']:.2f} ms, {report['of_peak']:.0%} of the peak. Peaks here: "
        f"{top['gemm_fp32_gflops']:.0f} GFLOP/s fp32, {half} bf16, copy "
        f"{top['copy_gbs']:.0f} GB/s.",
        "",
        "| part | share | ms | GFLOP/s | of the peak |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        rate = (
            ("", "") if row["gflops"] is None else (f"{row['gflops']:.0f}", f"{row['of_peak']:.0%}")
        )
        lines.append(
            f"| {row['kind']} | {row['share']:.0%} | {row['ms']:.2f} | {rate[0]} | {rate[1]} |"
        )
    loop = report["loop"]
    lines += [
        "",
        f"The loop, behind a full window: {loop['block_ms']:.2f} ms a block of {loop['passes']:.0f} passes, "
        f"of which {loop['outside_ms']:.2f} ms ({loop['outside']:.1%}) outside engine calls. Moved inside "
        f"the cache: {loop['moved']:.2f} times the block's new keys and values.",
        "",
        f"A cache pass and the next block's first one by one: {loop['separate_ms']:.2f} ms; joined: "
        f"{loop['joined_ms']:.2f} ms, {loop['separate_ms'] / loop['joined_ms']:.2f} times as fast.",
        "",
        f"- machine: {machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}",
        f"- command: `{report['command']}`",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description="What share of the machine a pass reaches, split by kind of work.",
        epilog="example: python -m benchmarks.roofline --size 113m --precision bf16",
    )
    parser.add_argument("--engine", type=Path, help="engine file (default: the best one here)")
    parser.add_argument("--size", choices=tuple(SIZES), help="instead: random weights of this size")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "int8"), default="bf16", help="of --size"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder, made if absent")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        make_folder(args.out)
        file = args.engine or best_engine()
        if args.size:
            checkpoint = random_checkpoint(args.size)
            folder = args.out / f"engines-{args.size}"
            folder.mkdir(exist_ok=True)
            settings = resolve(checkpoint, Overrides(), FixedPlan())
            target = Target("onnx", args.precision)
            file = build_engine(checkpoint, settings, target, folder, force=False)
        torch.set_num_threads(usable_cores())
        name = f"{args.size}-{args.precision}" if args.size else file.stem
        given = " ".join(sys.argv[1:] if argv is None else argv)
        report = {
            "format_version": 1,
            "name": name,
            "machine": timing.describe_machine(),
            "versions": timing.versions() | {"torch": torch.__version__},
            "command": f"python -m benchmarks.roofline {given}".rstrip(),
            **measure(file),
        }
        with replacing(args.out / f"roofline-{name}.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        with replacing(args.out / f"roofline-{name}.md") as temporary:
            temporary.write_text(markdown(report))
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
