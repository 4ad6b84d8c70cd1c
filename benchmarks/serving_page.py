"""The page of `asd-rt serve` in headless Chromium: from pressing Play to the first frame on the screen."""

from __future__ import annotations

import os
import shutil
from typing import Any

from benchmarks.serving_client import Server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WATCH_MS = 4000
# Presses Play; milliseconds until the picture of the first frame has been handed to the screen.
FIRST_FRAME = """() => new Promise((done) => {
  const context = document.getElementById("screen").getContext("2d");
  const draw = context.drawImage.bind(context);
  const begin = performance.now();
  context.drawImage = (...what) => {
    draw(...what);
    delete context.drawImage;
    requestAnimationFrame(() => done(performance.now() - begin));
  };
  document.getElementById("prompt-form").requestSubmit();
})"""


def find_browser() -> str | None:
    """Chromium, or what ASD_RT_BROWSER names; None where there is none."""
    return os.environ.get("ASD_RT_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


async def first_frames(server: Server, rounds: int) -> tuple[list[float], float]:
    """Milliseconds to the first frame of `rounds` new videos, and frames a second of the last.

    Raises:
        RuntimeError: there is no browser.
    """
    from playwright.async_api import async_playwright

    browser_path = find_browser()
    if browser_path is None:
        raise RuntimeError("no Chromium on this machine; on Debian: apt-get install chromium")
    async with async_playwright() as driver:
        # No sandbox: benchmarks may run as root, and the page is our own.
        browser = await driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page: Any = await browser.new_page()
        found = []
        for _ in range(rounds):
            await page.goto(server.url)
            await page.wait_for_selector("[data-state=ready]")
            found.append(float(await page.evaluate(FIRST_FRAME)))
        await page.wait_for_timeout(WATCH_MS)
        fps = float(await page.inner_text("#fps-now"))
        await browser.close()
    return found, fps
