"""--config: the options of an earlier run are the defaults of a new one, and what is misspelt is named."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import distill.options as distill_options
import scorefield.cli as cli
from scorefield.commands.configuration import read_config, take_config
from scorefield.commands.options import Evaluate, Sample, TrainTeacher
from scorefield.training.identity import resolved

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def parsed(monkeypatch):
    """What a command line becomes; the command itself is not run."""

    def parse(*words):
        got = []
        name = words[0] if words[0] in cli.COMMANDS else " ".join(words[:2])
        command = cli.COMMANDS[name]
        found = cli.found
        monkeypatch.setattr(cli, "found", lambda place: got.append if place == command.main else found(place))
        try:
            cli.main([str(word) for word in words])
        finally:
            monkeypatch.setattr(cli, "found", found)
        return got[0]

    return parse


def write(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_the_config_of_a_run_gives_all_its_options_and_flags_override(parsed, tmp_path):
    config = replace(
        distill_options.toyworld_1step(), out=tmp_path / "run", betas=(0.5, 0.25), times=(712.0,), gan_weight=None,
        features=None, validation_prompts=("a mug", "a chair"), lora=True, deterministic=True,
    )  # fmt: skip
    file = write(tmp_path / "config.json", resolved(config))
    assert parsed("distill", "--config", file) == config
    assert parsed("distill", "--out", "other", f"--config={file}", "--steps", "9", "--no-lora") == replace(
        config, out=Path("other"), steps=9, lora=False
    )
    assert parsed("distill", "toyworld-1step", "--config", file) == config
    teacher = TrainTeacher(out=tmp_path / "teacher", unet_channels=(8, 16, 32), sigma_data=0.5)
    assert parsed("teacher", "--config", write(tmp_path / "t.json", resolved(teacher))) == teacher


def test_a_file_of_a_few_values_stands_between_preset_and_flags(parsed, tmp_path):
    file = write(tmp_path / "mine.yaml", "# mine\nsteps: 7\nbatch-size: 3\nstudent_lr: 1e-4\nbetas: [0, 0.9]\n")
    usual = distill_options.toyworld_4step()
    expected = replace(usual, steps=7, batch_size=3, student_lr=1e-4, betas=(0.0, 0.9))
    assert parsed("distill", "toyworld-4step", "--config", file) == expected
    assert parsed("distill", "toyworld-4step", "--config", file, "--steps", "8") == replace(expected, steps=8)
    file = write(tmp_path / "named.yml", "preset: digits\nsteps: 7\n")
    assert parsed("distill", "--config", file) == replace(distill_options.digits(), steps=7)
    file = write(tmp_path / "texts.yml", "prompts: prompts.txt\n")
    assert parsed("distill", "--config", file).preset == "text", "as --prompts on the command line"


def test_values_that_move_over_a_run_are_read_as_on_the_command_line(parsed, tmp_path):
    file = write(
        tmp_path / "ramps.yml", "prompt: a mug\nguidance: 50:20\nlearning_rate: 0.01\nt_high: [0.9, 0.5]\n"
    )
    scene = parsed("sds", "--config", file)
    assert (scene.guidance, scene.learning_rate, scene.t_high) == ((50.0, 20.0), (0.01, 0.01), (0.9, 0.5))
    assert parsed("sds", "toyworld", "a mug", "--guidance", "3:1", "--opacity", "2").guidance == (3.0, 1.0)


def test_names_of_earlier_versions_are_read(parsed, tmp_path):
    file = write(
        tmp_path / "old.json", {"prompts": "p.txt", "negative": "blur", "teacher_size": 64, "guidance": 2.0}
    )
    options = parsed("distill", "--config", file)
    assert (options.negative_prompt, options.size) == ("blur", 64)


def test_what_a_command_needs_may_stand_in_the_file(parsed, tmp_path, capsys):
    file = write(tmp_path / "draw.json", {"teacher": "toyworld", "prompts": ["a mug"], "num_images": None})
    assert parsed("sample", "--config", file) == Sample(teacher="toyworld", prompts=("a mug",))
    with pytest.raises(SystemExit) as stop:
        parsed("evaluate", "--config", write(tmp_path / "e.json", {"features": "runs/f"}), "--reference", "real")
    assert stop.value.code == 2
    assert "--generated" in capsys.readouterr().err
    got = parsed("evaluate", "--config", tmp_path / "e.json", "--reference", "real", "--generated", "made")
    assert got == Evaluate(generated="made", reference="real", features=Path("runs/f"))


@pytest.mark.parametrize(("values", "said"), [
    ({"stepz": 5}, "stepz is no option of this command. Did you mean steps?"),
    ({"qqq": 5}, "qqq is no option of this command. --help lists"),
    ({"steps": "many"}, "steps must be a whole number; got 'many'"),
    ({"steps": 1.5}, "steps must be a whole number; got 1.5"), ({"steps": True}, "steps must be a whole number"),
    ({"flip": 1}, "flip must be true or false; got 1"), ({"features": 3}, "features must be a path or null"),
    ({"learning_rate": "fast"}, "learning_rate must be a number; got 'fast'"),
    ({"precision": "fp8"}, "precision must be one of no, bf16; got 'fp8'"),
    ({"unet_channels": 3}, "unet_channels must be a list, each a whole number; got 3"),
    ({"unet_channels": [3, "x"]}, "unet_channels must be a list"), ({"data": [1]}, "data must be a text or null"),
    ([1, 2], "must hold options by name"), ("{", "cannot be read"), ('{"steps": NaN}', "cannot be read"),
])  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_and_nothing_is_run(parsed, tmp_path, capsys, values, said):
    file = write(tmp_path / "config.json", values)
    with pytest.raises(SystemExit) as stop:
        parsed("teacher", "--config", file)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: --config {file}")
    assert said in printed


@pytest.mark.parametrize(("words", "said"), [
    (["--config"], "--config needs a file"), (["--config", "--steps", "3"], "--config needs a file"),
    (["--config", "a", "--config=b"], "takes one file; got a, b"),
    (["--config", "bad.yaml"], "bad.yaml is no YAML"), (["--config", "gone.json"], "gone.json cannot be read"),
    (["digits", "--config", "auto.json"], "is of the preset auto, and the command names digits"),
    (["--config", "odd.json"], "is of the preset 'odd', which `scorefield distill` lacks"),
])  # fmt: skip
def test_what_is_wrong_with_the_option_is_said(parsed, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.yaml", "a: [1")
    write(tmp_path / "auto.json", {"preset": "auto"})
    write(tmp_path / "odd.json", {"preset": "odd"})
    with pytest.raises(SystemExit) as stop:
        parsed("distill", *words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_words_keep_their_order():
    assert take_config(["a", "--config", "x", "--steps", "-3"]) == (["a", "--steps", "-3"], Path("x"))
    assert take_config(["--configs", "x"]) == (["--configs", "x"], None)


def test_a_misspelt_key_is_answered_before_torch_is_imported(tmp_path):
    write(tmp_path / "c.yaml", "stepz: 3\n")
    program = (
        "import sys\n"
        "from scorefield.cli import main\n"
        "try:\n"
        f"    main(['distill', '--config', {str(tmp_path / 'c.yaml')!r}])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 2\n"
        "assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Did you mean steps?" in result.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_of_every_command_can_stand_in_a_file(command, tmp_path):
    """What a command writes as its config is read back as it was."""
    options = cli.found(cli.COMMANDS[command].options)
    if command in ("sample", "evaluate", "export", "push", "toyworld students"):
        needed = {
            "sample": {"teacher": "x"}, "evaluate": {"generated": "a", "reference": "b", "features": Path("c")},
            "toyworld students": {"students": (Path("a"),)}, "export": {"run": Path("a")},
            "push": {"run": Path("a")},
        }[command]  # fmt: skip
        config = options(**needed)
    else:
        config = options()
    file = write(tmp_path / "config.json", resolved(config))
    assert options(**read_config(file, options)) == config
