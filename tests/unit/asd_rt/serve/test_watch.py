"""How long a connection may go without a start."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from asd_rt.errors import PromptError
from asd_rt.serve import watch
from asd_rt.serve.limits import Limits
from asd_rt.serve.protocol import Message
from asd_rt.serve.watch import SILENT, Ended, Watcher


def test_time_in_a_text_encoder_is_not_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that waits is no silence; a client whose start was refused has the rest of its time."""
    monkeypatch.setattr(watch, "CHECK_S", 0.01)
    service: Any = SimpleNamespace(limits=replace(Limits(), start_s=0.3))

    async def play() -> None:
        watcher = Watcher(None, service, "here")  # type: ignore[arg-type]

        async def slow(prompt: str) -> None:
            await asyncio.sleep(0.6)
            raise PromptError("no word is known")

        monkeypatch.setattr(watcher, "_context", slow)
        looks = asyncio.create_task(watcher._look_after())
        with pytest.raises(PromptError):
            await watcher._obey(Message("start", prompt="x"))
        assert not looks.done(), "closed while its start waited"
        with pytest.raises(Ended, match="no start within") as ended:
            await asyncio.wait_for(looks, 5)
        assert ended.value.code == SILENT

    asyncio.run(play())
