"""The server stops in good order, while somebody watches."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from benchmarks.serving_client import open_socket, running


def test_a_watcher_is_told_and_the_process_ends_well() -> None:
    with running("--sessions", "1", "--refresh-every", "5") as server:
        process = server.process
        assert process is not None

        async def watch() -> int:
            with pytest.raises(InvalidStatus, match="403"):  # which nobody needs to read about
                await open_socket(server, origin="https://evil.example")
            async with await open_socket(server) as socket:
                await socket.send(json.dumps({"type": "start", "prompt": "a red three"}))
                while not isinstance(await asyncio.wait_for(socket.recv(), 20), bytes):
                    pass
                process.send_signal(signal.SIGINT)
                with pytest.raises(ConnectionClosed) as closed:
                    while True:
                        await asyncio.wait_for(socket.recv(), 20)
                assert closed.value.rcvd is not None
                return closed.value.rcvd.code

        assert asyncio.run(watch()) == 1012
        out, problems = process.communicate(timeout=20)
        assert (process.returncode, out.splitlines()[-1], problems) == (0, "stopped", "")
