"""Broken and hostile clients of every quick kind at once, while a good one watches."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from benchmarks.hostile_clients import KINDS, SLOW, attack
from benchmarks.serving_client import Server, WatcherProcess, running

EXPECTED = {
    "garbage_frames": "closed 1002",
    "huge_prompt": "closed 1009",
    "large_upload": "413 a body of more than",
    "nan_deadline": "error: a message must be a JSON object",
    "nonsense": "message, closed 1008",
    "reconnect_storm": "closed 1000: ",
    "vanishing": "gone",
    "greedy": "of 10 refused: closed 1013",
    "foreign_page": "403",
    "foreign_name": "421",
    "path_walker": "404",
}
# Which answer comes first depends on what the others hold, and on how busy the cores are.
EITHER = {
    "flood": ("closed 1008 too many messages", "closed 1013"),
    "slow_reader": ("2 blocks", "closed 1013"),
    "deep_picture": ("201", "503", "422 upload: took more than 10 s"),
    "zip_bomb": ("422 upload: holds no picture", "503"),
    "no_pixels": ("422 upload: holds no picture", "503"),
    "torn_picture": ("422 upload: holds no picture", "503"),
}
# Free places of the server; frames that the good watcher misses without being told; all else it is told.
AFTERWARDS = {
    "free beside it": "4",
    "goes on": "True",
    "untold": "0",
    "events": "started",
    "free": "5",
}
SENT = "asd_rt_sent_frames_total"
WAIT_S = 20.0


def free_places(server: Server, expected: int) -> int:
    """Free places of a server, once they are `expected` or that takes too long."""
    end = time.monotonic() + WAIT_S
    while (free := int(json.loads(server.get("/readyz"))["free"])) != expected:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return free


@pytest.fixture(scope="module")
def got() -> dict[str, str]:
    """What each kind got, and what the good watcher and the server were like afterwards.

    How many frames the watcher misses while all cores are busy is measured by benchmarks.serving.
    """
    kinds = [kind for kind in KINDS if kind not in SLOW]
    with running("--sessions", "5") as server:
        good = WatcherProcess(server, fps=8)
        while not server.metric("asd_rt_sessions"):
            time.sleep(0.05)

        async def all_at_once() -> list[str]:
            return await asyncio.gather(*(attack(server, kind) for kind in kinds))

        found = dict(zip((k.__name__ for k in kinds), asyncio.run(all_at_once()), strict=True))
        found["free beside it"] = str(free_places(server, 4))
        sent = server.metric(SENT)
        end = time.monotonic() + WAIT_S
        while server.metric(SENT) < sent + 12 and time.monotonic() < end:
            time.sleep(0.05)
        found["goes on"] = str(server.metric(SENT) >= sent + 12)
        seen = good.stop()
        numbers = [header["block"] for header in seen.headers]
        found["untold"] = str(max(0, 3 * (numbers[-1] + 1 - len(numbers)) - seen.dropped))
        found["events"] = " ".join(event["type"] for event in seen.events)
        found["free"] = str(free_places(server, 5))
        return found


def test_each_gets_its_answer(got: dict[str, str]) -> None:
    for kind, expected in EXPECTED.items():
        assert expected in got[kind], kind
    for kind, several in EITHER.items():
        assert any(text in got[kind] for text in several), (kind, got[kind])
    assert set(got) == {*EXPECTED, *EITHER, *AFTERWARDS}


def test_the_good_watcher_goes_on_and_all_places_come_back(got: dict[str, str]) -> None:
    assert {name: got[name] for name in AFTERWARDS} == AFTERWARDS
