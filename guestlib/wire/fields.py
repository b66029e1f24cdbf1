"""Typed access to the JSON objects that the host sends.

A field that is missing or of the wrong type is a `TransportError`: the other end speaks another protocol.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

from guestlib.errors import TransportError

_NONSENSE: Final = "the host's answer has an unexpected shape"


class Fields:
    """Typed access to a JSON object."""

    __slots__ = ("_object",)

    def __init__(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise TransportError(_NONSENSE)
        self._object: dict[str, Any] = value

    def text(self, name: str) -> str:
        value = self._object.get(name)
        if not isinstance(value, str):
            raise TransportError(_NONSENSE)
        return value

    def optional_text(self, name: str) -> str | None:
        return None if self._object.get(name) is None else self.text(name)

    def number(self, name: str) -> int:
        value = self._object.get(name)
        if type(value) is not int or value < 0:
            raise TransportError(_NONSENSE)
        return value

    def optional_number(self, name: str) -> int | None:
        return None if self._object.get(name) is None else self.number(name)

    def truth(self, name: str) -> bool:
        value = self._object.get(name)
        if not isinstance(value, bool):
            raise TransportError(_NONSENSE)
        return value

    def optional_truth(self, name: str) -> bool:
        """False if it is not there."""
        return False if self._object.get(name) is None else self.truth(name)

    def data(self, name: str) -> bytes:
        try:
            return base64.b64decode(self.text(name), validate=True)
        except (binascii.Error, ValueError):
            raise TransportError(_NONSENSE) from None

    def optional_data(self, name: str) -> bytes | None:
        return None if self._object.get(name) is None else self.data(name)

    def items(self, name: str) -> list[Any]:
        value = self._object.get(name)
        if not isinstance(value, list):
            raise TransportError(_NONSENSE)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise TransportError(_NONSENSE)
        return tuple(values)

    def datas(self, name: str) -> tuple[bytes, ...]:
        return tuple(Fields({"": value}).data("") for value in self.items(name))

    def truths(self, name: str) -> tuple[bool, ...]:
        return tuple(Fields({"": value}).truth("") for value in self.items(name))

    def optional_texts(self, name: str) -> tuple[str, ...]:
        return () if self._object.get(name) is None else self.texts(name)

    def object(self, name: str) -> Fields:
        return Fields(self._object.get(name))

    def optional_object(self, name: str) -> Fields | None:
        return None if self._object.get(name) is None else self.object(name)

    def text_map(self, name: str) -> dict[str, str]:
        value = self._object.get(name)
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise TransportError(_NONSENSE)
        return dict(value)

    def number_map(self, name: str) -> dict[str, float]:
        value = self._object.get(name)
        if not isinstance(value, dict) or not all(type(item) in (int, float) for item in value.values()):
            raise TransportError(_NONSENSE)
        return dict(value)
