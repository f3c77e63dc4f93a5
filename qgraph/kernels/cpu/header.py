"""`region.h` read by Python, so that both sides of a call have one description of its data."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from types import SimpleNamespace
from typing import Any

_TYPES: dict[str, Any] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
}


@cache
def header() -> Any:
    """The header's names without `QG_` and `qg_`: constants, and classes of ctypes for structs.

    >>> header().Ref(buffer=3, dtype=header().F32, offset=64).offset
    64
    """
    text = (resources.files("qgraph.kernels.cpu") / "region.h").read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found: dict[str, Any] = dict(_constants(text))
    types = dict(_TYPES)
    for body, name in re.findall(r"typedef struct \{(.*?)\} qg_(\w+);", text, re.DOTALL):
        types[f"qg_{name}"] = _struct(name, body, types, found)
        found["".join(word.title() for word in name.split("_"))] = types[f"qg_{name}"]
    return SimpleNamespace(**found)


def _constants(text: str) -> Iterator[tuple[str, int]]:
    for name, value in re.findall(r"#define QG_(\w+) (\d+)", text):
        yield name, int(value)
    for body in re.findall(r"enum qg_\w+ \{(.*?)\};", text, re.DOTALL):
        number = 0
        for entry in filter(None, (part.strip() for part in body.split(","))):
            name, _, value = entry.partition("=")
            number = int(value) if value else number
            yield name.strip().removeprefix("QG_"), number
            number += 1


def _struct(name: str, body: str, types: dict[str, Any], constants: dict[str, Any]) -> Any:
    body = re.sub(r"union \{.*?\} (\w+);", r"int64_t \1;", body, flags=re.DOTALL)
    fields: list[tuple[str, Any]] = []
    for line in filter(None, (part.strip() for part in body.split(";"))):
        kind, names = line.removeprefix("const ").split(maxsplit=1)
        for entry in names.split(","):
            field, star, length = re.fullmatch(
                r"\s*(\*?)\s*(\w+)\s*(?:\[(\w+)\])?\s*", entry
            ).group(  # type: ignore[union-attr]
                2, 1, 3
            )
            single = ctypes.c_void_p if star else types.get(kind, ctypes.c_void_p)
            if length:
                single = single * (int(length) if length.isdigit() else constants[length[3:]])
            fields.append((field, single))
    return type(f"qg_{name}", (ctypes.Structure,), {"_fields_": fields})
