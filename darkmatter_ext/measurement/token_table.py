"""Per-token quantities as columnar files: a folder of parquet parts that pandas, polars, DuckDB or arrow read as one table.

It holds a few float32 numbers per token and SAE, not activations: per-token figures and baselines need no more.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from darkmatter_ext.runtime.inputs import InputError, StateError
from darkmatter_ext.runtime.storage import atomic_file

if TYPE_CHECKING:
    import pyarrow

BYTES_PER_PART = 1 << 26  # a part is written once this many wait: bounds memory, keeps parts large enough to read fast


@dataclass
class TokenTable:
    """A table being written by one process; `flush` writes what was added.

    Parts are named by process and number, and a checkpoint records how many are valid. Later parts belong to an unfinished
    stretch and are written again.
    """

    folder: Path
    rank: int = 0
    n_parts: int = 0
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _bytes: int = 0

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """Add tokens: columns of equal length, integers or floating point, [n] each."""
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}
        if not len(next(iter(arrays.values()))):
            return
        self._waiting.append(arrays)
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes >= BYTES_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write the waiting tokens as one part, with an atomic rename. Raises OSError if it cannot be written."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._waiting:
            return
        names = list(self._waiting[0])
        table = pa.table({name: np.concatenate([part[name] for part in self._waiting]) for name in names})
        try:
            with atomic_file(self._part(self.n_parts)) as part:
                pq.write_table(table, part, compression="zstd")
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise OSError(
                f"checkpoint: {self.folder} cannot be written ({reason}); what was saved before is kept"
            ) from None
        self._waiting, self._bytes, self.n_parts = [], 0, self.n_parts + 1

    def resume(self, n_parts: int) -> None:
        """Resume after a restart: keep the first `n_parts` parts of this process and remove later ones."""
        self.n_parts, self._waiting, self._bytes = n_parts, [], 0
        own = sorted(self.folder.glob(f"part-{self.rank:04d}-*.parquet"))
        for path in own[n_parts:]:
            path.unlink()
        for leftover in self.folder.glob(f".part-{self.rank:04d}-*.part"):  # left by a process killed while writing
            shutil.rmtree(leftover, ignore_errors=True)
        if len(own) < n_parts:
            raise StateError(f"checkpoint: {self.folder} is damaged (a part is missing); nothing was deleted")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{self.rank:04d}-{number:06d}.parquet"


def read_tokens(folder: str | Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """The table of a run, tokens in the order of the text (by context, then position).

    Args:
        folder: the `per_token` folder of a run.
        columns: names to read; default all. `context` and `position` are always included.

    Raises ValueError if the folder holds no table.
    """
    import pyarrow.dataset as ds
    from pyarrow import ArrowException

    names = None if columns is None else list(dict.fromkeys(["context", "position", *columns]))
    try:  # a type that arrow cannot read, or not sort, is a NotImplementedError or a TypeError of its own
        table = ds.dataset(Path(folder), format="parquet").to_table(columns=names)
        return table.sort_by([("context", "ascending"), ("position", "ascending")])
    except (OSError, ValueError, KeyError, ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"per_token: must be a folder of parquet parts, got {folder} ({reason})") from None
