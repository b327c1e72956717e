"""Every option that a message names is an option of every command that can print the message."""

import ast
import dataclasses
import functools
import importlib
import re
import typing
from pathlib import Path

import pytest
import tyro

import scorefield.cli as cli
from scorefield.shipped import FUNCTIONS

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("scorefield", "distill", "sds", "controlnet", "edit", "attack", "toyworld", "train_scripts")
COMMANDS = {
    name: command for name, command in cli.COMMANDS.items() if name != "demo"
}  # whose trainings it gives all
SCRIPTS = ("train_circles", "train_flow_toyworld", "train_judge", "train_toyworld")

OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?![\w-])")
"""Those of `accelerate launch` have underscores."""


Key = tuple[str, str]
"""Module, and name of a function, class, method or constant in it."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What a function, or a constant, says, and which names it uses: plain ones, and those behind a dot."""

    said: frozenset[str]
    shipped: frozenset[str]
    names: frozenset[str]
    dotted: frozenset[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Module:
    """The parts of a file by name, methods among them, and what its imports mean: (module, name or "")."""

    parts: dict[str, Part]
    methods: dict[str, list[str]]
    imports: dict[str, Key]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "train_scripts" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_part(root: ast.AST) -> Part:
    nodes = list(ast.walk(root))
    docs = {id(one.value) for one in nodes if isinstance(one, ast.Expr)}
    constants = [one for one in nodes if isinstance(one, ast.Constant) and id(one) not in docs]
    texts = [one.value for one in constants if isinstance(one.value, str)]
    behind = [one for one in nodes if isinstance(one, ast.Attribute)]
    dotted = {(one.value.id if isinstance(one.value, ast.Name) else "", one.attr) for one in behind}
    names = {one.id for one in nodes if isinstance(one, ast.Name)}
    said = {option for text in texts for option in OPTION.findall(text)}
    kinds = {text.split()[0] for text in texts if text.split()} if "shipped" in names else set()
    return Part(frozenset(said), frozenset(kinds), frozenset(names), frozenset(dotted))


def read_module(path: Path) -> Module:
    tree, parts, methods, imports = ast.parse(path.read_text()), {}, {}, {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            parts[node.name] = read_part(node)
        elif isinstance(node, ast.ClassDef):
            inner = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            for one in inner:
                parts[f"{node.name}.{one.name}"] = read_part(one)
                methods.setdefault(one.name, []).append(f"{node.name}.{one.name}")
            begun = frozenset(f"{node.name}.{one.name}" for one in inner if one.name.startswith("__"))
            bases = frozenset(base.id for base in node.bases if isinstance(base, ast.Name))
            parts[node.name] = Part(frozenset(), frozenset(), begun | bases, frozenset())
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and node.value is not None:
                parts[target.id] = read_part(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {alias.asname or alias.name.split(".")[0]: (alias.name, "") for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return Module(parts, methods, imports)


@functools.cache
def read_all() -> dict[str, Module]:
    paths = [path for place in PLACES for path in (ROOT / place).rglob("*.py")]
    return {module_name(path): read_module(path) for path in paths}


def found(module: str, name: str) -> Key | None:
    """Where a name of a module is written, behind any number of imports."""
    modules = read_all()
    for _ in range(5):
        if f"{module}.{name}" in modules:
            return f"{module}.{name}", ""
        if module not in modules:
            return None
        if name in modules[module].parts:
            return module, name
        module, name = modules[module].imports.get(name, ("", ""))
        if not name:
            return (module, "") if module in modules else None
    return None


def reached(script: str) -> list[Key]:
    """All that a command may call: what its functions name, and any method of that name in what it reaches."""
    start = tuple(COMMANDS[script].main.split(":")) if script in COMMANDS else (script, "main")
    modules, seen, left = read_all(), set(), [start]
    called: set[str] = set()
    touched: set[str] = set()
    while left:
        module, name = left.pop()
        if (module, name) in seen or not name:
            continue
        seen.add((module, name))
        part = modules[module].parts[name]
        left += [key for one in part.names if (key := found(module, one))]
        left += [tuple(place.split(":")) for what, place in FUNCTIONS.items() if what.split()[0] in part.shipped]
        new_calls = set()
        for before, behind in part.dotted:
            place = found(module, before) if before else None
            if place is not None and not place[1]:
                left += [key for key in [found(place[0], behind)] if key]
            else:
                new_calls.add(behind)
        new_modules, new_calls = {module} - touched, new_calls - called
        touched, called = touched | new_modules, called | new_calls
        for one in touched:
            methods = modules[one].methods
            asked = methods.keys() & (called if one in new_modules else new_calls)
            left += [(one, full) for method in asked for full in methods[method]]
    return sorted(seen)


def options_of(script: str) -> set[str]:
    config = cli.found(COMMANDS[script].options) if script in COMMANDS else importlib.import_module(script).Config
    hints = typing.get_type_hints(config, include_extras=True)
    names = set()
    for field in dataclasses.fields(config):
        if tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ()):
            continue  # a word, and no option
        flag = field.name.replace("_", "-")
        names |= {flag, f"no-{flag}"} if hints[field.name] is bool else {flag}
        for extra in getattr(hints[field.name], "__metadata__", ()):
            aliases = getattr(extra, "aliases", None) or ()
            names |= {alias.lstrip("-") for alias in aliases}
    return names | {"help"}


NEVER_SAID = {
    # Options that are passed on by another name, or not at all.
    "evaluate": {"data", "size", "channels", "memory-limit"}, "sample": {"data", "num-prompts"},
    "teacher": {"guidance"},
    # The toy world's judge sees one size.
    "toyworld evaluate": {"size"}, "toyworld students": {"size"},
    # The message says which commands have it.
    "control": {"network"}, "edit": {"network"},
    "attack": {"network", "channels", "memory-limit"},
    # A drawing is converted, and a page tells what `scorefield sds --out` makes.
    "play": {"network", "convert", "out"},
    # Other commands have them: the one that made the run, and those of the card. It loads no model.
    "push": {"out", "teacher", "num-images", "local-dir", "variant", "allow-pickle"},
    # They read the config.json of a run as --config is read, and leave that word out; a report that is made again
    # says what the run was doubted for, and which seed it chose.
    "sds": {"network", "data", "num-prompts", "config"},
    "export": {"config", "teacher", "negative-prompt", "guidance", "seed"},
}  # fmt: skip
"""Options that a command says nothing of, though it calls what could."""


@pytest.mark.parametrize("script", [*COMMANDS, *SCRIPTS])
def test_options_that_messages_name_exist(script):
    options, modules = options_of(script), read_all()
    lacking = [
        f"{module}.{name} names --{option}"
        for module, name in reached(script)
        for option in modules[module].parts[name].said - options - NEVER_SAID.get(script, set())
        if not module.startswith("scorefield.report.")  # whose pages name commands, see test_run_report.py
    ]
    assert not lacking
