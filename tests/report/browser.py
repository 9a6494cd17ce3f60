"""A headless Chromium over its DevTools pipe, which needs no driver: what a page shows, loads and reports as errors."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--no-first-run", "--hide-scrollbars",
)  # fmt: skip
# Chromium reads commands from descriptor 3 and answers on 4, which are free in a process of our own.
WITH_PIPES = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
COMPLAINTS = {
    "Log.entryAdded",
    "Runtime.exceptionThrown",
    "Runtime.consoleAPICalled",
    "Page.javascriptDialogOpening",
}
MEASURES = """(() => {
  const wide = document.documentElement.clientWidth, text = document.querySelector('.charts svg text');
  return {
    title: document.title, text: document.body.innerText, wide,
    overflow: document.documentElement.scrollWidth - wide,
    beyond: [...document.querySelectorAll('body *')].filter(e => !e.closest('svg')
      && e.getBoundingClientRect().right > wide + 1).map(e => e.outerHTML.slice(0, 200)),
    tags: [...new Set([...document.querySelectorAll('*')].map(e => e.localName))],
    handlers: [...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on')),
    links: [...document.querySelectorAll('[href],[src]')].map(e => e.getAttribute('href') || e.getAttribute('src')),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    headings: [...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.localName[1]),
    charts: [...document.querySelectorAll('svg[role=img]')].map(e => e.getAttribute('aria-label')),
    chartTexts: [...document.querySelectorAll('svg[role=img] text')].map(e => e.textContent.trim()),
    chartFont: text && parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a,
    background: getComputedStyle(document.body).backgroundColor, colour: getComputedStyle(document.body).color,
    line: (e => e && getComputedStyle(e).stroke)(document.querySelector('.legend line')),
    ran: window.ran === undefined ? null : window.ran,
  };
})()"""


def find_chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Seen:
    """Measures, requests and complaints of a page."""

    measures: dict
    requests: list[str]
    complaints: list[str]  # errors and warnings of the console, exceptions, dialogs
    png: bytes = b""


@dataclass
class Browser:
    """Shows one page after another; `close` ends the process."""

    profile: Path
    _number: int = 0
    _events: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        (r_in, w_in), (r_out, w_out) = os.pipe(), os.pipe()
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (r_in, w_out)]
        words = [sys.executable, "-c", WITH_PIPES, *map(str, ours), find_chromium(), *FLAGS]
        self._process = subprocess.Popen(
            [*words, f"--user-data-dir={self.profile}"], pass_fds=ours, stderr=subprocess.DEVNULL
        )
        for end in (r_in, w_out, *ours):
            os.close(end)
        self._commands, self._answers = os.fdopen(w_in, "wb", 0), os.fdopen(r_out, "rb")
        self._waiting = b""

    def see(self, page: Path, *, width: int = 1200, dark: bool = False, full: bool = False) -> Seen:
        """Show the page in a window of that width; full: with a picture of the complete page."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events.clear()
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._ask(f"{domain}.enable", session)
        phone = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", session, **phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", session, features=[scheme])
        self._ask("Page.navigate", session, url=page.resolve().as_uri())
        self._until("Page.loadEventFired")
        found = self._ask("Runtime.evaluate", session, expression=MEASURES, returnByValue=True)
        measures = found["result"]["value"]
        png = self._ask("Page.captureScreenshot", session, captureBeyondViewport=True) if full else {"data": ""}
        self._ask("Target.closeTarget", targetId=target)
        return Seen(measures, self._requests(), self._complaints(), base64.b64decode(png["data"]))

    def close(self) -> None:
        self._ask("Browser.close")
        self._process.wait(30)

    def _requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]

    def _complaints(self) -> list[str]:
        return [json.dumps(event["params"]) for event in self._events if event["method"] in COMPLAINTS]

    def _ask(self, method: str, session: str | None = None, **params: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._commands.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, method: str) -> None:
        while not any(event["method"] == method for event in self._events):
            self._events.append(self._next())

    def _next(self) -> dict:
        while b"\0" not in self._waiting:
            more = self._answers.read1(1 << 20)
            assert more, "Chromium has gone"
            self._waiting += more
        message, self._waiting = self._waiting.split(b"\0", 1)
        return json.loads(message)
