"""Arrow columns as the arrays that are computed with: numbers, nanoseconds, text."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from claydist.errors import DataError

NS = 1_000_000_000


def native_type(kind: pa.DataType) -> pa.DataType:
    """What numbers of this type are computed with: float32 where that is exact by type, else float64."""
    narrow = pat.is_float32(kind) or pat.is_float16(kind) or pat.is_boolean(kind)
    narrow = narrow or (pat.is_integer(kind) and kind.bit_width <= 16)
    return pa.float32() if narrow else pa.float64()


def native_values(column: pa.ChunkedArray) -> np.ndarray:
    """Values (n_rows,) of a numeric column in its `native_type`, NaN for null."""
    kind = column.type
    if pat.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    target = native_type(kind)
    array = _one_array(column)
    if pat.is_decimal(kind):
        # By its text, for Arrow's own cast is a bit off where the nearest double is not a product of doubles.
        array = array.cast(pa.string()).cast(target)
    elif kind != target:
        # An int64 beyond 2^53 is rounded, as by any double: safe=False says that this is meant.
        array = array.cast(pa.int8() if pat.is_boolean(kind) else kind).cast(target, safe=False)
    return array.to_numpy(zero_copy_only=False)


def beyond_nanoseconds(column: pa.ChunkedArray) -> np.ndarray:
    """Mask (n_rows,) bool of the timestamps outside the years that nanoseconds can hold (1677 to 2262)."""
    return np.abs(whole_seconds(column).fill_null(0).to_numpy(zero_copy_only=False)) >= 2**63 // NS


def whole_seconds(column: pa.ChunkedArray) -> pa.Array:
    """Seconds since the epoch (UTC where there is a zone), int64 without fractions, nulls kept; of every year."""
    array = _one_array(column)
    if pat.is_null(array.type):
        return array.cast(pa.int64())
    return array.cast(pa.timestamp("s", getattr(array.type, "tz", None)), safe=False).cast(pa.int64())


def nanoseconds(column: pa.ChunkedArray, name: str) -> pa.Array:
    """Nanoseconds since the epoch (UTC where there is a zone), int64, nulls kept.

    Raises
    ------
    DataError : for a time outside the years that nanoseconds can hold.
    """
    array = _one_array(column)
    if pat.is_null(array.type):
        return array.cast(pa.int64())
    try:
        return array.cast(pa.timestamp("ns", getattr(array.type, "tz", None))).cast(pa.int64())
    except pa.ArrowInvalid as e:
        raise DataError(
            f"column {name!r} has a time outside the years 1677 to 2262 that nanoseconds can hold ({e}); "
            f"make it null, or leave the row out"
        ) from None


def seconds_since(column: pa.ChunkedArray, origin_ns: int, name: str) -> np.ndarray:
    """Seconds (n_rows,) float64 since the origin, NaN for null; the subtraction is made in integers.

    Raises
    ------
    DataError : as `nanoseconds`.
    """
    ns = nanoseconds(column, name)
    values = ns.fill_null(origin_ns).to_numpy(zero_copy_only=False)
    # Of dates far apart the difference in nanoseconds would overflow: whole seconds and the rest apart.
    whole = values // NS - origin_ns // NS
    seconds = whole + (values % NS - origin_ns % NS) / NS
    if ns.null_count:
        seconds[ns.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return seconds


def text_values(column: pa.ChunkedArray, name: str) -> pa.DictionaryArray:
    """A column as a dictionary of text; integers (and whole floats, as pandas makes them) in decimal digits.

    Raises
    ------
    DataError : for floats with fractions.
    """
    kind = column.type.value_type if pat.is_dictionary(column.type) else column.type
    if pat.is_floating(kind) or pat.is_decimal(kind):
        if pat.is_dictionary(column.type):
            column = column.cast(kind)
        try:
            nulls = pc.is_nan(column) if pat.is_floating(column.type) else False
            column = pc.if_else(nulls, pa.scalar(None, column.type), column).cast(pa.int64())
        except pa.ArrowInvalid:
            raise DataError(f"column {name!r} is a category of integers, and holds {kind} with fractions") from None
    array = _one_array(column)
    if not pat.is_dictionary(array.type):
        array = array.dictionary_encode()
    if array.dictionary.type != pa.string():
        array = pa.DictionaryArray.from_arrays(array.indices, array.dictionary.cast(pa.string()))
    return array


def _one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if isinstance(column, pa.Array):
        return column
    if pat.is_dictionary(column.type):
        column = column.unify_dictionaries()
    if column.num_chunks == 1:
        return column.chunk(0)
    return column.combine_chunks() if column.num_chunks else pa.array([], column.type)
