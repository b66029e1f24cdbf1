"""Operations and results in the canonical form of `guestlib.attest.canonical`, from their structs.

What a request's commitment is over: `{"args":{…},"op":"Name"}` without the arguments that have their
default, and the `ok` object of its answer. That a guest gets the same bytes from what it sent and
received is a property that `tests/ipc/test_canonical.py` checks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from hostd.ipc.operations import BY_NAME

if TYPE_CHECKING:
    from hostd.ipc.operations import Operation

_ENCODE: Final = msgspec.json.Encoder(order="sorted").encode
_ABSENT: Final = object()


def _fields(cls: type[msgspec.Struct]) -> tuple[tuple[str, Any], ...]:
    """Names and defaults; `_ABSENT` where a value is required."""
    found: list[tuple[str, Any]] = []
    for field in msgspec.structs.fields(cls):
        default: Any = _ABSENT if field.default is msgspec.NODEFAULT else field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        found.append((field.name, default))
    return tuple(found)


_TABLE: Final = {cls: (name, _fields(cls)) for name, cls in BY_NAME.items()}
_PARTS: Final[dict[type[msgspec.Struct], tuple[tuple[str, Any], ...]]] = {}


def request_bytes(operation: Operation) -> bytes:
    """The canonical bytes of a request."""
    name, fields = _TABLE[type(operation)]
    return _ENCODE({"args": _args(operation, fields), "op": name})


def _args(struct: msgspec.Struct, fields: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    args = {}
    for name, default in fields:
        value = getattr(struct, name)
        if value is not None and (default is _ABSENT or value != default):
            args[name] = [_part(item) for item in value] if type(value) in (tuple, list) else value
    return args


def _part(item: Any) -> Any:
    """One item of a list: those of batch operations are structs with defaults of their own."""
    if not isinstance(item, msgspec.Struct):
        return item
    fields = _PARTS.get(type(item))
    if fields is None:
        fields = _PARTS[type(item)] = _fields(type(item))
    return _args(item, fields)


def answer_bytes(result: msgspec.Struct) -> bytes:
    """The canonical bytes of an answer's `ok` object."""
    return _ENCODE(result)
