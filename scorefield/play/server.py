"""The server of the page: gradio's, behind a door that lets through what the page needs and nothing else.

The door is an ASGI application round gradio's. It refuses other routes, requests for another host or of another
site (DNS rebinding and forged requests reach servers on loopback, too), bodies that are too large, and addresses
that gradio would download.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import gradio as gr

from scorefield.play.options import LOOPBACK

API = "/gradio_api/"

ROUTES = (
    *(("GET", path) for path in ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/info")),
    *(("GET", API + path) for path in ("info", "queue/data", "startup-events", "theme.css", "app_id")),
    *(("POST", API + path) for path in ("queue/join", "upload", "cancel", "reset")),
)
"""What is let through, whole paths."""

PLACES = ("/assets/", "/static/", "/svelte/", API + "file=", API + "heartbeat/", API + "upload_progress")
"""What is let through, beginnings of paths that are read."""

MOST_UPLOAD = 9 * 2**20
"""Bytes of an upload with its envelope; files above ``uploads.MOST_BYTES`` get a message by themselves."""

MOST_KEPT = 2**29
"""Bytes of all uploads and pictures that are kept at a time; gradio deletes old ones."""

MOST_BODY = 3 * 2**20
"""Bytes of any other request: a drawing of the canvas has at most a MB."""

HEADERS = (
    (b"content-security-policy", b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
     b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self' data: blob:; "
     b"font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'; form-action 'self'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)  # fmt: skip
"""On every answer: a browser loads nothing from anywhere else."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

STYLE = """
.small img { image-rendering: pixelated; width: 100% !important; height: 100% !important; object-fit: contain; }
footer { display: none !important; }
"""


class Door:
    """What stands between the network and gradio.

    Args:
        app: gradio's application.
        local: whether the page is served to this machine alone, by its own names.
        folder: where gradio keeps files.
    """

    def __init__(self, app: App, local: bool, folder: Path) -> None:
        self.app, self.local, self.folder = app, local, folder

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer, or let through."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        fault = self.fault(scope["method"], scope["path"], headers)
        if fault is None and scope["method"] == "POST":
            most = MOST_UPLOAD if scope["path"] == API + "upload" else MOST_BODY
            receive, fault = await checked_body(receive, scope["path"], most)
        if fault is not None:
            await refuse(send, *fault)
            return
        await self.app(scope, receive, with_headers(send))

    def fault(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and sentence for a request that is refused by its head alone."""
        host = headers.get("host", "")
        origin = headers.get("origin", "")
        try:
            name, asker = urlsplit(f"//{host}").hostname or "", urlsplit(origin).netloc
        except ValueError:  # such as of a bracket that does not close
            return 400, "The request names no host."
        if self.local and name not in LOOPBACK:
            return 421, "This page is served to this machine alone."
        if method == "POST" and origin and asker != host:
            return 403, "Requests of other sites are refused."
        read = "GET" if method == "HEAD" else method
        if path == API + "upload" and kept(self.folder) > MOST_KEPT:
            return 507, "There is no room for more uploads; older ones are deleted in minutes."
        if (read, path) in ROUTES or (read == "GET" and path.startswith(PLACES) and "://" not in path):
            return None
        return 404, "There is nothing here."


def kept(folder: Path) -> int:
    """Return how many bytes the files in a folder have."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # deleted meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total


async def checked_body(receive: Receive, path: str, most: int) -> tuple[Receive, tuple[int, str] | None]:
    """Read a body, and return what gives it again, and why it is refused.

    Uploads are kept in memory until they are whole, of which each has at most ``MOST_UPLOAD`` bytes.
    """
    parts, length, more = list[bytes](), 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return receive, (400, "The request was cut off.")
        part = message.get("body", b"")
        parts.append(part)
        length, more = length + len(part), message.get("more_body", False)
        if length > most:
            return receive, (413, f"At most {most // 2**20} MB are taken at a time.")
    body = b"".join(parts)
    if path == API + "queue/join" and names_address(body):
        return receive, (400, "Files are uploaded, and not fetched from an address.")
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again, None


def names_address(body: bytes) -> bool:
    """Return True for a request in which a file has an address in place of a path, which gradio would download."""
    try:
        left: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return True
    while left:
        one = left.pop()
        if isinstance(one, dict):
            path = one.get("path")
            if isinstance(path, str) and "://" in path:
                return True
            left += one.values()
        elif isinstance(one, list):
            left += one
    return False


def with_headers(send: Send) -> Send:
    """Return ``send`` with the headers of every answer."""

    async def more(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await send(message)

    return more


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answer with a sentence."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


def start(page: gr.Blocks, host: str, port: int, folder: Path) -> str:
    """Serve the page from a thread, and return its address; gradio keeps its files in ``folder``."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    door = {"local": host in LOOPBACK, "folder": folder}
    _, address, _ = page.launch(
        server_name=f"[{host}]" if ":" in host else host, server_port=port or free_port(host), quiet=True,
        prevent_thread_lock=True, share=False, inbrowser=False, show_error=False, max_file_size=MOST_UPLOAD,
        max_threads=8, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, run_history=False,
        footer_links=[], strict_cors=True, state_session_capacity=100, theme=theme, css=STYLE,
        app_kwargs={"middleware": [(Door, (), door)]},
    )  # fmt: skip
    return address


def free_port(host: str) -> int:
    """Return a port that is free now."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])


def serve(page: gr.Blocks, host: str, port: int, folder: Path) -> None:
    """Serve the page until Ctrl-C, or SIGTERM, which ends with its own exit code."""

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    absent = "matplotlib" not in sys.modules
    if absent:  # gradio would import it with the first request, for seconds; the page has no plots
        sys.modules["matplotlib"] = None  # type: ignore[assignment]
    try:
        address = start(page, host, port, folder)
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(1)
    finally:
        if absent:
            del sys.modules["matplotlib"]
        page.close(verbose=False)
        signal.signal(signal.SIGTERM, before)
