"""``scorefield play`` as a server: what its door lets through, what each tab answers, what it costs in memory."""

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hostile_pictures import HOSTILE, png, url
from PIL import Image

pytest.importorskip("gradio", reason="the extra play is not installed")
client = pytest.importorskip("gradio_client", reason="the extra play is not installed")

from scorefield.play.server import API, MOST_BODY, Door, names_address  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DRAWN = Image.new("L", (256, 256))
DRAWN.paste(255, (60, 60, 64, 200))


def through(method, path, body=b"", local=True, folder=Path("/nowhere"), **headers):
    """What the door says: a status, or None where it lets a request through, with the body that came through."""
    seen, sent, given = [], [], [{"type": "http.request", "body": body, "more_body": False}]

    async def app(scope, receive, send):
        seen.append((await receive())["body"] if method == "POST" else b"")
        await send({"type": "http.response.start", "status": 299, "headers": []})

    async def receive():
        return given.pop(0)

    async def send(message):
        sent.append(message)

    headers = {"host": "127.0.0.1:7860", **headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(Door(app, local, folder)(scope, receive, send))
    assert dict(sent[0]["headers"])[b"content-security-policy"].startswith(b"default-src 'self';")
    assert bool(seen) == (sent[0]["status"] == 299)
    assert not seen or seen[0] == body
    return sent[0]["status"]


def test_the_door_lets_through_what_the_page_needs_and_nothing_else():
    for method, path in [
        ("GET", "/"), ("HEAD", "/"), ("GET", "/config"), ("GET", "/assets/index.js"), ("GET", API + "queue/data"),
        ("GET", API + "file=/tmp/x/image.png"), ("GET", API + "heartbeat/abc"),
    ]:  # fmt: skip
        assert through(method, path) == 299, path
    for method, path in [
        ("GET", "/monitoring"), ("GET", API + "proxy=https://a.b/c"), ("GET", API + "file=https://a.b/c"),
        ("POST", API + "vibe-edit"), ("POST", API + "component_server"), ("POST", API + "run/draw"),
        ("GET", "/dev/reload"), ("POST", "/"), ("DELETE", API + "queue/join"), ("GET", API + "custom_component/1"),
        ("POST", API + "process_recording"), ("GET", API + "run-history/records"), ("GET", "/login"),
    ]:  # fmt: skip
        assert through(method, path) == 404, path


def test_the_door_refuses_other_hosts_and_other_sites():
    assert through("GET", "/", host="evil.example:7860") == 421, "DNS rebinding"
    assert through("GET", "/", host="evil.example:7860", local=False) == 299
    assert through("GET", "/", host="[") == 400
    for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert through("GET", "/", host=host) == 299
    join = {"method": "POST", "path": API + "queue/join", "body": b"{}"}
    assert through(**join, origin="http://evil.example") == 403
    assert through(**join, origin="null") == 403
    assert through(**join, origin="http://127.0.0.1:7860") == 299


def test_the_door_refuses_bodies_that_are_large_and_files_that_are_addresses():
    path = API + "queue/join"
    assert through("POST", path, b"[" + b" " * MOST_BODY + b"]") == 413
    assert through("POST", path, json.dumps({"data": [{"path": "/tmp/a.png"}]}).encode()) == 299
    for place in ("http://169.254.169.254/x", "https://a.b/c.png", "file:///etc/passwd"):
        assert through("POST", path, json.dumps({"data": [{"a": [{"path": place}]}]}).encode()) == 400
    assert names_address(b"[" * 100_000)
    assert names_address(b"\xff")


def test_the_door_takes_no_uploads_where_much_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("scorefield.play.server.MOST_KEPT", 100)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(100))
    assert through("POST", API + "upload", b"x", folder=tmp_path) == 299
    (tmp_path / "c").write_bytes(b"x")
    assert through("POST", API + "upload", b"x", folder=tmp_path) == 507


class Served:
    """A server in a process of its own."""

    def __init__(self, folder, *words):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TMPDIR": str(folder)}
        command = [sys.executable, "-m", "scorefield", "play", "--port", "0", "--device", "cpu", *words]
        self.said = []
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        ready = threading.Event()

        def listen():
            for line in self.process.stdout:
                self.said.append(line)
                if line.startswith("open "):
                    self.address = line.split()[1]
                    ready.set()
            ready.set()

        threading.Thread(target=listen, daemon=True).start()
        ready.wait(120)
        assert hasattr(self, "address"), "".join(self.said)

    @property
    def port(self):
        return int(re.search(r":(\d+)", self.address).group(1))

    def client(self):
        return client.Client(self.address, verbose=False, analytics_enabled=False)

    def memory(self):
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", text).group(1)) / 1024

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    server = Served(folder, "--steps", "4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))  # where the client puts what it downloads
        yield server
    assert server.end() == 128 + signal.SIGTERM
    assert not list(folder.glob("scorefield-play-*")), "what was drawn is gone"
    assert "Traceback" not in "".join(server.said), "".join(server.said)


def picture(answer):
    with Image.open(answer if isinstance(answer, str) else answer["path"]) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_page_is_served_to_this_machine_and_names_no_other(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    text = answer.read().decode()
    loaded = re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"(https?:[^\"]*)\"", text)
    assert not [address for address in loaded if "127.0.0.1" not in address]
    for path in (
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={ROOT}/setup.cfg",
        "/gradio_api/proxy=http://a.b",
    ):
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status in (403, 404), path
        assert b"root:" not in body, path
        assert b"[metadata]" not in body, path


def test_each_tab_does_its_job_with_what_ships(served):
    page = served.client()
    teacher, cost, *students = page.predict("a red mug", 0, 4, 3.0, api_name="/draw")
    again = page.predict("a red mug", 0, 4, 3.0, api_name="/draw")
    assert np.array_equal(picture(teacher), picture(again[0]))
    assert "4 network calls" in cost
    assert picture(teacher).shape == (64, 64, 3)
    if students:
        assert "1 network call," in students[1]
        assert picture(students[0]).std() > 10
    before, after, cost = page.predict("a red mug", "a blue mug", 1.0, 0, 4, 3.0, api_name="/edit")
    assert np.abs(picture(before) - picture(after)).max() > 20
    assert "for both" in cost


def test_errors_are_one_line_and_no_traceback(served):
    page = served.client()
    for words, message in [("", "The prompt is empty"), ("a" * 600, "at most 500"), ("<b>", None)]:
        if message is None:
            assert page.predict(words, 0, 1, 1.0, api_name="/draw")
            continue
        with pytest.raises(Exception, match=message) as error:
            page.predict(words, 0, 4, 3.0, api_name="/draw")
        assert "Traceback" not in str(error.value)
        assert "scorefield/" not in str(error.value)


def control(page, path, drawing="", kind="edges of the picture (Canny)"):
    file = None if path is None else client.handle_file(path)
    return page.predict(drawing, file, kind, 100, 200, "a red mug", 0, 2, 3.0, api_name="/control")


def has_adapter():
    import toyworld

    return (toyworld.adapter_folder() / "config.json").is_file()


needs_adapter = pytest.mark.skipif(not has_adapter(), reason="no adapter ships")


@needs_adapter
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads_give_a_message(served, tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / "upload.png").write_bytes(content)
    with pytest.raises(Exception, match=message) as error:
        control(served.client(), tmp_path / "upload.png")
    assert str(tmp_path) not in str(error.value)
    assert "Traceback" not in str(error.value)


@needs_adapter
def test_a_drawing_and_a_picture_control_what_is_drawn(served, tmp_path):
    page = served.client()
    lines, drawn, cost = control(page, None, url(DRAWN))
    assert picture(lines).max() == 255
    assert picture(drawn).shape == (64, 64, 3)
    assert "2 network calls" in cost
    (tmp_path / "upload.png").write_bytes(png(DRAWN.convert("RGB")))
    found, *_ = control(page, tmp_path / "upload.png")
    assert 0 < (picture(found)[..., 0] > 0).mean() < 0.2


@pytest.mark.slow
def test_two_users_at_once_get_what_they_asked_for(served):
    wanted = [served.client().predict("a red mug", seed, 4, 3.0, api_name="/draw")[0] for seed in (1, 2)]
    jobs = [
        served.client().submit("a red mug", seed, 4, 3.0, api_name="/draw") for _ in range(3) for seed in (1, 2)
    ]
    for number, job in enumerate(jobs):
        assert np.array_equal(picture(job.result(timeout=120)[0]), picture(wanted[number % 2]))


@pytest.mark.slow
def test_a_hundred_requests_take_no_memory(served):
    page = served.client()
    for number in range(10):  # allocators warm up
        page.predict(f"a red mug {number}", number, 2, 3.0, api_name="/draw")
        page.predict("a red mug", "a blue mug", 0.8, number, 2, 3.0, api_name="/edit")
    before = served.memory()
    for number in range(50):
        page.predict(f"a blue chair {number}", number, 2, 3.0, api_name="/draw")
        page.predict("a red mug", f"a blue mug {number}", 0.8, number, 2, 3.0, api_name="/edit")
    grown = served.memory() - before
    assert grown < 40, f"{grown:.0f} MB more after 100 requests"
