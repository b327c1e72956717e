"""Options by subject: parsed as one flat class, shown in boxes, refused before torch is imported."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from scorefield import cli
from scorefield.commands.groups import group_of, parse

ROOT = Path(__file__).parent.parent


def presets_of(command):
    """The presets of a command by name."""
    found = cli.found(cli.COMMANDS[command].presets)
    return found(()) if callable(found) else found


PRESETS = [(name, preset) for name, found in cli.COMMANDS.items() if found.presets for preset in presets_of(name)]

WRONG = [
    "attack", "attack toyworld --steps 0", "attack toyworld --epsilon -8", "attack toyworld --evaluations 1",
    "attack toyworld --region 0.5 0 0.2 1", "attack toyworld --strength 2", "attack --classifier a:b --data c",
    "attack toyworld --epsilon 8 8", "attack toyworld --methods autoattack --target mug",
    "robust digits --mix 0 --generated a", "robust --loss trades --epsilon 0", "robust --pseudo-label a:b",
    "robust digits --epsilon -1", "robust digits --shard 2 --dry-run", "robust --test-epsilon nan",
    "robust --generated a --mix 0.001", "robust --loss trades --no-random-start", "robust toyworld",
    "distill --gan-weight -1", "distill --ratio-range 3 2",
    "distill --prompts p.txt --channels grey",
    "sds toyworld", "sds toyworld mug --guidance -1:2", "sds toyworld mug --overhead 9",
    "sds toyworld mug --compile",
    "control toyworld-canny --prompt-drop 2", "control", "sample --teacher toyworld --steps 0",
    "sample --teacher toyworld --num-images -2", "teacher --dropout 1", "teacher --steps 0", "features --steps -1",
    "evaluate --generated a --reference b --features c --num-images 1", "demo --num-images 3",
    "edit", "edit --source a", "edit sdedit --source a --target b", "edit --source a --target b --cross-window 2",
    "edit --source a --target b --weights red", "edit --edits e.jsonl --source a", "edit recolor --source a",
    "toyworld evaluate --num-prompts 1", "toyworld students --students", "distill --no-such-flag",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """What moves it."""

    power: float = 1.0
    """Of the engine, a text that is long enough to be broken over two lines of the source, and that says what it
    means. It ends here."""
    fuel: str | None = None
    """Any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Car(Engine):
    """A car."""

    name: str
    """Its name."""
    power: float = 2.0
    seats: tuple[int, ...] = (2, 3)
    """People in each row."""


def test_the_options_are_those_of_the_flat_class():
    assert parse(Car, ["--name", "a"], prog=None, description=None) == Car(name="a")
    words = ["--fuel", "oil", "--seats", "1", "--name", "b", "--power", "3"]
    assert parse(Car, words, prog=None, description=None) == Car(name="b", fuel="oil", seats=(1,), power=3.0)
    usual = Car(name="c", seats=(4,), fuel="gas")
    assert parse(Car, ["--power", "5"], prog=None, description=None, default=usual) == dataclasses.replace(
        usual, power=5.0
    )
    assert [group_of(Car, name) for name in ("power", "fuel", "name", "seats")] == [Engine, Engine, Car, Car]


@pytest.mark.parametrize(("command", "preset"), PRESETS)
def test_every_preset_survives_the_parser(command, preset):
    options, default = cli.found(cli.COMMANDS[command].options), presets_of(command)[preset]()
    parsed = parse(options, ["--out", "elsewhere"], prog=None, description=None, default=default)
    assert parsed == dataclasses.replace(default, out=Path("elsewhere"))


def test_help_has_a_box_for_each_group_and_wraps_its_texts_to_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "240")
    with pytest.raises(SystemExit) as stop:
        parse(Car, ["--help"], prog="car", description=None)
    assert stop.value.code == 0
    own, _, engine = capsys.readouterr().out.partition("engine options")
    assert all(words in own for words in ("--name STR", "(required)", "--seats")), own
    assert "--power" not in own.partition("options")[2]
    assert all(words in engine for words in ("What moves it.", "--power FLOAT", "(default: 2.0)", "--fuel STR")), (
        engine
    )
    assert "source, and that says what it means. It ends here." in engine, "no break of the source is left"
    assert "None" not in own + engine


def test_wrong_values_are_refused_before_torch_is_imported(tmp_path):
    program = (
        "import sys\n"
        "from scorefield.cli import main\n"
        f"for line in {WRONG!r}:\n"
        "    try:\n"
        "        main(line.split())\n"
        "        code = 0\n"
        "    except SystemExit as stop:\n"
        "        code = stop.code\n"
        "    assert code == 2, (line, code)\n"
        "    assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys(), line\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir()), "nothing is written"
    assert result.stderr.count("error: ") >= len(WRONG) - 1


@pytest.mark.parametrize("ask", ["-h", "--help"])
def test_a_word_that_several_commands_begin_with_has_a_help_of_its_own(capsys, ask):
    cli.main(["toyworld", ask])
    said = capsys.readouterr().out
    assert [line.split("  ")[1] for line in said.splitlines() if line.startswith("  ")] == [
        name for name in cli.COMMANDS if name.startswith("toyworld")
    ]


def test_a_pipe_that_has_read_enough_is_no_fault():
    """As of ``scorefield distill --help | head -1``."""
    words = [sys.executable, "-m", "scorefield", "distill", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
