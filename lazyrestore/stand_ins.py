"""Libraries without what they import and the command line never uses, which is half of their time.

Facts: click, msgspec and socket import parts of the standard library for types and services that no command here uses,
8 ms beside 12 for the bare interpreter. click wants inspect (with ast, dis and tokenize) for two small functions,
gettext for messages that nobody has translated; both want uuid, which asks platform for the name of the system, and the
Python half of datetime, whose classes are all in `_datetime`. msgspec tries typing_extensions, and is content without.
socket wants selectors and array for functions that nobody calls. msgspec wants decimal (with numbers) and uuid, 1.7 ms,
to know their types when it meets them; no record has any. And it tries a typing.ForwardRef, to learn what that takes:
the first compile() of a process, which makes the 150 types of Python's syntax, 0.8 ms. typing wants re, 1.5 ms, for the
names of two types, and msgspec for patterns that no record has. concurrent.futures wants logging, with traceback and
textwrap, 3 ms, for what does not happen.

Choice: while one of them is imported, stand-ins take the places of these modules. A stand-in answers what is asked at
import; whatever else it is asked for, then or later, it takes from the real module. So a click or msgspec that wants
more works, only slower. Only decimals and UUIDs msgspec does not know then, and says so when it meets one. Afterwards
`sys.modules` is as it was: every other import gets the real one.

Cost: it happens only in a process that runs the command line, and only for modules that are not imported yet. click's
messages cannot be translated there; nobody has. typing.Pattern and typing.Match are nobody's types there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from types import FunctionType, ModuleType


class StandIn(ModuleType):
    """A module with a few names of its own; the others are the real module's, which is imported when one is needed."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # of the machinery of imports
            raise AttributeError(name)
        standing = sys.modules.get(self.__name__)
        if isinstance(standing, StandIn):
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


def bring(library: str) -> None:
    """Import `library` with stand-ins for what is not imported yet. Raises ImportError."""
    _import("typing", ("re",))
    if library != "msgspec":
        _import(library, _NAMES)
        return
    import typing

    forward = typing.ForwardRef
    typing.ForwardRef = _Nothing  # type: ignore[misc, assignment]
    try:
        _import(library, (*_NAMES, *_TYPES, "re"))
    finally:
        typing.ForwardRef = forward  # type: ignore[misc]


def _import(library: str, names: Iterable[str]) -> None:
    standing = {name: _made(name) for name in names if name not in sys.modules}
    sys.modules.update(standing)  # type: ignore[arg-type]  # None: it is not there
    try:
        import_module(library)
    except ImportError:  # it needs one for more than a stand-in can give
        _remove(standing)
        import_module(library)
    finally:
        _remove(standing)


def _made(name: str) -> ModuleType | None:
    if name == "typing_extensions":
        return None  # an import says that it is not installed
    if name == "datetime":
        return import_module("_datetime")
    module = StandIn(name)
    vars(module).update(_ANSWERS.get(name) or _TYPES.get(name, {}))
    return module


def _remove(standing: dict[str, ModuleType | None]) -> None:
    for name, module in standing.items():
        if name in sys.modules and sys.modules[name] is module:
            del sys.modules[name]


class _Nothing:
    """What takes the place of types that nothing has that is encoded or decoded."""

    unknown = None  # of uuid.SafeUUID

    def __init__(self, *_: object, **__: object) -> None:
        pass  # as a typing.ForwardRef that is tried


class _Logger:
    """A real one, as soon as it has something to log."""

    def __init__(self, name: str) -> None:
        self._name = name

    def addHandler(self, handler: object) -> None:  # logging's name
        pass

    def __getattr__(self, name: str) -> object:
        return getattr(import_module("logging").getLogger(self._name), name)


def _is_function(value: object) -> bool:
    return isinstance(value, FunctionType)


def _untranslated(message: str) -> str:
    return message


def _untranslated_number(singular: str, plural: str, number: int) -> str:
    return singular if number == 1 else plural


def _compile(pattern: str) -> object:
    return import_module("re").compile(pattern)


def _system() -> str:
    return os.uname().sysname


def cleandoc(text: str) -> str:
    """inspect.cleandoc: `text` without the indentation that its lines but the first share, nor empty lines around."""
    first, *rest = text.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip()), default=0)
    lines = [first.lstrip(" "), *(line[margin:] for line in rest)]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return "\n".join(lines)


_ANSWERS: dict[str, dict[str, object]] = {
    "inspect": {"cleandoc": cleandoc, "isfunction": _is_function},
    "gettext": {"gettext": _untranslated, "ngettext": _untranslated_number},
    "platform": {"system": _system},
    "logging": {"getLogger": _Logger, "StreamHandler": _Nothing},
    "re": {"Pattern": _Nothing, "Match": _Nothing, "compile": _compile},
}
_TYPES: dict[str, dict[str, object]] = {
    "decimal": {"Decimal": _Nothing},
    "uuid": {"UUID": _Nothing, "SafeUUID": _Nothing},
}
_NAMES = (
    "inspect",
    "gettext",
    "platform",
    "logging",
    "datetime",
    "typing_extensions",
    "selectors",
    "array",
    "msgspec.inspect",
    "msgspec.json",
    "msgspec.toml",
    "msgspec.yaml",
)
