"""JSON of values in files: names and variables may hold bytes that are no UTF-8, which `msgspec` alone does not take."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def encoded(value: msgspec.Struct | Mapping[str, Any]) -> bytes:
    """Return `value` as JSON: bytes that are no UTF-8 as escapes, which only `json` reads."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value)).encode()


def decoded(data: bytes, kind: type[T]) -> T:
    """Return the value that `encoded` has made `data` of.

    Raises
    ------
    msgspec.DecodeError, UnicodeDecodeError
        If it is none of that kind.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError:
        with contextlib.suppress(ValueError, msgspec.MsgspecError):
            return msgspec.convert(json.loads(data), kind, str_keys=True)
        raise
