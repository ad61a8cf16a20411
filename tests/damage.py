"""Ways to break a LeRobot dataset on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FLOATS = pa.list_(pa.float32())


def video(root: Path, camera: str = "top") -> Path:
    return next((root / "videos" / f"observation.images.{camera}").rglob("*.mp4"))


def data(root: Path) -> Path:
    return min((root / "data").rglob("*.parquet"))


def meta_rows(root: Path) -> Path:
    return next((root / "meta" / "episodes").rglob("*.parquet"))


def edit_info(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_parquet(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def edit_column(
    path: Path, column: str, change: Callable[[Any], Any], kind: pa.DataType | None = None
) -> None:
    """Replace a column's values by what ``change`` makes of their list, as ``kind`` or as the type they have."""

    def edit(table: pa.Table) -> pa.Table:
        values = change(table[column].to_pylist())
        index = table.column_names.index(column)
        return table.set_column(
            index, column, pa.array(values, kind or table.schema.field(column).type)
        )

    edit_parquet(path, edit)
