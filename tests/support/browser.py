"""A real browser, driven over its DevTools protocol, for forms that people open as files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60.0


def browser_path() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page. ``errors`` has what its scripts reported and what its policy refused."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.errors: list[str] = []
        self.loaded = False

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        async with asyncio.timeout(SECONDS):
            async for message in self._socket:
                content = json.loads(message.data)
                if content.get("id") == self._number:
                    assert "error" not in content, content
                    return dict(content["result"])
                self._note(content)
        raise AssertionError("the browser is gone")

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        self.loaded |= method == "Page.loadEventFired"
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"])[:500])
        if method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        if method == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog: {parameters['message']}")

    async def open(self, path: Path) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        self.loaded = False
        await self.call("Page.navigate", url=path.resolve().as_uri())
        ends = time.monotonic() + SECONDS
        while not self.loaded and time.monotonic() < ends:
            await self.value("0")
            await asyncio.sleep(0.02)

    async def value(self, expression: str) -> Any:
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def press(self, *keys: str) -> None:
        """Real key presses, to whatever has the focus."""
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
                await self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)


@contextlib.asynccontextmanager
async def opened(folder: Path, downloads: Path) -> AsyncIterator[Page]:
    """A page of a new browser without a network; its profile is in ``folder``."""
    command = [
        str(browser_path()), "--headless=new", "--no-sandbox", "--disable-gpu",
        "--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-first-run",
        "--disable-dev-shm-usage", "--proxy-server=127.0.0.1:9", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = folder / "DevToolsActivePort"
        ends = time.monotonic() + SECONDS
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < ends, "the browser does not start"
            await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                targets = await reply.json()
            address = next(one for one in targets if one["type"] == "page")["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                await page.call(
                    "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads)
                )
                yield page
    finally:
        process.kill()
        process.wait()


def in_browser(folder: Path, downloads: Path, scenario: Callable[[Page], Awaitable[None]]) -> None:
    """Runs a scenario in a new browser."""

    async def whole() -> None:
        async with opened(folder, downloads) as page:
            await scenario(page)

    asyncio.run(whole())
