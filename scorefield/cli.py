"""The console command ``scorefield``: the first word says what to do, the next one may be a preset.

    scorefield distill toyworld-1step --out runs/student
    accelerate launch -m scorefield sds toyworld "a red mug"

Everything is named by strings and imported on demand: ``--help`` and a typo are answered without torch.
"""

import difflib
import importlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn


@dataclass(frozen=True)
class Command:
    """A command as it is listed, and where its parts are.

    Attributes:
        title: one sentence for the list of commands.
        options: module:class, a dataclass; the module imports no torch.
        main: module:function, options -> where the result is.
        presets: module:name of a mapping from names to functions that return options, or of a function of the
            command's words that returns one; empty for none. The first one is meant where none is named.
        check: module:function, options -> None, which raises ``ValueError`` for values that cannot work. Its
            module imports no torch, so that they are refused at once.
        folders: module:function, options -> folders that no other run may use; empty: --out of a training.
    """

    title: str
    options: str
    main: str
    presets: str = ""
    check: str = ""
    folders: str = ""


COMMANDS = {
    "demo": Command(
        "Train and distil a teacher of digits in minutes, and show the pictures.",
        "toyworld.options:Demo", "toyworld.demo:main", check="toyworld.options:check_demo",
        folders="toyworld.options:demo_folders",
    ),
    "teacher": Command(
        "Train a diffusion teacher of small images.",
        "scorefield.commands.options:TrainTeacher", "scorefield.commands.teacher:main",
        check="scorefield.commands.options:check_teacher",
    ),
    "distill": Command(
        "Turn a teacher into a generator of one or a few steps (DMD, DMD2).",
        "distill.options:Config", "distill.recipe:main", presets="distill.options:presets_for",
        check="distill.checks:check",
    ),
    "sds": Command(
        "Turn a prompt into a 3D scene (SDS, CSD, VSD).",
        "sds.options:Config", "sds.recipe:main", presets="sds.options:PRESETS", check="sds.options:check",
    ),
    "export": Command(
        "Export the scene of a finished run again, with another level, budget or texture.",
        "sds.export_options:ExportRun", "sds.runs:main", check="sds.export_options:check_export",
        folders="sds.export_options:export_folders",
    ),
    "control": Command(
        "Teach a model to follow hints such as edges (ControlNet).",
        "controlnet.options:Config", "controlnet.recipe:main", presets="controlnet.options:PRESETS",
        check="controlnet.options:check",
    ),
    "attack": Command(
        "Attack an image classifier, also through purification by a diffusion model (PGD, Diff-PGD).",
        "attack.options:Attack", "attack.recipe:main", presets="attack.options:PRESETS",
        check="attack.options:check",
    ),
    "robust": Command(
        "Train an image classifier that holds against attacks, on real and generated images (PGD, TRADES).",
        "attack.robust_options:Robust", "attack.robust_recipe:main", presets="attack.robust_options:PRESETS",
        check="attack.robust_options:check",
    ),
    "edit": Command(
        "Edit pictures by prompts (Prompt-to-Prompt, null-text, SDEdit, FlowEdit).",
        "edit.options:Config", "edit.recipe:main", presets="edit.options:PRESETS", check="edit.options:check",
    ),
    "sample": Command(
        "Draw images from a teacher or a student.",
        "scorefield.commands.options:Sample", "scorefield.commands.sample:main",
        check="scorefield.commands.options:check_sample",
    ),
    "features": Command(
        "Train a feature network on your own classes, for evaluate.",
        "scorefield.commands.options:TrainFeatures", "scorefield.commands.features:main",
        check="scorefield.commands.options:check_features",
    ),
    "evaluate": Command(
        "Measure the distance between two sets of images (Fréchet distance, KID).",
        "scorefield.commands.options:Evaluate", "scorefield.commands.evaluate:main",
        check="scorefield.commands.options:check_evaluate",
    ),
    "report": Command(
        "Make one page about a run, or several side by side, from their files alone.",
        "scorefield.commands.options:Report", "scorefield.commands.report:main",
        check="scorefield.commands.options:check_report",
    ),
    "play": Command(
        "Play with a teacher, its students and its adapter in the browser.",
        "scorefield.play.options:Play", "scorefield.commands.play:main",
        check="scorefield.play.options:check_play",
    ),
    "push": Command(
        "Put what a run made on the Hugging Face Hub, under a card of its figures.",
        "scorefield.commands.options:Push", "scorefield.commands.push:main",
        check="scorefield.commands.options:check_push",
    ),
    "toyworld evaluate": Command(
        "Measure the pipeline that ships, or another one of the toy world.",
        "toyworld.options:EvaluatePipeline", "toyworld.evaluate:main", check="toyworld.options:check_pipeline",
    ),
    "toyworld students": Command(
        "Measure students of the toy world's pipeline beside their teacher.",
        "toyworld.options:EvaluateStudents", "toyworld.students:main", check="toyworld.options:check_students",
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the words name; by default those of the command line. Exits with 2 for a wrong one."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return
    if words[0] == "--version":
        print(f"scorefield {importlib.import_module('scorefield').__version__}")
        return
    name = words[0] if words[0] in COMMANDS else " ".join(words[:2])
    if name not in COMMANDS:
        related = [command for command in COMMANDS if command.split()[0] == words[0]]
        if related and words[1:2] in (["-h"], ["--help"]):
            print(overview(related))
            return
        _refuse(words, related)
    _run(name, COMMANDS[name], words[len(name.split()) :])


def _run(name: str, command: Command, words: list[str]) -> None:
    options, default, values = found(command.options), None, dict[str, Any]()
    description, place = [options.__doc__], "scorefield.commands.configuration"
    try:
        words, file = found(f"{place}:take_config")(words)
        if file is not None:
            values = found(f"{place}:read_config")(file, options)
        if command.presets:
            presets, given = found(command.presets), [*words, *(f"--{name}" for name, x in values.items() if x)]
            presets = presets(given) if callable(presets) else presets
            words, default = choose(name, presets, words, values.get("preset"))
            description.append(described(name, presets))
        if file is not None:
            default = found(f"{place}:with_values")(options, default, values)
    except ValueError as error:
        _say(str(error))
    run = found("scorefield.commands.command:run")
    run(
        partial(_checked, command), options, "\n\n".join([*description, from_file(found(f"{place}:HELP"))]),
        arguments=words, prog=f"scorefield {name}", default=default,
        folders=found(command.folders) if command.folders else None,
    )  # fmt: skip


def _checked(command: Command, config: Any) -> Any:
    if command.check:
        found(command.check)(config)
    return found(command.main)(config)


def found(place: str) -> Any:
    """Return what module:name stands for."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def choose(
    name: str, presets: Mapping[str, Callable[[], Any]], words: Sequence[str], of_file: str | None = None
) -> tuple[list[str], Any]:
    """Return the words after the preset, and its values.

    Where none is named, it is that of the file of --config, or the first one. Exits with 2 for a first word that
    is no preset and no option. Raises ``ValueError`` for a file of another preset, or of none that there is.
    """
    if of_file is not None and of_file not in presets:
        raise ValueError(f"the file of --config is of the preset {of_file!r}, which `scorefield {name}` lacks.")
    if not words or words[0].startswith("-"):
        return list(words), (next(iter(presets.values())) if of_file is None else presets[of_file])()
    if words[0] in presets and of_file not in (None, words[0]):
        there = f"the preset {of_file}" if of_file else "no preset"
        raise ValueError(
            f"the file of --config is of {there}, and the command names {words[0]}. Leave one of them out."
        )
    if words[0] not in presets:
        near = difflib.get_close_matches(words[0], presets, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        known = ", ".join(preset for preset in presets if preset)
        _say(f"{words[0]!r} is no preset of `scorefield {name}`; expected one of {known}.{hint}")
    return list(words[1:]), presets[words[0]]()


def described(name: str, presets: Mapping[str, Callable[[], Any]]) -> str:
    """Return a list of the presets, for --help."""
    texts = {preset: (make.__doc__ or "").strip().partition("\n")[0] for preset, make in presets.items() if preset}
    width = max(map(len, texts))
    lines = [
        wrapped(text.replace("``", "`"), f"  {preset:{width}}  ", " " * (width + 4))
        for preset, text in texts.items()
    ]
    return "\n".join([f"Presets (scorefield {name} PRESET ...):", *lines])


def from_file(text: str) -> str:
    """Return what --help says of --config; the lines are indented, since the parser joins others."""
    return "\n".join(["Options from a file:", wrapped(text, "  --config FILE  ", " " * 17)])


def wrapped(text: str, first: str = "", rest: str = "") -> str:
    """Return a paragraph in lines as wide as the terminal, as the boxes of options are."""
    width = max(60, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def overview(names: Collection[str] = ()) -> str:
    """Return the list of commands, or of those with some ``names``."""
    names = names or COMMANDS
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {COMMANDS[name].title}" for name in names]
    before = (
        "usage: scorefield COMMAND [PRESET] [OPTIONS]",
        "",
        "A frozen diffusion model teaches something else.",
        "",
    )
    after = (
        "",
        "scorefield COMMAND --help says more. On several GPUs: accelerate launch -m scorefield COMMAND ...",
    )
    return "\n".join([*before, *lines, *after])


def _refuse(words: Sequence[str], related: Sequence[str]) -> NoReturn:
    if related:
        _say(f"`scorefield {words[0]}` is not complete; expected {' or '.join(related)} after scorefield.")
    near = difflib.get_close_matches(words[0], [name.split()[0] for name in COMMANDS], 1)
    _say(
        f"{words[0]!r} is no command; expected one of {', '.join(COMMANDS)}."
        + (f" Did you mean `scorefield {near[0]}`?" if near else "")
    )


def _say(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
