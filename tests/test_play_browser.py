"""``scorefield play`` in Chromium: each tab does its job by clicks alone, and the page asks nobody else."""

import asyncio
import json
import shutil
import subprocess
import time
import urllib.request

import pytest

pytest.importorskip("gradio", reason="the extra play is not installed")
websockets = pytest.importorskip("websockets", reason="Chromium is driven through a web socket")

from test_play_page import Served  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

VISIBLE = "[...document.querySelectorAll('%s')].filter(x => x.getBoundingClientRect().width)"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]


class Page:
    """A page under Chromium's own protocol."""

    def __init__(self, socket):
        self.socket, self.number, self.events = socket, 0, []

    async def call(self, method, **given):
        self.number += 1
        await self.socket.send(json.dumps({"id": self.number, "method": method, "params": given}))
        while True:
            answer = json.loads(await self.socket.recv())
            if answer.get("id") == self.number:
                return answer.get("result", answer)
            self.events.append(answer)

    async def js(self, expression):
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait(self, expression, seconds=60):
        began = time.monotonic()
        while not await self.js(f"!!({expression})"):
            assert time.monotonic() - began < seconds, expression
            await asyncio.sleep(0.1)
        return time.monotonic() - began

    async def tab(self, name):
        await self.js(VISIBLE % "[role=tab]" + f".filter(x => x.innerText.trim() == '{name}')[0].click()")
        await asyncio.sleep(0.5)

    async def act(self, pictures):
        """Press the one button of a tab, and wait for so many pictures in it."""
        await self.js(VISIBLE % "button.primary" + "[0].click()")
        return await self.wait(VISIBLE % ".made img" + f".length >= {pictures}")

    async def draw_a_square(self):
        box = await self.js(
            "(() => { const r = document.querySelector('#sketch canvas').getBoundingClientRect();"
            " return [r.x, r.y, r.width, r.height]; })()"
        )
        corners = [(0.3, 0.3), (0.3, 0.7), (0.7, 0.7), (0.7, 0.3), (0.3, 0.3)]
        places = [(box[0] + x * box[2], box[1] + y * box[3]) for x, y in corners]
        kinds = ["mousePressed", *["mouseMoved"] * 4, "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*places, places[-1]], strict=True):
            await self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1
            )


async def play(address, folder):
    """Walk through the tabs; returns what was seen."""
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={folder}",
        "--no-first-run", "--disable-background-networking", "--window-size=1280,1400", "about:blank",
    ]  # fmt: skip
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        place = folder / "DevToolsActivePort"
        for _ in range(600):
            if place.exists() and place.read_text().strip():
                break
            await asyncio.sleep(0.1)
        port = place.read_text().split()[0]
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        own = next(tab for tab in tabs if tab["type"] == "page")["webSocketDebuggerUrl"]
        async with websockets.connect(own, max_size=None) as socket:
            page = Page(socket)
            for part in ("Page", "Network", "Runtime", "Log"):
                await page.call(f"{part}.enable")
            await page.call("Page.navigate", url=address)
            await page.wait(VISIBLE % "button.primary" + ".length")
            seen = {"draw": await page.act(1)}
            await page.tab("Edit")
            seen["edit"] = await page.act(2)
            await page.tab("Control")
            if await page.js("!!document.querySelector('#sketch canvas')"):
                await page.draw_a_square()
                seen["control"] = await page.act(2)
            await page.tab("Scene")
            seen["scene"] = await page.js("document.body.innerText")
            await page.tab("Draw")
            await page.js(VISIBLE % "textarea" + "[0].value = ''")
            await page.js(VISIBLE % "textarea" + "[0].dispatchEvent(new Event('input', {bubbles: true}))")
            await page.js(VISIBLE % "button.primary" + "[0].click()")
            await page.wait("document.body.innerText.includes('The prompt is empty')")
            return seen, page.events
    finally:
        browser.terminate()
        browser.wait(30)


def test_every_tab_works_by_clicks_and_asks_nobody_else(tmp_path):
    server = Served(tmp_path, "--steps", "10")
    try:
        seen, events = asyncio.run(play(server.address, tmp_path / "browser"))
    finally:
        server.end()
    assert "scorefield sds toyworld" in seen["scene"]
    asked = {one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"}
    assert asked
    assert not [one for one in asked if not one.startswith((server.address, "data:", "blob:"))]
    told = [one for one in events if one["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not [one for one in told if one["params"].get("entry", {}).get("level", "error") == "error"]
    print({name: value for name, value in seen.items() if name != "scene"})
