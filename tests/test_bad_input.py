"""Input that cannot be trained on: a clear error, the right exit code, no traceback, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from claydist import pipeline
from claydist.cli import main
from claydist.dataset import statistics
from claydist.display import Silent
from claydist.errors import DataError, InputChanged
from claydist.preparation import open_tables, prepare
from claydist.registry import open_registry
from claydist.spec import TrainSpec
from claydist.specfile import load_spec
from tests.checks import prepare_job, run_job, without_ray
from tests.tables import cut, make_table, spec_of, write_files

pytestmark = pytest.mark.ray

Change = Callable[[dict[str, Any], Path], None]


@dataclass(frozen=True)
class Bad:
    """A change to a good spec and its files (`data/part-00` to `part-02`), and the error that must come of it."""

    name: str
    change: Change
    kind: str
    message: str
    code: int = 1

    def __str__(self) -> str:
        return self.name


def put(**keys: Any) -> Change:
    """Set keys of the spec, with `__` for the dot."""

    def change(tree: dict[str, Any], folder: Path) -> None:
        for key, value in keys.items():
            *parents, last = key.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = str(value).format(folder=folder) if isinstance(value, str) else value

    return change


def rewrite(edit: Callable[[pa.Table], pa.Table], file: int = 1, **keys: Any) -> Change:
    """Edit one of the three files, and set keys of the spec."""

    def change(tree: dict[str, Any], folder: Path) -> None:
        path = folder / "data" / f"part-{file:02}.parquet"
        pq.write_table(edit(pq.read_table(path)), path)
        put(**keys)(tree, folder)

    return change


def values(name: str, edit: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> Any:
    """An edit of a table that replaces a column's values."""

    def edited(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        return table.set_column(at, name, pa.array(edit(table.column(name).to_pylist()), kind or table.field(at).type))

    return edited


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda column: [value, *column[1:]]


def everywhere(edit: Callable[[pa.Table], pa.Table], **keys: Any) -> Change:
    def change(tree: dict[str, Any], folder: Path) -> None:
        for file in range(3):
            rewrite(edit, file)(tree, folder)
        put(**keys)(tree, folder)

    return change


def emptied(tree: dict[str, Any], folder: Path) -> None:
    shutil.rmtree(folder / "data")
    (folder / "data").mkdir()
    (folder / "data" / "_SUCCESS").touch()
    (folder / "data" / "part-00.parquet").touch()


def truncated(tree: dict[str, Any], folder: Path) -> None:
    path = folder / "data" / "part-01.parquet"
    path.write_bytes(path.read_bytes()[:-400])


def damaged_inside(tree: dict[str, Any], folder: Path) -> None:
    path = folder / "data" / "part-01.parquet"
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    data[start : start + 600] = b"\xff" * 600
    path.write_bytes(bytes(data))


def copied_for_test(link: Callable[[Path, Path], None] | None) -> Change:
    def change(tree: dict[str, Any], folder: Path) -> None:
        source = folder / "data" / "part-02.parquet"
        if link is None:
            tree["split"] = {"test": {"path": str(source)}}
            return
        (folder / "test").mkdir()
        link(source, folder / "test" / "other-name.parquet")
        tree["split"] = {"test": {"path": str(folder / "test")}}

    return change


def valid_and_test_overlap(tree: dict[str, Any], folder: Path) -> None:
    write_files(folder / "separate", cut(make_table(7, 200), 2))
    tree["split"] = {"valid": {"path": str(folder / "separate")}, "test": {"path": f"{folder}/separate/*00*"}}


def five_mistakes(tree: dict[str, Any], folder: Path) -> None:
    tree["nmae"] = "x"
    tree["name"] = "UPPER"
    tree["model"]["rouns"] = 3
    tree["split"] = {"test": {"fraction": 2}}
    tree["goals"] = [{"metric": "acu", "at_least": 0.5}]


def delta_table(tree: dict[str, Any], folder: Path) -> None:
    (folder / "data" / "_delta_log").mkdir()
    (folder / "data" / "_delta_log" / "00000000000000000000.json").write_text("{}")


def separate_table(table: pa.Table, part: str = "test") -> Change:
    def change(tree: dict[str, Any], folder: Path) -> None:
        write_files(folder / "separate", [table])
        tree["split"] = {part: {"path": str(folder / "separate")}}

    return change


GOOD = make_table(0, 300)
FAR = datetime(9999, 12, 31, tzinfo=UTC)
BAD = [
    Bad("no such path", put(data__path="{folder}/nowhere"), "DataError", "nowhere.*no such file or directory"),
    Bad("no such glob", put(data__path="{folder}/data/*.orc"), "DataError", r"\*\.orc.*no file"),
    Bad("no parquet in it", emptied, "DataError", "expected Parquet files at .*data.*empty, hidden or begin with '_'"),
    Bad("not parquet", lambda tree, folder: (folder / "data" / "a.csv").write_text("km,late\n1,2\n") and None,
        "DataError", r"a\.csv.*cannot be read as Parquet"),
    Bad("label missing", put(data__label="lote"), "DataError", "'lote' is absent; did you mean 'late'"),
    Bad("label missing from one file", rewrite(lambda t: t.drop_columns(["late"])), "DataError",
        r"'late' is absent from .*part-01"),
    Bad("label constant", everywhere(values("late", lambda c: [1] * len(c))), "DataError",
        "label column 'late' is 1 in every row"),
    Bad("label constant, numbers", everywhere(values("hours", lambda c: [7.5] * len(c)), data__label="hours",
                                              data__drop=["row", "w", "late", "parcels"]), "DataError",
        "label column 'hours' is 7.5 in every row"),
    Bad("label constant by above", put(data__label={"column": "hours", "above": 1e9}), "DataError",
        "'hours'.*one side of above|every row"),
    Bad("label null somewhere", rewrite(values("late", first(None))), "DataError",
        "label column 'late' is null in 1 of 300 rows.*data.where"),
    Bad("label NaN somewhere", rewrite(values("hours", first(float("nan"))), data__label="hours"), "DataError",
        "label column 'hours' is null in 1 of 300 rows"),
    Bad("label infinite", rewrite(values("hours", first(float("inf"))), data__label="hours"), "DataError",
        "column 'hours' has 1 infinite"),
    Bad("unknown feature", put(data__features=["km", "kilos"], data__drop=[]), "DataError",
        "'kilos' is absent; "),
    Bad("unknown column to drop", put(data__drop=["row", "w", "hours", "parcel"]), "DataError",
        "'parcel' is absent; did you mean 'parcels'"),
    Bad("unknown column in where", put(data__where="kmm > 3"), "DataError", "'kmm'.*'km'"),
    Bad("unknown column in a slice", put(slices=["citty = 'Brno'"]), "DataError", "'citty'.*'city'"),
    Bad("a slice of another type", put(slices=["km = 'abc'"]), "DataError", "'km' is double.*write a number"),
    Bad("a goal's slice of another type", put(goals=[{"metric": "auc", "at_least": 0.1, "slice": "city > 3"}]),
        "DataError", "'city' is string.*write '3'"),
    Bad("a slice over what the test table lacks", lambda tree, folder: (
        put(slices=["hours > 3"])(tree, folder),
        separate_table(GOOD.drop_columns(["hours"]))(tree, folder))[0],
        "DataError", r"split\.test\.path: .*'hours > 3' names columns.*'hours' is absent"),
    Bad("a slice that the valid table has in another type", lambda tree, folder: (
        put(slices=["hours > 3"])(tree, folder),
        separate_table(values("hours", lambda c: list(map(str, c)), pa.string())(GOOD), "valid")(tree, folder))[0],
        "DataError", r"split\.valid\.path: .*'hours' is string"),
    Bad("pinball without quantiles", put(data__label="hours", data__drop=["row", "w", "late", "parcels"],
                                         goals=[{"metric": "pinball", "at_most": 5}]),
        "SpecError", r"pinball.*give model\.quantiles", 2),
    Bad("auc of more classes than are computed", everywhere(
        values("late", lambda c: [i % 40 for i, _ in enumerate(c)]), model__task="multiclass",
        goals=[{"metric": "auc", "at_least": 0.1}]), "SpecError", "auc of 40 classes are not computed, of 32", 2),
    Bad("a time beyond nanoseconds", rewrite(values("sent", first(FAR))), "DataError",
        r"'sent' has 1 times in .*part-01.* outside the years 1677 to 2262.*data\.where"),
    Bad("a time beyond nanoseconds in a test row", rewrite(
        values("sent", first(FAR)), split={"test": {"where": "sent > '2200-01-01'"}}), "DataError",
        r"'sent' has 1 times in .*part-01"),
    Bad("where that cannot be read", put(data__where="km >> 3"), "SpecError", "km >> 3", 2),
    Bad("a slice that cannot be read", put(slices=["km is"]), "SpecError", "km is", 2),
    Bad("nested column", everywhere(lambda t: t.append_column("tags", pa.array([["a"]] * t.num_rows))), "DataError",
        "'tags'.*list.*drop it"),
    Bad("a column of another type in one file", rewrite(values("km", lambda c: [str(x) for x in c], pa.string())),
        "DataError", r"part-01\.parquet: column 'km': expected double .*found string"),
    Bad("truncated file", truncated, "DataError", r"part-01\.parquet.*cannot be read as Parquet"),
    Bad("damaged pages", damaged_inside, "DataError", r"part-01\.parquet"),
    Bad("all rows filtered away", put(data__where="km > 1e9"), "DataError", "no rows are left.*km > 1e9"),
    Bad("all rows held out", put(split={"test": {"where": "kg > 0"}}), "DataError", "no rows to train on"),
    Bad("nothing held out", put(split={"test": {"where": "kg < 0"}}), "DataError", "split.test holds no rows"),
    Bad("negative weights", rewrite(values("w", first(-1.0)), data__weight="w"), "DataError",
        r"'w' has 1 values in .*part-01.*negative"),
    Bad("null weights", rewrite(values("w", first(None)), data__weight="w"), "DataError", "'w' has 1 values"),
    Bad("all weights zero", everywhere(values("w", lambda c: [0.0] * len(c)), data__weight="w"), "DataError",
        "weights of the rows of train are all zero"),
    Bad("all weights of valid zero", everywhere(
        values("w", lambda c: [float(i >= 20) for i, _ in enumerate(c)]), data__weight="w",
        data__drop=["row", "hours", "parcels"], split={"valid": {"where": "w = 0"}}, model__early_stopping=2),
        "DataError", "weights of the rows of valid are all zero"),
    Bad("all weights zero in the test table", lambda tree, folder: (
        separate_table(values("w", lambda c: [0.0] * len(c))(GOOD))(tree, folder),
        put(data__weight="w", data__drop=["row", "hours", "parcels"])(tree, folder))[0],
        "DataError", "weights of the rows of test are all zero"),
    Bad(
        "negative weights in the test table",
        lambda tree, folder: (
            separate_table(values("w", first(-1.0))(GOOD))(tree, folder),
            put(data__weight="w", data__drop=["row", "hours", "parcels"])(tree, folder),
        )[0],
        "DataError",
        r"'w' has 1 values in .*separate.*negative",
    ),
    Bad("weights that are text", put(data__weight="city"), "DataError", "'city' is to be weight.*string"),
    Bad("infinite values", rewrite(values("km", first(float("-inf")))), "DataError",
        "column 'km' has 1 infinite values"),
    Bad("five mistakes in the spec", five_mistakes, "SpecError", "5 problems", 2),
    Bad("a name that leads upwards", put(name="../parcels"), "SpecError", r"name: .*'\.\./parcels'", 2),
    Bad("a name with dots", put(name="a..b"), "SpecError", r"name: .*'a\.\.b'", 2),
    Bad("a name with a slash", put(name="a/b"), "SpecError", "name: .*'a/b'", 2),
    Bad("a registry below a file", put(registry="{folder}/data/part-00.parquet/registry"), "StorageError",
        "part-00.parquet/registry"),
    Bad("a registry nowhere", put(registry="/proc/registry"), "StorageError", "/proc/registry"),
    Bad("a registry of an unknown kind", put(registry="nosuch://bucket/x"), "StorageError", "nosuch"),
    Bad("a test path that is a training file", copied_for_test(None), "DataError",
        r"split\.test\.path.*part-02\.parquet"),
    Bad("a test path that links to a training file", copied_for_test(lambda a, b: b.symlink_to(a)), "DataError",
        r"split\.test\.path"),
    Bad("a valid and a test path of the same files", valid_and_test_overlap, "DataError",
        r"split\.valid\.path and split\.test\.path name the same files.*separate/part-00"),
    Bad("a test table without the label", separate_table(GOOD.drop_columns(["late"])), "DataError", "'late'"),
    Bad("a test table without a feature", separate_table(GOOD.drop_columns(["km"])), "DataError", "'km'"),
    Bad("a valid table with a null label", separate_table(values("late", first(None))(GOOD), "valid"), "DataError",
        "label column 'late' is null in 1 of"),
    Bad("infinite values in the test table", separate_table(values("km", first(float("inf")))(GOOD)), "DataError",
        "'km'.*1 infinite"),
    Bad("an unseen category in the test rows", rewrite(
        values("city", first("Nowhere")), data__unseen="error", split={"test": {"where": "city = 'Nowhere'"}}),
        "DataError", "'city' has 1 values in test that train has not, the first is 'Nowhere'"),
    Bad("an unseen category in the valid table", lambda tree, folder: (
        separate_table(values("city", lambda c: ["b", "a", *c[2:]])(GOOD), "valid")(tree, folder),
        put(data__unseen="error")(tree, folder))[0],
        "DataError", "'city' has 2 values in valid that train has not, the first is 'a'"),
    Bad("an unknown objective", put(model__objective="reg:nothing"), "SpecError", "reg:nothing", 2),
    Bad("a parameter of XGBoost's misspelt", put(model__params={"max_dept": 3}), "SpecError", "max_dept", 2),
    Bad("a parameter out of range", put(model__params={"subsample": 3}), "SpecError", "subsample", 2),
    Bad("bins that are text", put(model__params={"max_bin": "5e2"}), "SpecError", "XGBoost refuses them: .*5e2", 2),
    Bad("bins that are null", put(model__params={"max_bin": None}), "SpecError", "XGBoost refuses them: .*None", 2),
    Bad("a label of lists", everywhere(values("late", lambda c: [[x] for x in c], pa.list_(pa.int64()))), "DataError",
        "column 'late' .*is list<.*which no model takes"),
    Bad("a label of structs", everywhere(values("late", lambda c: [{"a": x} for x in c],
                                                pa.struct({"a": pa.int64()}))), "DataError", "'late' .*is struct<"),
    Bad("a monotone constraint on nothing", put(model__monotone={"kmm": 1}), "SpecError", "kmm", 2),
    Bad("a loss that does not fit", put(model={"kind": "linear", "loss": "poisson"}), "SpecError", "poisson", 2),
    Bad("poisson with negative labels", everywhere(
        values("hours", lambda c: [-1.0 - i for i, _ in enumerate(c)]), data__label="hours",
        model={"kind": "linear", "loss": "poisson"}), "DataError", "'hours' has the value -100.0, and poisson takes"),
    Bad("an objective with a negative label in one row", rewrite(
        values("parcels", first(-3)), data__label="parcels", data__drop=["row", "w", "late", "hours"],
        model__objective="count:poisson"), "DataError", "'parcels' has the value -3.0, and count:poisson takes"),
    Bad("an objective with a label too large in the test table", lambda tree, folder: (
        everywhere(values("hours", lambda c: [i / 100 for i, _ in enumerate(c)]), data__label="hours",
                   data__drop=["row", "w", "late", "parcels"], model__objective="reg:logistic")(tree, folder),
        separate_table(values("hours", lambda c: [1.5] * len(c))(GOOD))(tree, folder))[0],
        "DataError", "'hours' has the value 1.5, and reg:logistic takes labels from 0 to 1"),
    Bad("relevance that is no grade", put(data__label="hours", data__group="row", data__drop=["w", "late", "parcels"]),
        "DataError", r"'hours' has the value .*, and relevance takes grades from 0 to 31"),
    Bad("a category of fractions", put(data__types={"km": "category"}), "DataError", "'km'"),
    Bad("a Delta table", delta_table, "DataError", "Delta"),
    Bad("64 workers", put(train__workers=64), "ClusterError",
        r"never hold 64 workers of 1 CPUs: it has 1 nodes with 4 CPUs, room for 4; set train\.workers=4"),
    Bad("9 CPUs a worker", put(train__cpus_per_worker=9), "ClusterError", r"set train\.cpus_per_worker=4"),
    Bad("no cluster has so much memory", put(train__memory_gb=1e6), "ClusterError", r"set train\.memory_gb="),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_input_is_one_clear_error_and_leaves_nothing(
    bad: Bad, ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)
    tree = good_spec(tmp_path)
    bad.change(tree, tmp_path)
    code, error, stderr = fail(["train", write_spec(tree, tmp_path), "--json"], capfd)
    text = " ".join([error["message"], *error["problems"]])
    assert (code, error["kind"]) == (bad.code, bad.kind), text
    assert re.search(bad.message, text), text
    assert len(text) < 3000
    if "five" in bad.name:
        assert len(error["problems"]) == 5
    assert_clean(tmp_path / "registry", tree["name"])
    for line in (error["message"], *error["problems"]):
        assert line in stderr


def test_the_good_spec_is_good(
    ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else every test above could pass for another reason.
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)
    with pytest.raises(SystemExit) as ended:
        main(["train", write_spec(good_spec(tmp_path), tmp_path), "--json"])
    assert ended.value.code == 0
    assert json.loads(capfd.readouterr().out)["version"] == 1


@pytest.mark.parametrize("when", ["before the statistics", "before training", "gone"])
def test_a_file_that_changes_under_the_run_is_named(when: str, ray_cluster: None, tmp_path: Path) -> None:
    tree = good_spec(tmp_path)
    victim = tmp_path / "data" / "part-01.parquet"
    if when == "before training":
        _, _, job = prepare_job(tree, tmp_path, 2)
        pq.write_table(make_table(9, 100), victim)
        with pytest.raises(InputChanged, match=r"part-01\.parquet changed while it was in use"):
            run_job(job)
        return
    spec = load_spec(TrainSpec, tree)
    tables = open_tables(spec)
    if when == "gone":
        victim.unlink()
    else:
        pq.write_table(make_table(9, 100), victim)
    with pytest.raises(InputChanged, match=r"part-01\.parquet (changed while it was in use|was in the input)"):
        prepare(spec, tables)


def test_a_bundle_with_one_byte_changed_is_refused(
    ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)
    with pytest.raises(SystemExit):
        main(["train", write_spec(good_spec(tmp_path), tmp_path), "--json"])
    uri = Path(json.loads(capfd.readouterr().out)["uri"])
    registry = str(tmp_path / "registry")
    # reserved.json says who took the number; it is no part of the bundle.
    files = sorted(file for file in uri.iterdir() if file.name != "reserved.json")
    assert len(files) >= 5
    for file in files:
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[len(changed) // 2] ^= 1
        file.write_bytes(bytes(changed))
        for arguments in (["models", "verify", "parcels"], ["evaluate", "parcels:1", "--data", str(tmp_path / "data")]):
            code, error, _ = fail([*arguments, "--json", "--registry", registry], capfd)
            assert (code, error["kind"]) == (1, "BundleError")
            assert file.name in error["message"], file
        file.write_bytes(whole)
    with pytest.raises(SystemExit) as ended:
        main(["models", "verify", "parcels", "--registry", registry])
    assert ended.value.code == 0


def test_a_version_that_exists_is_never_written_again(
    ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)
    spec = write_spec(good_spec(tmp_path), tmp_path)
    (tmp_path / "registry" / "parcels" / "2").mkdir(parents=True)  # somebody took it, and was killed
    (tmp_path / "registry" / "parcels" / "2" / "model.ubj").write_bytes(b"theirs")
    found = []
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["train", spec, "--json"])
        found.append(json.loads(capfd.readouterr().out)["version"])
    assert found == [3, 4]
    assert (tmp_path / "registry" / "parcels" / "2" / "model.ubj").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "message"),
    [
        (["models", "show", "../etc"], "BundleError|StorageError|RegistryError|SpecError", None, "etc"),
        (["models", "show", "a/b"], "SpecError", 2, "a/b"),
        (["models", "show", "nobody"], "RegistryError", 1, "nobody"),
        (["models", "promote", "nobody:3"], "RegistryError", 1, "nobody"),
        (["models", "rollback", "a..b"], "SpecError", 2, r"a\.\.b"),
        (["runs", "show", "../x"], "RegistryError|SpecError|StorageError", None, "x"),
        (["evaluate", "nobody", "--data", "x"], "RegistryError", 1, "nobody"),
        (["evaluate", "nobody"], "UsageError", 2, "--data"),
        (["train", "nowhere.yaml"], "SpecError", 2, "nowhere.yaml"),
        (["train"], "UsageError", 2, "(?i)spec"),
        (["plan"], "UsageError", 2, "(?i)spec"),
        (["trian", "x"], "UsageError", 2, "trian"),
        (["train", "x.yaml", "--sett", "a=b"], "UsageError", 2, "--sett"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    arguments: list[str], kind: str, code: int | None, message: str, ray_cluster: None, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found, error, _ = fail([*arguments, "--json"], capfd)
    assert re.fullmatch(kind, error["kind"])
    assert found in (1, 2) if code is None else found == code
    assert re.search(message, error["message"])
    assert list(tmp_path.iterdir()) == []


def good_spec(folder: Path) -> dict[str, Any]:
    """A spec that trains, over three files of 100 rows."""
    path = write_files(folder / "data", cut(GOOD, 3))
    return spec_of(path, folder / "registry", split={"test": {"fraction": 0.2}}, model__rounds=2)


def write_spec(tree: dict[str, Any], folder: Path) -> str:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False))
    return str(path)


def fail(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, the error of the JSON, and stderr, of a command that must fail without a traceback."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capfd.readouterr()
    assert "Traceback" not in err + out
    tree = json.loads(out)
    assert set(tree) == {"error"}
    assert set(tree["error"]) == {"kind", "message", "problems"}
    assert isinstance(ended.value.code, int)
    return ended.value.code, tree["error"], err


def assert_clean(registry: Path, name: str) -> None:
    """Nothing is registered; what is there is runs that say that they failed, and why."""
    if not registry.exists():
        return
    assert {p.name for p in registry.iterdir()} <= {"_runs"}
    for run in (registry / "_runs").iterdir() if (registry / "_runs").exists() else ():
        facts = json.loads((run / "run.json").read_text())
        assert (facts["state"], facts["name"]) == ("failed", name)
        assert facts["error"]


def test_all_rows_of_one_class_in_training_is_told(ray_cluster: None, tmp_path: Path) -> None:
    # Both classes occur, but only one of them in the rows that are trained on: allowed, and the metrics say so.
    table = make_table(0, 200)
    late = np.arange(200) >= 150
    at = table.column_names.index("late")
    write_files(tmp_path / "data", [table.set_column(at, "late", pa.array(late.astype(np.int64)))])
    spec = load_spec(TrainSpec, spec_of(tmp_path / "data", tmp_path / "r", split={"test": {"where": "row >= 150"}}))
    prepared = prepare(spec, open_tables(spec))
    assert prepared.target.classes == (0, 1)
    assert prepared.parts["test"].n_rows == 50


@pytest.mark.parametrize("data", [{"unseen": "error", "max_categories": 3}, {"unseen": "missing"}], ids=str)
def test_held_out_categories_that_can_be_encoded_are_no_error(
    data: dict[str, Any], ray_cluster: None, tmp_path: Path
) -> None:
    tree = good_spec(tmp_path)
    rewrite(values("city", first("Nowhere")), split={"test": {"where": "city = 'Nowhere'"}})(tree, tmp_path)
    tree["data"] |= data
    spec = load_spec(TrainSpec, tree)
    assert prepare(spec, open_tables(spec)).parts["test"].n_rows == 1


def test_seen_categories_are_no_error_where_unseen_ones_are(ray_cluster: None, tmp_path: Path) -> None:
    tree = good_spec(tmp_path)
    everywhere(values("city", lambda c: [None if i % 7 == 0 else "ab"[i % 2] for i, _ in enumerate(c)]))(tree, tmp_path)
    tree["data"]["unseen"] = "error"
    spec = load_spec(TrainSpec, tree)
    assert prepare(spec, open_tables(spec)).parts["test"].n_rows > 20


def test_times_of_any_year_give_calendar_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    tree = good_spec(tmp_path)
    rewrite(values("sent", first(FAR)), data__calendar={"sent": ["month", "hour"]})(tree, tmp_path)
    trained = pipeline.train(load_spec(TrainSpec, tree), open_registry(tree["registry"]), Silent())
    table = GOOD.slice(0, 2)
    far, december = (
        values("sent", lambda _, when=when: [when, when])(table) for when in (FAR, datetime(2026, 12, 31, tzinfo=UTC))
    )
    assert trained.predictor.predict(far).equals(trained.predictor.predict(december))
    profile = json.loads((tmp_path / "registry" / "parcels" / "1" / "profile.json").read_text())
    assert profile["columns"]["sent"]["max"] == int(FAR.timestamp()) * 10**9


def test_an_infinite_prediction_leaves_metrics_out_and_a_model_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    tree = good_spec(tmp_path)
    rewrite(values("km", first(1e9)), data__label="parcels", data__drop=["row", "w", "late", "hours"],
            model={"kind": "linear", "loss": "poisson"},
            split={"test": {"where": "km > 1e8"}})(tree, tmp_path)  # fmt: skip
    trained = pipeline.train(load_spec(TrainSpec, tree), open_registry(tree["registry"]), Silent())
    assert trained.summary["metrics"]["test"]["rmse"] is None
    assert [w for w in trained.summary["warnings"] if w.startswith("rmse, mae, ") and "on test" in w]
    version = tmp_path / "registry" / "parcels" / "1"
    manifest = json.loads((version / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["warnings"] == trained.summary["warnings"]
    report = (version / "report.html").read_text()
    assert "cannot be drawn" in report
    assert trained.summary["warnings"][0] in report


def test_ids_among_the_features_are_told_before_they_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    monkeypatch.setattr(statistics, "MAX_DISTINCT", 100)
    tree = good_spec(tmp_path)
    everywhere(values("city", lambda c: [f"{x}-{i}" for i, x in enumerate(c)]))(tree, tmp_path)
    spec = load_spec(TrainSpec, tree)
    with pytest.raises(DataError, match=r"'city' .* more than 100 distinct values, as ids have; drop it"):
        prepare(spec, open_tables(spec))
