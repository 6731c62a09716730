"""A headless Chromium to open the site in, spoken to over its debugging socket."""

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tornado.websocket import websocket_connect

FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync".split()
FLAGS += ["--disable-component-update", "--remote-debugging-port=0", "--allow-file-access-from-files"]


def chromium() -> str | None:
    "The browser's program, where the machine has one."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    "One page. `errors` and `requests` collect what it logs and loads."

    def __init__(self, profile: Path, loop: asyncio.AbstractEventLoop):
        self.profile, self.loop, self.number = profile, loop, 0
        self.errors: list[str] = []
        self.requests: list[str] = []

    def connect(self) -> None:
        "Wait for the browser and take its first page."
        port = self.profile / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (port.exists() and port.read_text().count("\n")):
            if time.monotonic() > until:
                raise TimeoutError("the browser did not start within a minute")
            time.sleep(0.1)
        number, path = port.read_text().split("\n")[:2]
        self.socket = self.run(
            lambda: websocket_connect(f"ws://127.0.0.1:{number}{path}", max_message_size=1 << 28)
        )
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def run(self, start: Callable[[], Awaitable]) -> Any:
        async def work():
            return await asyncio.wait_for(start(), 60)

        return self.loop.run_until_complete(work())

    def call(self, method: str, **params) -> dict:
        "Send a command and return its result; what happens meanwhile is noted."
        self.number += 1
        session = {"sessionId": self.session} if hasattr(self, "session") else {}
        text = json.dumps({"id": self.number, "method": method, "params": params} | session)
        self.run(lambda: self.socket.write_message(text))
        while True:
            message = json.loads(self.run(self.socket.read_message))
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.note(message.get("method"), message.get("params", {}))

    def note(self, event: str, said: dict) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"].get("text", "exception"))
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert"):
            self.errors.append(str([a.get("value") for a in said["args"]]))

    def open(self, address: str, width: int = 1200, dark: bool = False) -> None:
        "Load a page and wait until it is complete."
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        "The value of a JavaScript expression in the page."
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", expression))
        return result["result"].get("value")

    def until(self, condition: str, seconds: float = 30) -> None:
        "Wait until a JavaScript condition holds."
        end = time.monotonic() + seconds
        while not self.value(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds:g} s: {condition}")
            time.sleep(0.1)


@contextmanager
def opened() -> Iterator[Browser]:
    "A browser with an empty profile, closed afterwards."
    with TemporaryDirectory() as folder:
        command = [chromium(), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        loop = asyncio.new_event_loop()
        try:
            browser = Browser(Path(folder), loop)
            browser.connect()
            yield browser
        finally:
            process.terminate()
            process.wait(30)
            loop.close()
            time.sleep(0.2)  # its children still write into the profile
