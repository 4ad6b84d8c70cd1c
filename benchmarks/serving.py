"""`asd-rt serve` under watch: speed and freshness, 200 hostile clients, and a soak; on this machine alone.

python -m benchmarks.serving --out out                       # speed, freshness, hostile clients
python -m benchmarks.serving --part page --out out           # first frame in a browser
python -m benchmarks.serving --part soak --minutes 30 --out out

Writes serving_PART.json and serving_PART.md. Every part ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from asd_rt.files import replacing
from asd_rt.machine import cpu_model, usable_cores
from benchmarks import serving_page
from benchmarks.hostile_clients import KINDS, SLOW, attack
from benchmarks.serving_client import (
    PROMPTS,
    Server,
    Watched,
    WatcherProcess,
    open_socket,
    running,
    watch,
)

FPS = 24.0
SETTLE_S = 7.0  # the server gives memory back every five seconds
AT_ONCE = 20  # hostile clients
PARTS = ("speed", "page", "hostile", "soak")


def quantiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99, the largest, and how many."""
    found = np.percentile(values, [50, 95, 99, 100]) if values else [float("nan")] * 4
    names = ("p50", "p95", "p99", "max")
    return {n: round(float(v), 2) for n, v in zip(names, found, strict=True)} | {"n": len(values)}


async def first_frames(server: Server, rounds: int) -> dict[str, float]:
    """Milliseconds from `start` to the first block, one watcher after the other."""
    return quantiles([(await watch(server, 0.5, fps=FPS)).first_ms for _ in range(rounds)])


async def switches(server: Server, rounds: int) -> dict[str, Any]:
    """How soon another prompt shows: milliseconds, and blocks of the old one that came after asking."""
    from asd_rt.serve.protocol import unpack_block

    ms, blocks = [], []
    async with await open_socket(server) as socket:
        await socket.send(json.dumps({"type": "start", "prompt": PROMPTS[0], "fps": FPS}))
        wanted, asked, old, count = 0, 0.0, 0, 0
        end = perf_counter() + 10 + rounds
        while len(ms) < rounds and perf_counter() < end:
            found = await asyncio.wait_for(socket.recv(), 10)
            if isinstance(found, str):
                continue
            header, _ = unpack_block(found)
            await socket.send(json.dumps({"type": "ack", "block": header["block"]}))
            count += 1
            if asked and header["prompt_id"] == wanted:
                ms.append((perf_counter() - asked) * 1e3)
                blocks.append(old)
                asked = 0.0
            elif asked:
                old += 1
            if not asked and count % 6 == 0:
                wanted, asked, old = wanted + 1, perf_counter(), 0
                prompt = PROMPTS[wanted % 2]
                await socket.send(json.dumps({"type": "prompt", "prompt": prompt}))
    return {"ms": quantiles(ms), "old_blocks_at_most": max(blocks, default=-1)}


async def together(server: Server, clients: int, seconds: float) -> list[dict[str, Any]]:
    """Watchers at once: what each got."""
    seen = await asyncio.gather(*(watch(server, seconds, fps=FPS, seed=i) for i in range(clients)))
    return [summary(one) for one in seen]


def summary(seen: Watched) -> dict[str, Any]:
    """A watcher's figures."""
    gaps = list(np.diff(seen.arrivals) * 1e3)
    return {
        "fps": round(seen.fps, 2),
        "frames": seen.frames,
        "dropped": seen.dropped,
        "gap_ms": quantiles(gaps),
        "block_ms": quantiles([h["block_ms"] for h in seen.headers]),
    }


async def slow(server: Server, seconds: float, delay_s: float = 1.0) -> dict[str, Any]:
    """A watcher that acknowledges late: how old what it is sent is, and how much of it is on its way."""
    seen = await watch(server, seconds, ack_delay_s=delay_s, fps=FPS)
    return {
        "ack_delay_s": delay_s,
        "frames": seen.frames,
        "dropped": seen.dropped,
        "age_when_sent_ms": quantiles([h["age_ms"] for h in seen.headers]),
        "on_their_way_at_most": max((h["on_their_way"] for h in seen.headers), default=0),
    }


async def speed(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """First frames, switches, four at once, and one that is slow."""
    await watch(server, 2.0, fps=FPS)  # warms the caches of files and code
    late = server.metric("asd_rt_late_blocks_total")
    four = await together(server, 4, args.seconds)
    return {
        "first_frame_ms": await first_frames(server, 20),
        "switch": await switches(server, 20),
        "four_watchers": four,
        "late_blocks": server.metric("asd_rt_late_blocks_total") - late,
        "slow_reader": await slow(server, args.seconds),
    }


async def page(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """From pressing Play to the first frame on the page, in a browser."""
    await watch(server, 2.0, fps=FPS)
    found, fps = await serving_page.first_frames(server, 21)
    # The browser compiles the page's code with its first video.
    return {"first_frame_on_the_page_ms": quantiles(found[1:]), "page_fps": fps}


async def hostile(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Hostile clients of all kinds while a good one watches; memory before and after."""
    quick = [kind for kind in KINDS if not (args.quick and kind in SLOW)]
    # What is loaded or allocated once does not count.
    await asyncio.gather(*(attack(server, kind) for kind in quick if kind not in SLOW))
    await watch(server, 2.0, fps=FPS)
    await asyncio.sleep(SETTLE_S)
    before = server.metric("asd_rt_resident_bytes")
    late = server.metric("asd_rt_late_blocks_total")
    good = WatcherProcess(server, fps=FPS)
    got: dict[str, Counter[str]] = {kind.__name__: Counter() for kind in quick}
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        kind = quick[number % len(quick)]
        async with room:
            got[kind.__name__][await attack(server, kind)] += 1

    order = list(range(args.clients))
    random.Random(0).shuffle(order)
    begin = perf_counter()
    await asyncio.gather(*map(one, order))
    took = perf_counter() - begin
    seen = good.stop()
    late = server.metric("asd_rt_late_blocks_total") - late
    await asyncio.sleep(SETTLE_S)
    after = server.metric("asd_rt_resident_bytes")
    per_block = len(seen.headers[0]["sizes"])
    made = (seen.headers[-1]["block"] + 1) * per_block
    return {
        "clients": args.clients,
        "seconds": round(took, 1),
        "got": {name: dict(counter.most_common()) for name, counter in got.items()},
        "good_watcher": summary(seen) | {"lost_percent": round(100 * (1 - seen.frames / made), 3)},
        "late_blocks": late,
        "memory_before": before,
        "memory_after": after,
        "memory_change_percent": round(100 * (after / before - 1), 2),
        "places_free": json.loads(server.get("/readyz"))["free"],
        "alive": server.process is not None and server.process.poll() is None,
    }


async def soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """One watcher for minutes: does a block's time or the memory grow?"""
    seconds = 60 * args.minutes
    memory: list[tuple[float, float]] = []
    watching = asyncio.create_task(watch(server, seconds, fps=FPS))
    begin = perf_counter()
    while not watching.done():
        at = perf_counter() - begin
        loop = asyncio.get_running_loop()
        value = await loop.run_in_executor(None, server.metric, "asd_rt_resident_bytes")
        memory.append((round(at, 1), value))
        await asyncio.wait([watching], timeout=min(10.0, seconds / 20))
    seen = await watching
    block_ms = [h["block_ms"] for h in seen.headers[1:]]  # the first one has more steps
    times = quantiles(block_ms)
    settled = [m for at, m in memory if at >= min(60.0, seconds / 10)] or [memory[-1][1]]
    tenth = max(1, len(block_ms) // 10)
    return {
        "minutes": args.minutes,
        "watcher": summary(seen),
        "block_ms": times,
        "p99_over_p50": round(times["p99"] / times["p50"], 2),
        "p50_first_tenth": quantiles(block_ms[:tenth])["p50"],
        "p50_last_tenth": quantiles(block_ms[-tenth:])["p50"],
        "memory_spread_percent": round(100 * (max(settled) / min(settled) - 1), 2),
        "memory": memory,
    }


def markdown(part: str, found: dict[str, Any]) -> str:
    """The figures of a part as Markdown."""
    lines = [f"# Serving: {part}", "", f"{found['machine']}, {found['cores']} cores", ""]
    if part == "hostile":
        lines += ["| client | what it got | times |", "|---|---|---:|"]
        for kind, got in found["got"].items():
            name = kind.replace("_", " ")
            cells = ((text.replace("|", "/"), count) for text, count in got.items())
            lines += [f"| {name} | {text} | {count} |" for text, count in cells]
        lines.append("")
    rows = {k: v for k, v in found.items() if k not in ("got", "memory", "machine", "cores")}
    lines += ["| figure | value |", "|---|---|"]
    lines += [f"| {key} | {text} |" for key, text in _flat("", rows)]
    return "\n".join(lines) + "\n"


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in _flat(f"{prefix} {k}".strip(), v)]
    if isinstance(value, list):
        return [pair for i, v in enumerate(value) for pair in _flat(f"{prefix} {i + 1}", v)]
    return [(prefix.replace("_", " "), str(value))]


def measure(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start a server, run one part."""
    work = {"speed": speed, "page": page, "hostile": hostile, "soak": soak}[part]
    flags = [] if args.engine is None else ["--engine", args.engine]
    with running(*flags) as server:
        found = asyncio.run(work(server, args))
    return {"machine": cpu_model(), "cores": usable_cores()} | found


def main() -> None:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=["speed", "hostile"])
    parser.add_argument("--engine", help="default: as asd-rt serve")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of the four watchers, and others"
    )
    parser.add_argument("--clients", type=int, default=200, help="hostile ones")
    parser.add_argument("--quick", action="store_true", help="no client that waits to be cut off")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.part:
        found = measure(part, args)
        text = markdown(part, found)
        for suffix, content in (("json", json.dumps(found, indent=2) + "\n"), ("md", text)):
            with replacing(args.out / f"serving_{part}.{suffix}") as temporary:
                temporary.write_text(content)
        print(text, flush=True)


if __name__ == "__main__":
    main()
