"""A headless Chromium, driven through its pipe; network names resolve to nothing."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRAWN = "document.readyState == 'complete' && (!document.getElementById('figures') || !!document.body.dataset.drawn)"


class Browser:
    """One page of a browser."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        (read_here, write_there), (read_there, write_here) = os.pipe(), os.pipe()

        def place() -> None:  # the browser reads 3 and writes 4
            ends = os.dup(read_there), os.dup(write_there)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        flags += [
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}",
            "--disable-dev-shm-usage",
        ]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"],
            close_fds=False,
            preexec_fn=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self._in, self._out = os.fdopen(read_here, "rb", buffering=0), os.fdopen(write_here, "wb", buffering=0)
        self._buffer, self._count, self.events = b"", 0, list[dict[str, Any]]()
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._process.kill()
        self._process.wait()
        self._in.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = self._in.read(1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        raw, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(raw)

    def open(self, page: Path | str, width: int, *, is_dark: bool) -> None:
        """Show a file, or an address on loopback, at a width, and wait until its figures are drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        until = time.monotonic() + 60
        while self.value(DRAWN) is not True:
            assert time.monotonic() < until, self.complaints()
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[Any]:
        """Return what the page has written to the console, has thrown or has tried to fetch."""
        self.value("0")
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        fetched = [
            one["params"]["request"]["url"] for one in self.events if one.get("method") == "Network.requestWillBeSent"
        ]
        said = [one["params"] for one in self.events if one.get("method") in kinds]
        called = [one["params"] for one in self.events if one.get("method") == "Runtime.consoleAPICalled"]
        said += [one for one in called if one["type"] in ("error", "warning", "assert")]
        return [*said, *(url for url in fetched if not url.startswith(("file:", "data:", "blob:")))]

    def picture(self, file: Path) -> None:
        """Write a picture of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))
