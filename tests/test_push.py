"""What a run made, on a hub of the test's own: what is sent, what stays at home, and what is never asked."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import save_file

from scorefield import cli
from scorefield.atomic import MARKER, whole_folder

NAME = "me/mugs-in-one-step"
CARD = """---
library_name: diffusers
base_model: BASE
license: other
license_name: that-of-the-base-model
tags: [text-to-image]
---
# A student of 1 step
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one commit asks. To it all files are small; large ones go to a storage of its own."""

    def log_message(self, *_):
        pass

    def answer(self, content, code=200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer({"id": NAME, "private": self.server.private, "tags": [], "siblings": []})

    def do_POST(self):
        body, server = self.body(), self.server
        server.asked.append(self.path)
        server.tokens.add(self.headers.get("Authorization"))
        if server.refuses:
            self.answer({"error": server.refuses}, 403)
        elif self.path == "/api/repos/create":
            server.made = json.loads(body)
            self.answer({"url": f"{server.address}/{NAME}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines() if line]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
            server.commits += 1
            commit = f"{server.address}/{NAME}/commit/0"
            self.answer({"commitUrl": commit, "commitOid": "0" * 40, "success": True})
        else:
            self.answer({"error": f"unknown {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.asked, server.tokens, server.commits = {}, [], set(), 0
    server.made, server.refuses, server.private = None, "", True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    close_session()
    yield server
    server.shutdown()
    server.server_close()


def make_run(root, base="toyworld/pipeline", teacher="toyworld", card=CARD):
    run = root / "run"
    (run / "samples").mkdir(parents=True)
    with whole_folder(run / "student") as folder:
        save_file({"weight": torch.arange(4.0)}, folder / "model.safetensors")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
        if card:
            (folder / "README.md").write_text(card.replace("BASE", base))
    for step in (1, 2):
        (run / "samples" / f"step-{step:09}.png").write_bytes(b"\x89PNG of step %d" % step)
    options = {"teacher": teacher, "steps": 2, "student_every": 1, "fake_lr": 0.1}
    (run / "config.json").write_text(json.dumps(options))
    return run


def push(*words):
    """Return the exit code."""
    try:
        cli.main(["push", *map(str, words)])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_files_card_and_picture_are_sent_in_one_commit(hub, tmp_path, capsys):
    run = make_run(tmp_path)
    assert push(run, "--to", NAME, "--private") == 0
    assert hub.commits == 1
    assert hub.tokens == {"Bearer hf_of_the_test"}
    assert hub.made["name"] == "mugs-in-one-step"
    assert hub.made["organization"] == "me"
    assert hub.made.get("private") or hub.made.get("visibility") == "private"
    assert set(hub.files) == {"model.safetensors", "scheduler/scheduler_config.json", "README.md", "samples.png"}
    for name in ("model.safetensors", "scheduler/scheduler_config.json"):
        assert hub.files[name] == (run / "student" / name).read_bytes()
    assert hub.files["samples.png"] == b"\x89PNG of step 2"
    card = hub.files["README.md"].decode()
    assert "license: apache-2.0" in card, "that of the pipeline that ships"
    assert "license_name" not in card
    assert "base_model" not in card, "the hub has no toyworld/pipeline"
    assert "# A student of 1 step" in card
    assert "![what it draws](samples.png)" in card
    assert f"published: {hub.address}/{NAME}" in capsys.readouterr().out


def test_the_student_folder_alone_is_the_same_as_its_run(hub, tmp_path):
    run = make_run(tmp_path)
    assert push(run / "student", "--to", NAME) == 0
    assert "samples.png" in hub.files


@pytest.mark.parametrize(("header", "licence"), [
    ("license: mit\n", "license: mit"), ("license: other\n", "license_name: that-of-the-base-model"),
    ("license: [mit\n", "license_name: that-of-the-base-model"), ("", "license_name: that-of-the-base-model"),
])  # fmt: skip
def test_the_licence_is_that_of_the_teachers_own_card(hub, tmp_path, header, licence):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text(f"---\n{header}---\n# T\n")
    run = make_run(tmp_path, base=str(teacher), teacher=str(teacher))
    assert push(run, "--to", NAME) == 0
    card = hub.files["README.md"].decode()
    assert licence in card
    assert str(tmp_path) not in card, "a path of this machine tells strangers nothing"


def test_a_base_on_the_hub_is_named_and_a_licence_may_be_given(hub, tmp_path):
    run = make_run(tmp_path, base="some/model", teacher="some/model")
    assert push(run, "--to", NAME, "--licence", "cc0-1.0") == 0
    card = hub.files["README.md"].decode()
    assert "base_model: some/model" in card
    assert "license: cc0-1.0" in card


def test_a_card_that_was_edited_is_sent_as_it_is(hub, tmp_path):
    run = make_run(tmp_path)
    mine = "---\nlicense: mit\n---\nmy own words\n"
    (run / "student" / "README.md").write_text(mine)
    assert push(run, "--to", NAME) == 0
    assert hub.files["README.md"].decode() == mine


def test_a_folder_without_a_card_gets_one_with_the_figures_of_the_run(hub, tmp_path):
    run = make_run(tmp_path, card="")
    report = {"distance": 0.012, "distance_of_halves": 0.01, "num_images": 64, "step": 2, "num_steps": 1}
    (run / "report.json").write_text(json.dumps(report))
    assert push(run, "--to", NAME) == 0
    card = hub.files["README.md"].decode()
    assert f"hf download {NAME}" in card
    assert "scorefield sample --teacher mugs-in-one-step" in card
    assert "1.20 x the distance of two halves" in card
    assert "- distance from the teacher: 0.012" in card
    assert str(tmp_path) not in card


def test_a_repository_that_is_public_already_is_refused_where_a_private_one_is_asked_for(hub, tmp_path, capsys):
    hub.private = False
    assert push(make_run(tmp_path), "--to", NAME, "--private") == 1
    assert "it is there already, and public" in capsys.readouterr().err
    assert not hub.commits


def test_no_place_of_this_machine_is_told(hub, tmp_path, capsys):
    data = tmp_path / "my" / "photos"
    data.mkdir(parents=True)
    body = CARD.replace("# A student", f"- data: {data}\n# A student")
    run = make_run(tmp_path, base=f"[{tmp_path}/teacher, a/b]", card=body)
    options = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**options, "data": str(data)}))
    with whole_folder(run / "student") as folder:
        save_file({"weight": torch.arange(4.0)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path), "width": 8}))
        (folder / "README.md").write_text(body.replace("BASE", f"[{tmp_path}/teacher, a/b]"))
    assert push(run, "--to", NAME) == 0
    assert not any(str(tmp_path).encode() in content for content in hub.files.values())
    assert b"- data: photos" in hub.files["README.md"]
    assert json.loads(hub.files["config.json"]) == {"width": 8}
    (run / "student" / "README.md").write_text(f"---\nlicense: mit\n---\nlearned from {data}\n")
    assert push(run, "--to", NAME) == 2
    assert f"names {data}, which is on this machine. Take it out." in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(hub, tmp_path, capsys):
    run = make_run(tmp_path)
    assert push(run, "--to", NAME, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "model.safetensors" in said
    assert "# A student of 1 step" in said
    assert "samples.png" in said
    assert not hub.asked


def test_what_the_run_did_not_write_stays_at_home(hub, tmp_path, capsys):
    run, secret = make_run(tmp_path), tmp_path / "secret.txt"
    secret.write_text("password")
    (run / "student" / "notes.txt").write_text("mine")
    (run / "student" / "link.txt").symlink_to(secret)
    listed = json.loads((run / "student" / MARKER).read_text())
    listed["files"]["key.json"] = "no file"  # a crafted folder may list anything
    (run / "student" / MARKER).write_text(json.dumps(listed))
    (run / "student" / "key.json").symlink_to(secret)
    (run / "student" / "README.md").unlink()
    (run / "student" / "README.md").symlink_to(secret)
    assert push(run, "--to", NAME) == 0
    assert "notes.txt" in capsys.readouterr().out
    assert not {"notes.txt", "link.txt", "key.json", ".scorefield.json"} & set(hub.files)
    assert not any(b"password" in content for content in hub.files.values())


@pytest.mark.parametrize(("words", "message"), [
    ([], "--to must be owner/name"), (["--to", "alone"], "--to must be owner/name"),
    (["--to", "me/../x"], "--to must be"), (["--to", "me/a b"], "--to must be"),
    (["--to", "a/b/c"], "--to must be"),
    (["--to", "me/x.git"], "--to must be"), (["--to", f"me/{'x' * 100}"], "--to must be"),
    (["--to", NAME, "--licence", "My Own: yes"], "--licence must be a short name"),
])  # fmt: skip
def test_names_that_cannot_be_are_refused(hub, tmp_path, capsys, words, message):
    assert push(make_run(tmp_path), *words) == 2
    assert message in capsys.readouterr().err
    assert not hub.asked


def test_what_is_no_result_is_refused(hub, tmp_path, capsys):
    run = make_run(tmp_path)
    (run / "student" / "model.safetensors").write_bytes(b"other weights")
    assert push(run, "--to", NAME) == 2
    assert "was changed since the run wrote it" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert push(tmp_path / "empty", "--to", NAME) == 2
    assert "holds no result" in capsys.readouterr().err
    assert push(tmp_path / "gone", "--to", NAME) == 2
    with whole_folder(tmp_path / "bare") as folder:
        (folder / "a.txt").write_text("a")
    assert push(tmp_path / "bare", "--to", NAME) == 2
    assert "holds no weights" in capsys.readouterr().err
    bad = make_run(tmp_path / "bad", card="---\nlicense: [\n---\n# x\n")
    assert push(bad, "--to", NAME) == 2
    assert "its header cannot be read" in capsys.readouterr().err
    assert not hub.asked


def test_nobody_is_logged_in(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("scorefield.publish.upload.get_token", lambda: None)
    assert push(make_run(tmp_path), "--to", NAME) == 2
    assert "hf auth login" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(tmp_path / "run", "--to", NAME) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert not hub.asked


def test_a_hub_that_refuses_or_is_gone_is_a_failure_in_one_line(hub, tmp_path, capsys):
    hub.refuses = "You don't have the rights to create a model under the namespace"
    run = make_run(tmp_path)
    assert push(run, "--to", NAME) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "was not published" in lines[0]
    hub.shutdown()
    hub.server_close()
    assert push(run, "--to", NAME) == 1
    assert "was not published" in capsys.readouterr().err
