from __future__ import annotations

import datetime as dt
import hashlib
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from claydist.dataset.split import SplitPlan, hash_values
from claydist.errors import SpecError
from claydist.spec import SplitSpec

N = 20_000
TABLE = pa.table({"i": range(N), "day": [i % 365 for i in range(N)], "c": [f"c{i % 700}" for i in range(N)]})


def plan(seed: int = 0, key: tuple[str, ...] = (), **parts) -> SplitPlan:
    return SplitPlan.of(SplitSpec.model_validate(parts), seed, key)


def shares(parts: np.ndarray) -> list[float]:
    return (np.bincount(parts, minlength=3) / len(parts)).tolist()


def test_fractions_are_shares_of_all_rows_and_do_not_overlap() -> None:
    parts = plan(valid={"fraction": 0.1}, test={"fraction": 0.2}).assign(TABLE, "a.parquet", 0)
    assert parts.dtype == np.int8
    assert shares(parts) == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    alone = plan(test={"fraction": 0.2}).assign(TABLE, "a.parquet", 0)
    assert ((parts == 2) == (alone == 2)).all()


def test_a_row_has_its_part_whatever_batch_it_is_read_in() -> None:
    split = plan(valid={"fraction": 0.3}, test={"fraction": 0.3})
    whole = split.assign(TABLE, "a.parquet", 0)
    assert (split.assign(TABLE.slice(100, 50), "a.parquet", 100) == whole[100:150]).all()
    some = np.array([5, 77, 1234])
    assert (split.assign(TABLE.take(pa.array(some)), "a.parquet", some) == whole[some]).all()


@pytest.mark.parametrize(("seed", "path"), [(1, "a.parquet"), (0, "b.parquet")])
def test_another_seed_or_file_is_another_independent_split(seed: int, path: str) -> None:
    held = plan(test={"fraction": 0.5}).assign(TABLE, "a.parquet", 0) == 2
    other = plan(seed, test={"fraction": 0.5}).assign(TABLE, path, 0) == 2
    assert (held == other).mean() == pytest.approx(0.5, abs=0.02)


def test_a_key_makes_the_split_independent_of_file_and_place() -> None:
    split = plan(key=("i", "c"), test={"fraction": 0.2})
    order = np.random.default_rng(0).permutation(N)
    assert split.columns == {"i", "c"}
    assert (split.assign(TABLE, "a", 0)[order] == split.assign(TABLE.take(pa.array(order)), "b", 9)).all()


def test_by_keeps_groups_on_one_side() -> None:
    split = plan(key=("i",), valid={"by": ["day"]}, test={"by": ["c"], "fraction": 0.3})
    parts = split.assign(TABLE, "a", 0)
    assert split.columns == {"day", "c"}
    in_test = {c for c, part in zip(TABLE["c"].to_pylist(), parts, strict=True) if part == 2}
    assert not in_test & {c for c, part in zip(TABLE["c"].to_pylist(), parts, strict=True) if part != 2}
    rest = {day: set() for day in range(365)}
    for day, part in zip(TABLE["day"].to_pylist(), parts, strict=True):
        if part != 2:
            rest[day].add(part)
    assert all(len(found) == 1 for found in rest.values())
    assert len(in_test) / 700 == pytest.approx(0.3, abs=0.06)


def test_two_parts_by_the_same_columns_are_disjoint_shares_of_groups() -> None:
    split = plan(valid={"by": ["i"], "fraction": 0.5}, test={"by": ["i"], "fraction": 0.4})
    assert shares(split.assign(TABLE, "a", 0)) == pytest.approx([0.1, 0.5, 0.4], abs=0.01)
    with pytest.raises(SpecError, match=r"hold out 1.1 of all groups"):
        plan(valid={"by": ["i"], "fraction": 0.6}, test={"by": ["i"], "fraction": 0.5})


def test_where_is_taken_literally_and_test_comes_first() -> None:
    split = plan(valid={"where": "day < 100"}, test={"where": "day < 50"})
    day = TABLE["day"].to_numpy()
    assert (split.assign(TABLE, "a", 0) == np.select([day < 50, day < 100], [2, 1], 0)).all()
    mixed = plan(valid={"fraction": 0.5}, test={"where": "day < 50"}).assign(TABLE, "a", 0)
    assert (mixed == 2).sum() == (day < 50).sum()
    assert (mixed[day >= 50] == 1).mean() == pytest.approx(0.5, abs=0.02)


def test_a_part_with_its_own_path_takes_no_rows() -> None:
    assert not plan(valid={"path": "x"}, test={"path": "y"}).assign(TABLE, "a", 0).any()


def same_hash(*columns: pa.Array | pa.ChunkedArray) -> bool:
    first, *others = [hash_values(column) for column in columns]
    return all((first == other).all() for other in others)


def test_equal_values_hash_alike_whatever_type_holds_them() -> None:
    whole = [1, -2, None, 0]
    assert same_hash(
        *(pa.array(whole, t) for t in (pa.int8(), pa.int64(), pa.float32(), pa.float64())),
        pa.array([1.0, -2.0, float("nan"), -0.0]),
        pa.array(whole, pa.int32()).dictionary_encode(),
        pa.chunked_array([pa.array(whole[:1]), pa.array(whole[1:])]),
    )
    text = ["é", None, "", "a"]
    assert same_hash(
        *(pa.array(text, t) for t in (pa.string(), pa.large_string())),
        pa.array(text).dictionary_encode(),
        pa.chunked_array([pa.array(text[:2]).dictionary_encode(), pa.array(text[2:]).dictionary_encode()]),
    )
    day = [dt.date(2013, 7, 4), None, dt.date(1900, 1, 1), dt.date(9999, 12, 31)]
    assert same_hash(
        pa.array(day, pa.date32()),
        pa.array(day, pa.date64()),
        *(pa.array(day).cast(pa.timestamp(u)) for u in ("s", "us")),
    )
    instants = pa.array([1, None, 2**40], pa.timestamp("s"))
    assert same_hash(instants, instants.cast(pa.timestamp("ms", "UTC")))
    assert same_hash(pa.array([True, False]), pa.array([1, 0], pa.uint8()))


def test_different_values_hash_differently() -> None:
    for column in (
        pa.array(range(-500, 500)),
        pa.array([i / 8 for i in range(1000)]),
        pa.array([str(i) for i in range(1000)]),
        pa.array([Decimal(i) / 4 for i in range(1000)]),
        pa.array([0, 2**63, 2**64 - 1, None], pa.uint64()),
        pa.array([float("inf"), float("-inf"), float("nan"), 0.0, 1e300]),
    ):
        assert len(set(hash_values(column).tolist())) == len(column)


def splitmix64(x: int) -> int:
    """One step of the published generator from state x, on Python's integers."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_split_is_the_documented_hash() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the generator's reference for seed 0
    path = "month=1/part-0.parquet"
    file = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")
    start = splitmix64(splitmix64(7) ^ file)
    u = [splitmix64((start + row) % 2**64) / 2**64 for row in range(500)]
    expected = [2 if x < 0.2 else 1 if x < 0.5 else 0 for x in u]
    split = plan(7, valid={"fraction": 0.3}, test={"fraction": 0.2})
    assert split.assign(TABLE.slice(0, 500), path, 0).tolist() == expected
    day = plan(7, test={"by": ["day"], "fraction": 0.5}).assign(TABLE.slice(0, 365), path, 0)
    assert day.tolist() == [2 * (splitmix64(splitmix64(7) ^ splitmix64(d)) / 2**64 < 0.5) for d in range(365)]
