"""Statistics on disk: what one pass over the data learned, so that other features of the same rows need no second look.

A tree of dataclasses as JSON, with its arrays beside it as Arrow, in one zip file. Nothing in it can run code: the classes
are those of a literal table, and their fields are set one by one.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import zipfile
from collections import Counter
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipelines.storage import Folder

FILE: Final = "statistics.zip"
TREE: Final = "tree.json"
CLASSES: Final = {
    "Summary": "pipelines.data.summary",
    "Held": "pipelines.data.summary",
    "Counts": "pipelines.data.read",
    "NumberStatistics": "pipelines.features.stats",
    "StringStatistics": "pipelines.features.stats",
    "CoMoments": "pipelines.features.comoments",
    "TargetSums": "pipelines.features.target_sums",
}


def save(folder: Folder, value: Any) -> None:
    """Write a value of these dataclasses, containers, numbers, texts, numpy and Arrow arrays and tables."""
    with folder.writing(FILE) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(TREE, json.dumps(_Writer(archive).tree(value)))


def load(folder: Folder) -> Any:
    """Read what `save` has written, to the last bit."""
    with zipfile.ZipFile(io.BytesIO(folder.read_bytes(FILE))) as archive:
        return _value(json.loads(archive.read(TREE)), archive)


class _Writer:
    """Puts arrays into the archive as it meets them."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive, self._arrays = archive, 0

    def tree(self, value: Any) -> Any:
        """JSON: plain values as they are, all else as {kind: content}."""
        match value:
            case None | bool() | int() | str():
                return value
            case float():
                return {"float": value.hex()}
            case list():
                return [self.tree(one) for one in value]
            case tuple():
                return {"tuple": [self.tree(one) for one in value]}
            case Counter() | dict():
                kind = "counter" if isinstance(value, Counter) else "dict"
                return {kind: [[self.tree(key), self.tree(one)] for key, one in value.items()]}
            case np.ndarray():
                return {"numpy": self._keep(pa.table({"": pa.array(np.ascontiguousarray(value).ravel())})), "shape": value.shape}
            case pa.Array():
                return {"arrow": self._keep(pa.table({"": value}))}
            case pa.Table():
                return {"table": self._keep(value)}
        assert type(value).__name__ in CLASSES, f"{type(value)} has no place in statistics"
        fields = [field for field in dataclasses.fields(value) if field.init]
        return {type(value).__name__: {field.name: self.tree(getattr(value, field.name)) for field in fields}}

    def _keep(self, table: pa.Table) -> str:
        name = f"{self._arrays}.arrow"
        self._arrays += 1
        with self._archive.open(name, "w", force_zip64=True) as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        return name


def _value(tree: Any, archive: zipfile.ZipFile) -> Any:
    if isinstance(tree, list):
        return [_value(one, archive) for one in tree]
    if not isinstance(tree, dict):
        return tree
    [(kind, content), *more] = tree.items()
    match kind:
        case "float":
            return float.fromhex(content)
        case "tuple":
            return tuple(_value(one, archive) for one in content)
        case "counter" | "dict":
            found = {_value(key, archive): _value(one, archive) for key, one in content}
            return Counter(found) if kind == "counter" else found
        case "numpy":
            return _table(content, archive)[""].combine_chunks().to_numpy(zero_copy_only=False).reshape(more[0][1])
        case "arrow":
            return _one(_table(content, archive)[""])
        case "table":
            return _table(content, archive)
    kind_of = getattr(importlib.import_module(CLASSES[kind]), kind)
    return kind_of(**{name: _value(one, archive) for name, one in content.items()})


def _table(name: str, archive: zipfile.ZipFile) -> pa.Table:
    return pa.ipc.open_stream(archive.read(name)).read_all()


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
