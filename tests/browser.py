"""A headless Chromium by the WebDriver protocol (https://www.w3.org/TR/webdriver2/): a few
requests, so no client library.
"""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

# the protocol's own name for a reference to an element
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def missing():
    """Why no page can be looked at here, or None."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"not installed: {', '.join(lacking)} (Debian packages chromium, chromium-driver)"
        if lacking
        else None
    )


class Page:
    def __init__(self, session):
        self._session = session

    def open(self, place):
        """A file, or an address as text."""
        address = place if isinstance(place, str) else place.resolve().as_uri()
        self._call("POST", "url", {"url": address})

    def run(self, script):
        return self._call("POST", "execute/sync", {"script": script, "args": []})

    def keys(self, selector, text):
        """Type into an element, as a person at the keyboard does."""
        found = self._call("POST", "element", {"using": "css selector", "value": selector})
        self._call("POST", f"element/{found[ELEMENT]}/value", {"text": text})

    def click(self, selector):
        found = self._call("POST", "element", {"using": "css selector", "value": selector})
        self._call("POST", f"element/{found[ELEMENT]}/click", {})

    def drag(self, selector, share):
        """Press the pointer in the middle of an element and move it to `share` of its width."""
        found = self._call("POST", "element", {"using": "css selector", "value": selector})
        width = self._call("GET", f"element/{found[ELEMENT]}/rect")["width"]
        move = {"type": "pointerMove", "origin": {ELEMENT: found[ELEMENT]}, "duration": 50, "y": 0}
        actions = [
            move | {"x": 0},
            {"type": "pointerDown", "button": 0},
            move | {"x": round((share - 0.5) * width)},
            {"type": "pointerUp", "button": 0},
        ]
        self._call(
            "POST", "actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]}
        )

    def emulate(self, dark, width, height):
        """Colours that the person prefers, and the size of the screen."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._chrome("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._chrome("Emulation.setDeviceMetricsOverride", size)

    def screenshot(self, path):
        """The whole page, also what lies below the screen."""
        taken = self._chrome("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def complaints(self):
        """What the console said: errors and warnings, refused requests among them."""
        return [
            entry["message"]
            for entry in self._call("POST", "se/log", {"type": "browser"})
            if entry["level"] != "INFO"
        ]

    def _chrome(self, command, parameters):
        return self._call("POST", "goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, method, path, body=None):
        return request(method, f"{self._session}/{path}", body)


def request(method, url, body=None):
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url}: {error.read().decode()[:500]}") from error


@contextmanager
def browser():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url)
        options = {
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
            ]
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = (
            f"{url}/session/"
            + request("POST", f"{url}/session", {"capabilities": {"alwaysMatch": wanted}})[
                "sessionId"
            ]
        )
        try:
            yield Page(session)
        finally:
            request("DELETE", session)
    finally:
        driver.terminate()
        driver.wait(10)


def _wait(url, seconds=30):
    stop = time.monotonic() + seconds
    while True:
        try:
            if request("GET", f"{url}/status")["ready"]:
                return
        except OSError:
            if time.monotonic() > stop:
                raise
        time.sleep(0.1)
