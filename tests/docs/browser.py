"""Chromium without a window, spoken to through two pipes: what a visitor's browser would see.

The protocol is that of the developer tools, JSON with a zero byte after each message, so neither a
driver nor a library is needed: https://chromedevtools.github.io/devtools-protocol.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--disable-sync",
  "--disable-dev-shm-usage",
  "--disable-background-networking",
  "--disable-component-update",
  "--hide-scrollbars",
  "--no-first-run",
  "--remote-debugging-pipe",
]


class Browser:
  """One page. ``errors`` are those of its console and of what it could not load."""

  def __init__(self, send: int, receive: int):
    self._send, self._receive, self._buffer = send, receive, b""
    self._numbers, self._session = itertools.count(1), ""
    self.errors: list[str] = []
    self._loaded = False
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """Sends a command and waits for its answer; events that come before it are noted."""
    number = next(self._numbers)
    message: dict[str, Any] = {"id": number, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._send, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._read()
      if answer.get("id") == number:
        if "error" in answer:
          raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]
      self._note(answer)

  def open(self, page: Path) -> None:
    """Opens a page and waits until it and its pictures are there."""
    self.errors, self._loaded = [], False
    self.call("Page.navigate", url=page.resolve().as_uri())
    while not self._loaded:
      self._note(self._read())

  def resize(self, width: int, height: int = 900) -> None:
    """Makes the window ``width`` CSS pixels wide; below 500, that of a phone."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1}
    self.call("Emulation.setDeviceMetricsOverride", mobile=width < 500, **size)

  def evaluate(self, script: str) -> Any:
    """The value of an expression of JavaScript, awaited if it is a promise."""
    how = {"awaitPromise": True, "returnByValue": True}
    answer = self.call("Runtime.evaluate", expression=script, **how)
    if "exceptionDetails" in answer:
      raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
    return answer["result"].get("value")

  def _read(self) -> dict[str, Any]:
    while b"\0" not in self._buffer:
      if not select.select([self._receive], [], [], 60)[0]:
        raise TimeoutError("Chromium has said nothing for a minute")
      part = os.read(self._receive, 1 << 20)
      if not part:
        raise RuntimeError("Chromium has ended")
      self._buffer += part
    message, _, self._buffer = self._buffer.partition(b"\0")
    return json.loads(message)

  def _note(self, event: dict[str, Any]) -> None:
    name, params = event.get("method"), event.get("params", {})
    if name == "Page.loadEventFired":
      self._loaded = True
    elif name == "Runtime.exceptionThrown":
      self.errors.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
    elif name == "Runtime.consoleAPICalled" and params["type"] == "error":
      self.errors.append(str(params["args"]))
    elif name == "Log.entryAdded" and params["entry"]["level"] == "error":
      self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
    elif name == "Network.requestWillBeSent":
      url = params["request"]["url"]
      if url.startswith(("http:", "https:")):
        self.errors.append(f"the page asks the network for {url}")


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
  """A browser with an empty profile, ended with the block."""
  assert CHROMIUM is not None
  command_read, send = os.pipe()
  receive, answer_write = os.pipe()

  command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"]
  # Chromium reads commands from 3 and writes to 4.
  process = subprocess.Popen(
    ["bash", "-c", f'exec "$@" 3<&{command_read} 4>&{answer_write}', "bash", *command],
    pass_fds=(command_read, answer_write),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(command_read)
  os.close(answer_write)
  try:
    yield Browser(send, receive)
  finally:
    process.kill()
    process.wait()
    os.close(send)
    os.close(receive)
