"""A headless Chromium for tests, spoken to over a pipe in the DevTools protocol; needs nothing but the program."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0  # seconds for one answer


class Window:
    """One page in a window of a size.

    asked   addresses that the page has requested           troubles  errors and warnings that it or the browser told
    """

    def __init__(self, read: int, write: int):
        self._read, self._write, self._rest, self._number, self._session = read, write, b"", 0, ""
        self.asked: list[str] = []
        self.troubles: list[str] = []
        self._loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, file: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Show a file and wait until it has loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"}])
        self.asked.clear()
        self._loaded = False
        self.send("Page.navigate", url=file.resolve().as_uri())
        while not self._loaded:
            self._hear()

    def value(self, script: str) -> Any:
        """What an expression of JavaScript comes to."""
        told = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def settle(self) -> None:
        """Wait until what has happened is drawn."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      **({"text": text} if text and kind == "keyDown" else {}))

    def point(self, x: float, y: float) -> None:
        """Rest the pointer on a place in the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, whole: bool = True) -> bytes:
        """A screenshot as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole, **(
            {"clip": {**self.send("Page.getLayoutMetrics")["cssContentSize"], "scale": 1}} if whole else {}))["data"])

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser, and hear until it answers."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": params}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._hear()
            if told.get("id") == self._number:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]

    def _hear(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, "the browser says nothing"
            self._rest += data
        line, self._rest = self._rest.split(b"\0", 1)
        told = json.loads(line)
        self._note(told.get("method"), told.get("params", {}))
        return told

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.troubles.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.troubles.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.troubles.append(params["entry"]["text"])


@contextmanager
def chromium(folder: Path) -> Iterator[Window]:
    """A fresh browser that keeps its things in `folder`, gone at the end."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    assert program is not None, "no Chromium is here: apt-get install chromium"
    down, up = os.pipe(), os.pipe()  # the browser reads from descriptor 3 and writes to 4

    def wire() -> None:
        ours, theirs = os.dup(down[0]), os.dup(up[1])
        os.dup2(ours, 3)
        os.dup2(theirs, 4)

    command = [program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-sandbox",
               "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--hide-scrollbars", "about:blank"]
    browser = subprocess.Popen(command, preexec_fn=wire, close_fds=False, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(down[0])
    os.close(up[1])
    try:
        yield Window(up[0], down[1])
    finally:
        browser.terminate()
        browser.wait(20)
        os.close(down[1])
        os.close(up[0])
