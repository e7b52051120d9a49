"""Serve the page of a vote to this machine alone.

The server listens on 127.0.0.1. Every address begins with a token that is drawn for each start of
the program, and a request must name this machine as its host, so that a page of another site can't
vote.
"""

import functools
import hmac
import json
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.rewards.ballot import Ballot
from qzo_diffusion.rewards.votes import CHOICES
from qzo_diffusion.system import escape
from qzo_diffusion.system.reading import parse_json

HOST = "127.0.0.1"
TEMPLATE = "vote_page.html.jinja"
MOST_BYTES, MOST_READ = 4096, 2**16  # of a request's body: what is looked at, and what is read
WAIT_SECONDS = 10.0  # that a page waits for news
_STATE = re.compile(r"state(?:\?seen=(\d{1,9}))?")
_PICTURE = re.compile(r"picture/(\d{1,9})/(\d{1,9})/(left|right)")


@contextmanager
def served(ballot: Ballot, name: str, port: int = 0) -> Iterator[str]:
    """Serve the page while the context lasts. Yields its address, with the token.

    Args:
        name: of the run, for the title.
        port: 0 is any that is free.

    Raises:
        ConfigError: the port is taken.
    """
    token = secrets.token_urlsafe(24)
    handler = functools.partial(_Handler, ballot, name, token)
    try:
        server = _Server((HOST, port), handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"port {port} can't be used: {error}", "a free port", "leave --port out"
        ) from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/{token}/"
    finally:
        ballot.end()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking for the name of this machine, as the library's own does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    """One request. Without the token the answer is the same for every address."""

    timeout = 60  # seconds without a byte

    def __init__(self, ballot: Ballot, name: str, token: str, *arguments: Any) -> None:
        self._ballot, self._name, self._token = ballot, name, token
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = self._allowed()
        if path is None:
            return
        if path == "":
            self._page()
        elif found := _STATE.fullmatch(path):
            seen = None if found[1] is None else int(found[1])
            self._json(self._ballot.state(seen, WAIT_SECONDS))
        elif found := _PICTURE.fullmatch(path):
            step, place_in_round = int(found[1]) - 1, int(found[2]) - 1
            picture = self._ballot.picture(step, place_in_round, found[3] == "right")
            if picture is None:
                self._refuse(HTTPStatus.NOT_FOUND)
            else:
                self._answer(picture, "image/png")
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        body = self._body()
        path = self._allowed()
        if path is None:
            return
        if path == "choice":
            if not self._choose(body):
                return
        elif path == "undo":
            self._ballot.undo()
        elif path == "stop":
            self._ballot.stop()
        else:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        self._json(self._ballot.state())

    def _body(self) -> bytes:
        """Return the body, empty for one that is too long. It is read before the answer: a socket
        that is closed with unread bytes loses the answer.
        """
        length = self.headers.get("Content-Length") or ""
        known = int(length) if length.isdecimal() and len(length) < 10 else 0
        body = self.rfile.read(min(known, MOST_READ))
        return body if known <= MOST_BYTES else b""

    def _choose(self, body: bytes) -> bool:
        """Take {"round", "pair", "choice"}; refuse anything else and return False."""
        try:
            given = parse_json(body)
            step, place, choice = (given[key] for key in ("round", "pair", "choice"))
            if not (type(step) is type(place) is int and choice in CHOICES):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            self._refuse(HTTPStatus.BAD_REQUEST)
            return False
        self._ballot.choose(step - 1, place - 1, choice)
        return True

    def _allowed(self) -> str | None:
        """Return the address behind the token; refuse the request where it lacks it."""
        token, slash, path = self.path.removeprefix("/").partition("/")
        own = f"{HOST}:{self.connection.getsockname()[1]}"
        origin = self.headers.get("Origin")
        if (
            not hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode())
            or not slash
            or self.headers.get("Host") != own
            or origin not in (None, f"http://{own}")
        ):
            self._refuse(HTTPStatus.FORBIDDEN)
            return None
        return path

    def _page(self) -> None:
        nonce = secrets.token_urlsafe(12)
        page = _template().render(name=escape.one_line(self._name), nonce=nonce)
        policy = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
            f"form-action 'none'; frame-ancestors 'none'; style-src 'nonce-{nonce}'; "
            f"script-src 'nonce-{nonce}'"
        )
        self._answer(page.encode(), "text/html; charset=utf-8", policy)

    def _json(self, content: Any) -> None:
        self._answer(json.dumps(content).encode(), "application/json")

    def _refuse(self, status: HTTPStatus) -> None:
        self._answer(f"{status.phrase}\n".encode(), "text/plain; charset=utf-8", status=status)

    def _answer(
        self,
        body: bytes,
        kind: str,
        policy: str = "default-src 'none'",
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        self.send_response_only(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the page was closed before its answer
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Print nothing: the address holds the token."""


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(TEMPLATE)
