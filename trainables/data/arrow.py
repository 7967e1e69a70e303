"""Tables in Arrow files: written block by block, read through a memory map. Knows not what the columns hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Ids = NDArray[np.int32]


def write_table(path: Path, schema: pa.Schema, blocks: Iterable[Sequence[Any]]) -> int:
    """Writes blocks of rows; each block has the columns of the schema, in its order. Returns the number of rows."""
    num = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for columns in blocks:
            arrays = [
                values if isinstance(values, pa.Array) else pa.array(values, field.type)
                for values, field in zip(columns, schema, strict=True)
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            num += len(arrays[0])
    return num


class MappedTable:
    """The rows of a file, memory-mapped; there may be none."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.schema = reader.schema
        self.blocks = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.starts = np.cumsum([0, *(len(block) for block in self.blocks)])  # row at which each block begins

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """Returns (block, row within the block). Raises IndexError where there is no such row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        block = int(np.searchsorted(self.starts, row, side="right")) - 1
        return block, int(row - self.starts[block])

    def column(self, name: str) -> NDArray[Any]:
        """Copies a column of numbers."""
        return np.concatenate([block.column(name).to_numpy() for block in self.blocks])

    def value(self, name: str, row: int) -> Any:
        """Copies one value as a Python object."""
        block, place = self.locate(row)
        return self.blocks[block].column(name)[place].as_py()


class Lists:
    """A column of lists of token ids; `lists[row]` is a view of the mapped file."""

    def __init__(self, table: MappedTable, name: str) -> None:
        columns = [block.column(name) for block in table.blocks]
        self._table = table
        self._values = [column.values.to_numpy() for column in columns]
        self._offsets = [column.offsets.to_numpy() for column in columns]
        self.lengths: Ids = np.concatenate([np.empty(0, np.int32), *map(np.diff, self._offsets)])

    def __getitem__(self, row: int) -> Ids:
        block, place = self._table.locate(row)
        start, stop = self._offsets[block][place : place + 2]
        ids: Ids = self._values[block][start:stop]
        return ids
