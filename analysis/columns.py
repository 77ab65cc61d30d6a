"""Tables to CSV and back without loss. A column has the type of its field, or the narrowest type that fits its text."""

import io
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.harness.runs.run import names

PROVENANCE = ("commit", "dirty", "code", "data_checksum", "torch", "cpu", "cpu_capability", "gpu")

_DTYPES = {str: "string", int: "Int64", float: "Float64", bool: "boolean"}


def csv_text(table: pd.DataFrame) -> str:
    """The table as CSV: floats with all the digits they need, an empty cell for a missing value."""
    return table.to_csv(index=False, lineterminator="\n")


def parse(text: str) -> pd.DataFrame:
    """The inverse of `csv_text`."""
    table = _texts(text)
    known = known_dtypes()
    return pd.DataFrame({name: _typed(table[name], known.get(str(name))) for name in table})


def _texts(text: str) -> pd.DataFrame:
    """A CSV's cells as text, missing where empty; an empty line is a row too."""
    return pd.read_csv(io.StringIO(text), dtype="string", keep_default_na=False, na_values=[""], skip_blank_lines=False)


def column_of(values: list[Any], dtype: str | None) -> pd.api.extensions.ExtensionArray | pd.Series:
    """A column as it would be read back from CSV: numbers directly, anything else through its text."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {bool} and dtype in (None, "boolean"):
        return pd.array(values, dtype="boolean")
    if kinds <= {int} and dtype in (None, "Int64") and all(v is None or abs(v) < 10**18 for v in values):
        return pd.array(values, dtype="Int64")
    if kinds and kinds <= {int, float} and (float in kinds if dtype is None else dtype == "Float64"):
        numbers = np.array([math.nan if value is None else value for value in values], dtype=float)
        return pd.array(numbers, dtype="Float64")
    texts = csv_text(pd.DataFrame({"column": pd.Series(values, dtype=object)}))
    return _typed(_texts(texts)["column"], dtype)


def joined_column(
    parts: Sequence[np.ndarray | list[Any]], dtype: str | None
) -> pd.api.extensions.ExtensionArray | pd.Series:
    """Concatenate the columns of all runs."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    others = [part for part in parts if not isinstance(part, np.ndarray)]
    if not arrays or dtype or any(value is not None for part in others for value in part):
        return column_of(
            [value for part in parts for value in (part if isinstance(part, list) else part.tolist())], dtype
        )
    missing = np.concatenate([np.full(len(part), isinstance(part, list)) for part in parts])
    zeros = [part if isinstance(part, np.ndarray) else np.zeros(len(part), dtype=int) for part in parts]
    numbers = np.concatenate(zeros)
    numbers = np.where(missing, math.nan, numbers) if numbers.dtype == float else numbers
    if numbers.dtype == float:
        return pd.array(numbers, dtype="Float64")
    return pd.arrays.IntegerArray(numbers, missing)


def _typed(texts: pd.Series, dtype: str | None) -> pd.Series:
    """Convert a column to its type or, if that is unknown, to the narrowest type that fits all of its text."""
    cells = texts.to_numpy(dtype=object, na_value=None)
    for name in [dtype] if dtype else ["Int64", "Float64", "boolean"]:
        try:
            return pd.Series([pd.NA if cell is None else _PYTHON[name](cell) for cell in cells], dtype=name)
        except (ValueError, OverflowError):
            if dtype:
                raise
    return texts


def _number(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise ValueError(f"{text!r} is not an integer")
    return int(text)


def _flag(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"{text!r} is neither True nor False")
    return text == "True"


_PYTHON: dict[str, Callable[[Any], Any]] = {"string": str, "Int64": _number, "Float64": float, "boolean": _flag}


def known_dtypes() -> dict[str, str]:
    """The types of the columns that every table of runs has, by column name."""
    dtypes = {name: _dtype(hint) for name, hint in ({**names(), "kind": str}).items()}
    texts = ("run_id", "method", *PROVENANCE)
    return dtypes | dict.fromkeys(texts, "string") | {"dirty": "boolean"}


def _dtype(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    return _DTYPES[hint]
