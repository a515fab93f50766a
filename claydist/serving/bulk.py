"""A bulk request by pieces: small requests take their turns in between, and two pieces at most are encoded at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from claydist.arrays import beyond_nanoseconds, native_values
from claydist.errors import DataError
from claydist.models import XGBoostModel
from claydist.predictor import offset_values
from claydist.serving.batching import Batcher, Predicts
from claydist.serving.shelf import Served

# As long as a small request may have to wait for a piece before it.
_PIECE_S = 0.03


@dataclass(frozen=True)
class Piece:
    """Some rows of a bulk request, encoded.

    Attributes
    ----------
    predict : gives the model's values, as `Predictor.predict_arrays` does.
    unseen, missing : counts by feature and by column.
    """

    n_rows: int
    predict: Callable[[], np.ndarray]
    unseen: Mapping[str, int]
    missing: Mapping[str, int]


def encode_piece(served: Served, table: pa.Table) -> Piece:
    """Rows of a checked table, with all work done that is not the model's own.

    Raises
    ------
    DataError : for a value that the plan refuses, or Arrow cannot make into what it computes with.
    """
    plan, model, offset = served.predictor.plan, served.predictor.model, served.predictor.offset
    for name in sorted({f.column for f in plan.features if f.kind == "calendar"}):
        if n_beyond := int(beyond_nanoseconds(table.column(name)).sum()):
            raise DataError(
                f"column {name!r} holds {n_beyond} timestamps outside the years 1677 to 2262; "
                "send null for what is not known"
            )
    try:
        encoded = plan.encode(table)
        base = None if offset is None else offset_values(table, offset, "the Arrow stream")
        missing = _missing_in(served, table)
    except MemoryError:
        raise
    except pa.ArrowException as e:
        said = " ".join(str(e).split())[:200]
        raise DataError(f"the Arrow stream has values that cannot be read as the model's columns: {said}") from None
    if isinstance(model, XGBoostModel):
        predict = partial(model.predict, plan.tree_matrix(encoded), base)
    else:
        predict = partial(model.predict_encoded, plan, encoded, base)
    return Piece(table.num_rows, predict, encoded.unseen, missing)


def _missing_in(served: Served, table: pa.Table) -> dict[str, int]:
    """Number of missing values by column; columns without any are left out."""
    counts = {}
    for name in served.predictor.schema.names:
        column = table.column(name)
        if pa.types.is_floating(column.type):
            counts[name] = int(np.isnan(native_values(column)).sum())
        else:
            counts[name] = column.null_count
    return {name: n for name, n in counts.items() if n}


def rows_of_a_piece(model: Predicts, most_rows: int) -> int:
    """Rows that are predicted in as long as a small request may have to wait."""
    return max(1, min(most_rows, int(_PIECE_S / max(model.seconds_per_row, 1e-9))))


async def predict_matrix(
    model: Predicts,
    values: np.ndarray,
    batcher: Batcher,
    most_rows: int,
    deadline: float | None,
    on_first: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The model's values for rows of a RowMatrix: small ones joined with others, large ones by pieces.

    Parameters
    ----------
    deadline : (time.monotonic) of the first piece; each later one has the queue's own.
    on_first : called once the first piece is predicted.

    Raises
    ------
    Refusal : 503 when a piece waits too long for its turn.
    """
    piece_rows = rows_of_a_piece(model, most_rows)
    if len(values) <= piece_rows:
        found = await batcher.predict(model, values, deadline)
        on_first()
        return found
    parts: list[np.ndarray] = []
    for at in range(0, len(values), piece_rows):
        piece = values[at : at + piece_rows]
        latest = None if parts else deadline
        parts.append(await batcher.run(model, len(piece), partial(model.predict_values, piece), latest))
        if len(parts) == 1:
            on_first()
    return np.concatenate(parts)


async def predict_pieces(
    served: Served, table: pa.Table, batcher: Batcher, most_rows: int, deadline: float
) -> AsyncIterator[tuple[np.ndarray, Piece]]:
    """Values of each piece of a checked table, in order, with the piece; the next is encoded while one is predicted.

    Parameters
    ----------
    deadline : (time.monotonic) of the first piece; each later one has the queue's own.

    Raises
    ------
    DataError : for a value that the plan refuses.
    Refusal : 503 when a piece waits too long for its turn.
    """
    piece_rows = rows_of_a_piece(served, most_rows)
    ahead = _encoding(served, table.slice(0, piece_rows))
    try:
        for at in range(piece_rows, table.num_rows + piece_rows, piece_rows):
            piece = await ahead
            ahead = _encoding(served, table.slice(at, piece_rows))
            latest = deadline if at == piece_rows else None
            yield await batcher.run(served, piece.n_rows, piece.predict, latest), piece
    finally:
        ahead.cancel()


def _encoding(served: Served, rows: pa.Table) -> asyncio.Task[Piece]:
    task = asyncio.create_task(asyncio.to_thread(encode_piece, served, rows))
    # Read once, so that a piece nobody waits for any more does not complain about its error.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task
