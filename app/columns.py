"""Columns of parquet files as numpy arrays, without pandas, which pyarrow's own conversions import (1 s of CPU)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from certs.errors import DatasetError, first_line

_DTYPES = {"float": np.float32, "double": np.float64, "int32": np.int32, "int64": np.int64}


def read_columns(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """These columns of a parquet file: [rows] of numbers, or [rows, width] where each row is a list of equal width.

    Raises DatasetError when the file is damaged, lacks a column, or holds nulls or lists of unequal width.
    """
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in names if name not in file.schema_arrow.names]
            if missing:
                raise DatasetError(
                    f"{path} has no column {missing[0]}: it is not LeRobot v3.0 data, convert it."
                )
            table = file.read(columns=list(names))
        return {name: _array(name, table[name]) for name in names}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DatasetError(
            f"{path} cannot be read ({first_line(error)}): copy the dataset again."
        ) from error


def _array(name: str, column: Any) -> NDArray[Any]:
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
        return _numbers(name, column)
    widths = set(_numbers(name, pc.list_value_length(column)).tolist())
    # A reshape alone would not notice rows of other widths that happen to add up.
    if len(widths) > 1:
        raise ValueError(f"the rows of {name} differ in width")
    flat = _numbers(name, pc.list_flatten(column))
    return flat.reshape(len(column), -1)


def _numbers(name: str, column: Any) -> NDArray[Any]:
    array = column.combine_chunks()
    if array.null_count:
        raise ValueError(f"a value of {name} is missing")
    dtype = _DTYPES.get(str(array.type))
    if dtype is None:
        raise ValueError(f"the values of {name} are of type {array.type}")
    start = array.offset * np.dtype(dtype).itemsize
    return np.frombuffer(array.buffers()[1], dtype, count=len(array), offset=start)
