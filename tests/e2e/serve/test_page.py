"""The page in headless Chromium, against the real server: play, steer, record, reconnect."""

from __future__ import annotations

import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, suppress
from io import BytesIO
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any

import av
import pytest

from benchmarks.serving_client import Server, running
from benchmarks.serving_page import find_browser

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser on this machine; on Debian: apt-get install chromium"
)
WAIT_MS = 20_000
COLOUR = """() => {
  const canvas = document.querySelector("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const most = [0, 0, 0];
  data.forEach((value, i) => { if (i % 4 < 3) most[i % 4] = Math.max(most[i % 4], value); });
  return most;
}"""
RED = f"() => {{ const [r, , b] = ({COLOUR})(); return r > b + 60; }}"
BLUE = f"() => {{ const [r, , b] = ({COLOUR})(); return b > r + 60; }}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # No sandbox: tests may run as root, and the page is our own.
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page that may not complain, and asks nobody but its server."""
    context = chromium.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    found = context.new_page()
    found.set_default_timeout(WAIT_MS)
    problems: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda m: problems.append(m.text) if "Security Policy" in m.text else None)
    yield found
    context.close()
    assert problems == []


def until(page: Any, expression: str, arg: Any = None) -> None:
    """Wait for an expression: playwright's own way evaluates it in the page, whose policy forbids that."""
    end = monotonic() + WAIT_MS / 1e3
    while not page.evaluate(expression, arg):
        assert monotonic() < end, expression
        page.wait_for_timeout(50)


def play(page: Any, url: str, prompt: str) -> None:
    page.goto(url)
    page.wait_for_selector("[data-state=ready]")
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector("[data-state=live]")


def test_type_a_prompt_watch_switch_and_download(page: Any, server: Server, tmp_path: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    play(page, server.url, "a red three moving right")
    until(page, RED)
    first = page.evaluate("document.querySelector('canvas').toDataURL()")
    until(page, "old => document.querySelector('canvas').toDataURL() !== old", arg=first)
    until(page, "Number(document.querySelector('#fps-now').textContent) > 0")

    page.click("#record")
    page.fill("#prompt", "a blue seven moving left")
    page.click("#play")
    until(page, BLUE)
    assert "ms" in page.inner_text("#latency-now")
    with page.expect_download() as download:
        page.click("#record")
    path = tmp_path / "clip.mp4"
    download.value.save_as(path)
    with av.open(BytesIO(path.read_bytes())) as video:
        assert sum(1 for _ in video.decode(video=0)) >= 3
    assert {url for url in asked if not url.startswith(("blob:", server.url))} == set()


def test_what_the_engine_cannot_read_is_said_and_the_video_goes_on(
    page: Any, server: Server
) -> None:
    page.goto(server.url)
    page.wait_for_selector("[data-state=ready]")
    page.fill("#prompt", "an elephant")
    page.press("#prompt", "Enter")
    until(page, "document.querySelector('#problem').textContent.includes('elephant')")
    page.fill("#prompt", "a red three")
    page.press("#prompt", "Enter")
    until(page, RED)
    assert page.inner_text("#problem") == ""


def test_keys(page: Any, server: Server) -> None:
    play(page, server.url, "a red three")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("4")
    until(page, "document.querySelector('#steps-now').textContent === '4'")
    page.keyboard.press(" ")
    page.wait_for_selector("[data-state=paused]")
    page.keyboard.press(" ")
    page.wait_for_selector("[data-state=live]")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_lose_and_regain_the_connection(page: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running("--port", str(port), "--sessions", "1") as one:
        play(page, one.url, "a blue seven")
        until(page, BLUE)
        assert one.process is not None
        one.process.send_signal(signal.SIGKILL)
        page.wait_for_selector("[data-state=waiting]")
        assert "trying again" in page.inner_text("#state")
        page.fill("#prompt", "a red three")
        with running("--port", str(port), "--sessions", "1"):
            page.wait_for_selector("[data-state=live]", timeout=30_000)
            until(page, RED)


class Relay:
    """A TCP relay to a server, whose connections can be cut.

    Attributes:
        deaf: what clients send is lost.
    """

    def __init__(self, port: int) -> None:
        self._target, self.deaf = port, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._links: list[socket.socket] = []
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._target))
                self._links += [client, server]
                for source, target in ((client, server), (server, client)):
                    said = source is client
                    Thread(target=self._pump, args=(source, target, said), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, said: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not (said and self.deaf):
                    target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Reset all connections."""
        for link in self._links:
            with suppress(OSError):
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        self._links.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()


@pytest.mark.parametrize("lost", ["nothing", "record", "save"])
def test_the_video_goes_on_when_the_connection_is_back(
    page: Any, server: Server, tmp_path: Path, lost: str
) -> None:
    """Also where it breaks just as the user asks for something."""
    with closing(Relay(server.port)) as relay:
        play(page, relay.url, "a blue seven")
        until(page, BLUE)
        sent: list[str] = []
        page.on("websocket", lambda s: s.on("framesent", lambda data: sent.append(str(data))))
        relay.deaf = lost == "record"
        page.click("#record")
        with page.expect_download() as download:
            if lost == "save":
                page.wait_for_timeout(500)
                relay.deaf = True
                page.click("#record")
            page.wait_for_timeout(100)  # for what is not to be lost to arrive
            relay.cut()
            relay.deaf = False
            page.wait_for_selector("[data-state=waiting]")
            page.wait_for_selector("[data-state=live]")
            assert [m for m in sent if '"continue"' in m], "the video it had"
            assert not [m for m in sent if '"start"' in m], "no new one"
            if lost != "save":
                assert page.is_visible("#recording")
                page.wait_for_timeout(500)
                page.click("#record")
        download.value.save_as(tmp_path / "clip.mp4")
        page.goto("about:blank")  # says goodbye


@pytest.mark.parametrize("deaf", [True, False])
def test_what_is_hidden_as_the_connection_breaks_plays_when_it_is_seen_again(
    page: Any, server: Server, deaf: bool
) -> None:
    """A laptop that is closed and opened: what the page says on waking may go into a dead connection."""
    hide = """hidden => { Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange")); }"""
    with closing(Relay(server.port)) as relay:
        play(page, relay.url, "a blue seven")
        until(page, BLUE)
        page.evaluate(hide, True)
        page.wait_for_selector("[data-state=paused]")
        page.wait_for_timeout(200)  # for the pause to arrive
        relay.deaf = deaf
        if not deaf:
            relay.cut()
        page.evaluate(hide, False)
        page.wait_for_timeout(100)
        if deaf:
            relay.cut()
        relay.deaf = False
        page.wait_for_selector("[data-state=live]", timeout=10_000)
        assert page.inner_text("#pause").strip() == "Pause"
        page.goto("about:blank")


def test_a_locked_server_asks_for_its_token(page: Any) -> None:
    token = "a-token-of-some-length"
    with running("--sessions", "1", token=token) as locked:
        page.goto(locked.url)
        page.wait_for_selector("[data-state=locked]")
        page.fill("#token", token)
        page.press("#token", "Enter")
        page.wait_for_selector("[data-state=ready]")
        page.goto("about:blank")
        page.goto(f"{locked.url}/#token={token}")
        page.wait_for_selector("[data-state=ready]")
        assert token not in page.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all_without_scrolling_sideways(
    chromium: Any, server: Server, scheme: str
) -> None:
    context = chromium.new_context(
        viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme=scheme
    )
    found = context.new_page()
    found.set_default_timeout(WAIT_MS)
    play(found, server.url, "a red three")
    assert found.evaluate("document.documentElement.scrollWidth") == 360
    paper = found.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    light = sum(map(int, paper.removeprefix("rgb(").rstrip(")").split(","))) > 380
    assert light == (scheme == "light")
    small = found.evaluate(
        "[...document.querySelectorAll('.panel button:not([hidden])')]"
        ".filter((b) => b.offsetParent && b.getBoundingClientRect().height < 36).length"
    )
    assert small == 0, "fingers find every button"
    context.close()
