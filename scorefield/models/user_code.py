"""Functions that the user named as ``module:function``: the only foreign code that the scripts import.

Importing a module runs it, so the name has to come from the command line. A name that a file records, such as the
``denoiser.json`` of a downloaded folder, must never reach this module.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


def user_function(name: str) -> Callable[[], Any]:
    """Return the function that the user typed as ``module:function``; runs the module.

    ``name.py`` in the current folder comes before installed packages.

    Raises:
        ValueError: not of that form, no such module or function, or a module that fails on import.
    """
    module, colon, function = name.partition(":")
    if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"expected module:function, such as mine:teacher for mine.py; got {name!r}.")
    try:
        found = getattr(_module(module), function)
    except SystemExit as error:
        raise ValueError(f"{name}: its module ends the program where it should only define things.") from error
    except (ImportError, AttributeError, ValueError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: no such function, or its module fails ({error}).") from error
    if not callable(found):
        raise ValueError(f"{name} must be a function; got a {type(found).__name__}.")
    return found


def call(name: str) -> Any:
    """Return what the function returns. Raises ``ValueError`` as :func:`user_function`, and if the call fails.

    Other exceptions are faults of the user's code, which needs their traceback.
    """
    function = user_function(name)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{name} must be a function that is called without arguments ({error}).") from error
    except ValueError:  # some builtins do not say
        pass
    try:
        return function()
    except SystemExit as error:
        raise ValueError(f"{name} ends the program; expected a function that returns a model.") from error
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise ValueError(f"{name} fails: {error}") from error


def _module(name: str) -> ModuleType:
    _search_here()
    file = Path.cwd() / f"{name}.py"
    return _from_file(name, file) if file.is_file() else importlib.import_module(name)


def _search_here() -> None:
    # For what the user's module imports from beside it.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _from_file(name: str, file: Path) -> ModuleType:
    # Under its own name where that is free, so that what the module imports may import it. A user's unet.py must
    # neither lose to ours nor take its place: it is registered under its path.
    known = sys.modules.get(name)
    taken = known is not None and not _is_of(known, file)
    key = f"{file.parent}/{name}" if taken else name
    if key in sys.modules:
        return sys.modules[key]
    spec = spec_from_file_location(key, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = sys.modules[key] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _is_of(module: ModuleType, file: Path) -> bool:
    origin = getattr(module, "__file__", None)
    return origin is not None and Path(origin).resolve() == file.resolve()


def code_of(name: str) -> str:
    """Return a hash of the file that the user's function is written in; empty where there is none."""
    try:
        file = inspect.getfile(user_function(name))
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""
