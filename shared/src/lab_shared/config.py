"""Frozen dataclasses as configuration: strict JSON both ways, and presets on the command line. No torch.

msgspec and pydantic accept a misspelt key silently; here it is an error that names the likely one.
"""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from lab_shared.errors import UserError
from lab_shared.ranges import Range

T = TypeVar("T")
_NUMBERS = {int: "a whole number", float: "a finite number"}


class ConfigError(UserError):
    """A configuration that does not fit its dataclass; the message gives the dotted path of the value."""


def to_json(config: Any) -> str:
    """The dataclass `config` as indented JSON, checked by reading it back.

    Infinite and NaN floats become the strings "inf", "-inf" and "nan", because JSON has no such numbers.
    Raises ConfigError when a value does not have its field's type or range (dataclasses themselves do not check) and
    TypeError when `config` is not a dataclass instance or a field's annotation is one JSON cannot hold.
    """
    if not is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_json takes a dataclass instance, got {config!r}")
    text = json.dumps(_spell_out_non_finite(asdict(config)), indent=2, allow_nan=False, ensure_ascii=False)
    from_json(type(config), text)
    return text + "\n"


def from_json(cls: type[T], text: str) -> T:
    """An instance of the dataclass `cls` from JSON text, without any guessing.

    Unknown keys are refused with the closest known name; a bool is no int, an int is taken for a float but
    not the other way round, a Literal must match in value and type, a number lie within the `Range` of its type.
    Absent keys take the field's default, so that old runs stay readable after a field is added; a field without
    default must be there.

    Raises ConfigError for all of these, for duplicate keys and for text that is not JSON.
    """
    try:
        data = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
        return _decode(cls, data, "")
    except UserError:
        raise
    # A number of thousands of digits, lists in lists in lists, and values that the class's own arithmetic cannot take.
    except (ValueError, RecursionError, ArithmeticError) as error:
        raise ConfigError(f"not JSON of a configuration: {error}") from error


def read_config(cls: type[T], path: Path) -> T:
    """The configuration in a file. Raises ConfigError, naming the file, also when it is missing or no text."""
    try:
        return from_json(cls, path.read_text(encoding="utf-8"))
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def preset_cli(presets: Mapping[str, tuple[str, T]], argv: Sequence[str], prog: str) -> T:
    """Parse `PRESET --section.field value ...` into a copy of that preset with the given fields replaced.

    presets: name -> (one-line description, configuration). argv: arguments without the program's name. prog:
    what usage messages call the program. Wrong usage prints a message naming the flag and raises
    SystemExit(2).
    """
    import tyro

    return tyro.extras.overridable_config_cli(presets, prog=prog, args=list(argv))


def field_names(config: Any, path: str = "") -> list[str]:
    """The dotted names of all fields of a dataclass instance that are no dataclasses themselves."""
    names = []
    for f in fields(config):
        value, name = getattr(config, f.name), _join(path, f.name)
        names += field_names(value, name) if is_dataclass(value) else [name]
    return names


def with_field(config: T, name: str, value: Any) -> T:
    """A copy of the dataclass `config` with the field of this dotted name replaced: with_field(c, "optim.lr", 1e-3)."""
    section, _, rest = name.partition(".")
    inner: Any = config
    return replace(inner, **{section: with_field(getattr(config, section), rest, value) if rest else value})


def _decode(hint: Any, data: Any, path: str) -> Any:
    """`data` as read from JSON -> a value of type `hint`; `path` is where it stands, for messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _decode(args[0], data, path)
        for numbers in args[1:]:
            if isinstance(numbers, Range) and value not in numbers:
                _wrong(path, f"{_NUMBERS[args[0]]} {numbers}", data)
        return value
    if is_dataclass(hint):
        return _decode_dataclass(hint, data, path)
    if hint is Any:
        return data
    if hint is None or hint is type(None):
        return None if data is None else _wrong(path, "null", data)
    if hint is float:
        return _decode_float(data, path)
    if hint in (bool, int, str):
        # type() and not isinstance(): True is an instance of int.
        return data if type(data) is hint else _wrong(path, hint.__name__, data)
    if origin is Literal:
        if any(type(data) is type(choice) and data == choice for choice in args):
            return data
        return _wrong(path, f"one of {', '.join(map(repr, args))}{_did_you_mean(data, args)}", data)
    if origin in (Union, types.UnionType):
        return _decode_union(args, data, path)
    if origin in (list, tuple):
        return _decode_sequence(origin, args, data, path)
    if origin is dict and args[0] is str:
        if not isinstance(data, dict):
            _wrong(path, "an object", data)
        return {key: _decode(args[1], value, _join(path, key)) for key, value in data.items()}
    raise TypeError(f"{path or 'the configuration'}: {hint!r} is not a type a configuration file can hold")


def _decode_dataclass(cls: Any, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        _wrong(path, f"an object with the fields of {cls.__name__}", data)
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {f.name: f for f in fields(cls) if f.init}
    for key in data:
        if key not in known:
            raise ConfigError(
                f"unknown key {_join(path, key)!r:.100}{_did_you_mean(key, known)}; "
                f"{cls.__name__} has {', '.join(known)}"
            )
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"missing key {_join(path, name)!r}: {cls.__name__} gives it no default")
    return cls(**{key: _decode(hints[key], value, _join(path, key)) for key, value in data.items()})


def _decode_float(data: Any, path: str) -> float:
    if type(data) in (int, float):
        return float(data)
    if data in ("inf", "-inf", "nan"):
        return float(data)
    return _wrong(path, "a number", data)


def _decode_union(options: tuple[Any, ...], data: Any, path: str) -> Any:
    concrete = [option for option in options if option is not type(None)]
    if data is None and len(concrete) < len(options):
        return None
    if len(concrete) == 1:
        return _decode(concrete[0], data, path)
    complaints = []
    # int before float: 1 must stay an int in `int | float`, whatever the order in the annotation.
    for option in sorted(concrete, key=lambda option: option is float):
        try:
            return _decode(option, data, path)
        except ConfigError as error:
            complaints.append(str(error))
    raise ConfigError(" | ".join(complaints))


def _decode_sequence(kind: type, args: tuple[Any, ...], data: Any, path: str) -> Any:
    if not isinstance(data, list):
        _wrong(path, "a list", data)
    if kind is list or (len(args) == 2 and args[1] is Ellipsis):
        element_hints = [args[0]] * len(data)
    else:
        element_hints = [] if args == ((),) else list(args)
        if len(element_hints) != len(data):
            _wrong(path, f"a list of {len(element_hints)} elements", data)
    return kind(_decode(hint, x, f"{path}[{i}]") for i, (hint, x) in enumerate(zip(element_hints, data, strict=True)))


def _wrong(path: str, expected: str, data: Any) -> Any:
    found = json.dumps(data, default=repr)
    found = found if len(found) <= 80 else found[:77] + "..."
    raise ConfigError(f"{path or 'the configuration'}: expected {expected}, found {found}")


def _did_you_mean(word: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    for key, count in counts.items():
        if count > 1:
            raise ConfigError(f"key {key!r:.100} appears {count} times in one object")
    return dict(pairs)


def _refuse_constant(word: str) -> Any:
    raise ConfigError(f'{word} is not JSON: write "inf", "-inf" or "nan" (with the quotes)')


def _spell_out_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _spell_out_non_finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spell_out_non_finite(x) for x in value]
    return value
