"""Options of an earlier run, or of a file of one's own, as the defaults of a command: --config FILE.

Importing this module imports no torch: a misspelt option in a file is answered at once.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from scorefield.files import load_json, read_text

C = TypeVar("C")

HELP = (
    "Take the values of a JSON or YAML file for defaults, such as the config.json of an earlier run. Options that "
    "are given beside it count."
)

OLD_NAMES = {"negative": "negative_prompt", "teacher_size": "size"}
"""Names that options had in earlier versions, and have in the config.json of runs of then."""

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def take_config(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the words of a command without ``--config FILE``, and the file, if one is named.

    Raises ``ValueError`` where no file follows, or more than one is named.
    """
    left, files, coming = list[str](), list[str](), iter(words)
    for word in coming:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            left.append(word)
            continue
        value = value if equals else next(coming, "")
        if not value or (value.startswith("-") and not equals):
            raise ValueError("--config needs a file, such as runs/student/config.json.")
        files.append(value)
    if len(files) > 1:
        raise ValueError(f"--config takes one file; got {', '.join(files)}.")
    return left, Path(files[0]) if files else None


def read_config(file: Path, options: type) -> dict[str, Any]:
    """Return the values in a JSON or YAML file for the fields of a dataclass, each of its field's type.

    Raises ``ValueError`` for a file that cannot be read, a key that is no option, naming the nearest, and a value
    of another type.
    """
    content = _content(file)
    if not isinstance(content, Mapping):
        raise ValueError(f"--config {file} must hold options by name; got {_shown(content)}.")
    kinds, values = get_type_hints(options, include_extras=True), {}
    known = [field.name for field in dataclasses.fields(options)]
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = name if name in known else OLD_NAMES.get(name, name)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else " --help lists the options."
            raise ValueError(f"--config {file}: {key} is no option of this command.{hint}")
        try:
            values[name] = _converted(kinds[name], value)
        except TypeError:
            raise ValueError(
                f"--config {file}: {key} must be {_described(kinds[name])}; got {_shown(value)}."
            ) from None
    return values


def with_values(options: type[C], default: C | None, values: Mapping[str, Any]) -> C:
    """Return the defaults with the values of a file; what neither has, the command line must say."""
    if default is not None:
        return dataclasses.replace(default, **values)  # type: ignore[type-var]
    none = (dataclasses.MISSING, dataclasses.MISSING)
    fields: Any = dataclasses.fields(options)  # type: ignore[arg-type]
    needed = {one.name: tyro.MISSING for one in fields if (one.default, one.default_factory) == none}
    return options(**{**needed, **values})


def _content(file: Path) -> Any:
    try:
        if file.suffix.lower() not in (".yaml", ".yml"):
            return load_json(file)
        text = read_text(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {file} cannot be read: {str(error).rstrip('.')}.") from error
    import yaml  # with Accelerate, which needs it, too

    class Loader(yaml.SafeLoader):
        """YAML 1.1 takes 50:20 for 50 minutes and 20 seconds; here it stays the text that it is."""

    minutes = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")
    Loader.yaml_implicit_resolvers = {
        first: [("tag:yaml.org,2002:str", minutes), *found]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {file} is no YAML: {' '.join(str(error).split())}.") from error


def _converted(kind: Any, value: Any) -> Any:
    # ``value`` as a field of type ``kind`` holds it; TypeError where it cannot.
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        readers = [one for one in inner[1:] if isinstance(one, tyro.constructors.PrimitiveConstructorSpec)]
        if readers and isinstance(value, str | int | float) and not isinstance(value, bool):
            try:
                return readers[0].instance_from_str([str(value)])
            except ValueError:
                raise TypeError from None
        return _converted(inner[0], value)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _converted(next(one for one in inner if one is not type(None)), value)
    if origin is Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, list):
        parts = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(parts) == len(value):
            return tuple(map(_converted, parts, value))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as a text
        try:
            return float(value)
        except ValueError:
            raise TypeError from None
    number = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and (number or isinstance(value, float)):
        return float(value)
    if (kind is int and number) or (kind in (bool, str) and isinstance(value, kind)):
        return value
    raise TypeError


def _described(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _described(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _described(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        number = "" if inner[-1] is Ellipsis else f" of {len(inner)}"
        return f"a list{number}, each {_described(inner[0])}"
    return NAMES.get(kind, str(kind))


def _shown(value: Any) -> str:
    return repr(value)[:80]
