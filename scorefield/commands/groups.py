"""Options by subject: the base classes of an option class are its groups, and --help shows each in its own box.

The classes stay flat for those who use them: ``config.gan_weight``, not ``config.gan.weight``. The parser is given
the same options nested, with flat flags.
"""

import dataclasses
import types
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

C = TypeVar("C")


def parse(
    options: type[C],
    arguments: Sequence[str],
    *,
    prog: str | None,
    description: str | None,
    default: C | None = None,
) -> C:
    """Return the options that the words give.

    Args:
        options: a dataclass; those of its base classes that have options are groups, titled by their docstrings.
        arguments: the words of a command line.
        prog: the command, for --help.
        description: the text above the options in --help.
        default: values of the options that the words do not give; by default those of the class.

    Exits with 0 for --help and with 2 for words that are no options.
    """
    nested: Any = tyro.cli(
        _nested(options, default), args=arguments, prog=prog, description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )  # fmt: skip
    values: dict[str, Any] = {}
    for name, value in vars(nested).items():
        values.update(vars(value) if dataclasses.is_dataclass(value) else {name: value})
    return options(**values)


def group_of(options: type, name: str) -> type:
    """Return the class that is the group of an option: the first one that had it, whoever changed its default."""
    return [part for part in options.__mro__ if name in vars(part).get("__annotations__", {})][-1]


def _nested(options: type, default: Any) -> type:
    """Return the options as a dataclass that holds one dataclass for each group; ungrouped ones come first."""
    hints, texts = get_type_hints(options, include_extras=True), _texts(options)
    parts: dict[type, list[tuple[str, Any, Any]]] = {part: [] for part in options.__mro__}
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        value = field.default if default is None else getattr(default, field.name)
        described = [tyro.conf.arg(help=texts.get(field.name, ""), metavar=_metavar(kind))]
        if value in (None, "", ()):  # the text says what that means
            described.append(tyro.conf.arg(help_behavior_hint=""))
        made = dataclasses.field() if value is dataclasses.MISSING else dataclasses.field(default=value)
        parts[group_of(options, field.name)].append((field.name, Annotated[kind, *described], made))
    fields = parts.pop(options)
    for part, inside in parts.items():
        if inside:
            name = part.__name__.removesuffix("Options").lower()
            group = dataclasses.make_dataclass(part.__name__, inside, frozen=True, kw_only=True)
            group.__doc__ = (part.__doc__ or "").partition("\n\n")[0]
            needed = any(field.default is dataclasses.MISSING for _, _, field in inside)
            fields.append((name, group, dataclasses.field() if needed else dataclasses.field(default=group())))
    return dataclasses.make_dataclass(options.__name__, fields, frozen=True, kw_only=True)


def _texts(options: type) -> dict[str, str]:
    """Return what each option is for, on one line: --help wraps it to the width of the terminal."""
    texts: dict[str, str] = {}
    for part in reversed(options.__mro__[:-1]):
        for found in docstring_parser.parse_from_object(part).params:
            if found.description:
                texts[found.arg_name] = " ".join(found.description.split())
    return texts


def _metavar(kind: Any) -> str | None:
    """INT for ``int | None``, which tyro would show as {None}|INT; None for what it shows well."""
    if get_origin(kind) is Annotated:
        return _metavar(get_args(kind)[0])
    inner = [one for one in get_args(kind) if one is not types.NoneType]
    if get_origin(kind) in (Union, types.UnionType) and len(inner) == 1 and isinstance(inner[0], type):
        return {"str": "STR", "int": "INT", "float": "FLOAT"}.get(inner[0].__name__, inner[0].__name__.upper())
    return None
