"""Two replicas behind one address: who goes where, and what the death of one means to whom."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from websockets.exceptions import ConnectionClosed

from asd_rt.engines import PACKAGED_DIR
from asd_rt.serve.ids import replica_of
from asd_rt.serve.protocol import unpack_block
from benchmarks.serving_client import Server, open_socket, started

pytest.importorskip("ray", reason="Ray is not installed: pip install 'asd-rt[ray]'")
FPS, BLOCK_FRAMES = 5, 3
START = json.dumps({"type": "start", "prompt": "a red three", "fps": FPS})
TITLE = b"ray::ServeReplica:asd-rt"


@pytest.fixture(scope="module")
def pair(root: Path, cache_folder: object) -> Iterator[Server]:
    """The example's server, with two replicas."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    engine = PACKAGED_DIR / "asd_fp32.onnx"
    flags = ["--replicas", "2", "--port", str(port), "--engine", str(engine), "--sessions", "2"]
    command = [sys.executable, str(root / "examples" / "ray_serve.py"), *flags]
    with started(command, dict(os.environ, PYTHONPATH=str(root))) as server:
        yield server


def replica_processes(ancestor: int) -> list[int]:
    """Processes of replicas that descend from `ancestor`."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                titles[int(folder.name)] = (folder / "cmdline").read_bytes()
                stat = (folder / "stat").read_text()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])

    def descends(pid: int) -> bool:
        while pid in parents and pid != ancestor:
            pid = parents[pid]
        return pid == ancestor

    return [pid for pid, title in titles.items() if title.startswith(TITLE) and descends(pid)]


class Watcher:
    """A client that watches until it is cut off, and remembers when blocks came."""

    def __init__(self, link: Any) -> None:
        self.link = link
        self.session = ""
        self.times: list[float] = []
        self.numbers: list[int] = []
        self.closed: ConnectionClosed | None = None
        self.task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        try:
            await self.link.send(START)
            while True:
                found = await self.link.recv()
                if isinstance(found, str):
                    event = json.loads(found)
                    self.session = event.get("session", self.session)
                    continue
                header, _ = unpack_block(found)
                self.times.append(time.monotonic())
                self.numbers.append(header["block"])
                await self.link.send(json.dumps({"type": "ack", "block": header["block"]}))
        except ConnectionClosed as closed:
            self.closed = closed

    async def seen(self, blocks: int) -> None:
        """Wait for so many more blocks."""
        wanted = len(self.numbers) + blocks
        while len(self.numbers) < wanted:
            assert self.closed is None, self.closed
            await asyncio.sleep(0.02)


def call(server: Server, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(server.url + path, data), timeout=30) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def ask_clips(server: Server) -> dict[str, str]:
    """A clip on each replica: ids by the replica's name."""
    clips: dict[str, str] = {}
    end = time.monotonic() + 30
    while len(clips) < 2 and time.monotonic() < end:
        status, found = call(server, "/v1/videos", {"prompt": "a red three", "frames": 3})
        assert status == 202
        clips[replica_of(found["id"])] = found["id"]
    assert len(clips) == 2, clips
    return clips


def finished(server: Server, clip: str) -> str:
    while (found := call(server, f"/v1/videos/{clip}"))[1].get("status") != "done":
        assert found[0] == 200, found
        time.sleep(0.05)
    return str(found[1]["status"])


def test_a_replica_that_dies_ends_its_own_sessions_only(pair: Server) -> None:
    clips = ask_clips(pair)
    for clip in clips.values():  # wherever a request comes in, it finds the clip
        assert finished(pair, clip) == "done"
        assert len(pair.get(f"/v1/videos/{clip}/content")) > 500

    async def play() -> None:
        watchers: dict[str, Watcher] = {}
        while len(watchers) < 2:  # one on each replica
            watcher = Watcher(await open_socket(pair))
            await watcher.seen(3)
            name = replica_of(watcher.session)
            if watchers.setdefault(name, watcher) is not watcher:
                await watcher.link.close()
        assert set(watchers) == set(clips)
        one, two = watchers.values()

        assert pair.process is not None
        processes = replica_processes(pair.process.pid)
        assert len(processes) == 2
        os.kill(processes[0], signal.SIGKILL)
        await asyncio.wait([one.task, two.task], timeout=30, return_when=asyncio.FIRST_COMPLETED)
        ended, other = (one, two) if one.task.done() else (two, one)
        assert ended.closed is not None and ended.closed.rcvd is not None
        assert ended.closed.rcvd.code == 1012
        assert "the replica that made this video has gone" in ended.closed.rcvd.reason

        await other.seen(10)  # no block is missing, and none was late
        assert other.numbers == list(range(len(other.numbers)))
        gaps = [b - a for a, b in zip(other.times[2:], other.times[3:], strict=False)]
        assert max(gaps) < 3 * BLOCK_FRAMES / FPS, "two are on their way at most"

        lost, kept = replica_of(ended.session), replica_of(other.session)
        async with await open_socket(pair) as link:  # asks for the dead one's video, gets a new one
            await link.send(json.dumps({"type": "continue", "session": ended.session}))
            refused = json.loads(await link.recv())
            assert refused["code"] == "session"
            assert "the replica that made it has gone" in refused["message"]
        again = Watcher(await open_socket(pair))
        await again.seen(3)
        assert replica_of(again.session) != lost
        loop = asyncio.get_running_loop()
        status, _ = await loop.run_in_executor(None, call, pair, f"/v1/videos/{clips[lost]}")
        assert status == 404
        status, _ = await loop.run_in_executor(None, call, pair, f"/v1/videos/{clips[kept]}")
        assert status == 200
        # Whoever lost the connection, and not the replica, finds its video again.
        other.link.transport.abort()
        await other.task
        async with await open_socket(pair, near=other.session) as back:
            await back.send(json.dumps({"type": "continue", "session": other.session}))
            assert json.loads(await back.recv())["type"] == "continued"
        await again.link.close()
        await again.task

    asyncio.run(play())


def test_a_name_that_no_replica_can_have_pins_nothing(pair: Server) -> None:
    for near in ("nobody.x", "%0d%0a.x", "%ff.x", "."):
        assert call(pair, f"/readyz?near={near}")[0] == 200
    assert call(pair, "/v1/videos/nobody.x")[0] == 404


def test_an_engine_that_is_not_there_is_one_line(root: Path, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "examples/ray_serve.py", "--engine", tmp_path / "none.onnx"],
        cwd=root, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1, found.stderr


def test_a_cluster_that_is_not_there_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore of it.")

    monkeypatch.setattr("ray.init", none)  # for it finds those of the tests beside this one
    monkeypatch.setattr(os, "environ", dict(os.environ))
    example = run_path(str(root / "examples" / "ray_serve.py"))
    engine = str(PACKAGED_DIR / "asd_fp32.onnx")
    assert example["main"](["--address", "auto", "--engine", engine]) == 1
    said = capsys.readouterr().err
    assert "there is no Ray cluster (Could not find any" in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("flags", "threads"),
    [
        (["--gpus", "1"], None),  # an engine on a card takes none
        (["--address", "auto"], None),  # each machine of a cluster counts its own
        (["--address", "auto", "--threads", "3"], 3),
        (["--replicas", "1000"], 1),
    ],
)
def test_threads_of_a_replica(root: Path, flags: list[str], threads: int | None) -> None:
    example = run_path(str(root / "examples" / "ray_serve.py"))
    assert example["threads_of"](example["make_parser"]().parse_args(flags)) == threads
