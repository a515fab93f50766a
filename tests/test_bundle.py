from __future__ import annotations

import base64
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xgboost as xgb
from hypothesis import given, settings
from hypothesis import strategies as st

from claydist.bundle import (
    PROTOCOL,
    Bundle,
    check_golden,
    golden_rows,
    read_bundle,
    read_manifest,
    versions,
    write_bundle,
)
from claydist.errors import AlreadyExists, BundleError
from claydist.features import Feature, FeaturePlan
from claydist.models import XGBoostModel
from claydist.predictor import Predictor, Target
from claydist.schema import Column, Schema
from claydist.storage import Store, open_store, sha256
from tests.stores import s3_options, store

__all__ = ["s3_options", "store"]

EXTRA = {"report.html": "<p>na\u00efve \u6f22</p>".encode(), "profile.json": b"{}"}
CITIES = ("K\u00f8benhavn", "\u6771\u4eac")
OLD_BUNDLES = Path(__file__).parent / "data"


def make_table(n_rows: int = 200) -> pa.Table:
    rng = np.random.default_rng(0)
    x = rng.normal(size=n_rows)
    x[3] = np.nan
    return pa.table(
        {
            "unused": pa.array(range(n_rows)),
            "x": pa.array(x, from_pandas=True),
            "day": pa.array([datetime(2026, 1, 1 + i % 28, tzinfo=UTC) for i in range(n_rows)]),
            "city": pa.array([None if i == 7 else CITIES[i % 3 > 0] for i in range(n_rows)]),
        }
    )


def make_predictor() -> Predictor:
    table = make_table()
    plan = FeaturePlan(
        Schema((Column("city", "string"), Column("x", "float"), Column("day", "timestamp", "UTC"))),
        (
            Feature("city", "city", "categorical", vocabulary=CITIES),
            Feature("x", "x", "numeric"),
            Feature("day", "day", "seconds", origin_ns=1_767_225_600 * 10**9),
        ),
    )
    y = np.nan_to_num(table.column("x").to_numpy()) + np.arange(len(table)) % 3
    matrix = plan.tree_matrix(plan.encode(table))
    data = xgb.DMatrix(matrix, y, feature_names=plan.names, feature_types=plan.kinds, enable_categorical=True)
    raw = bytes(xgb.train({"max_depth": 3, "nthread": 1}, data, 10).save_raw("ubj"))
    return Predictor(plan, XGBoostModel(raw, "regression"), Target("regression", "y"))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return make_predictor()


@pytest.fixture(scope="module")
def facts(predictor: Predictor) -> dict[str, Any]:
    return {
        "name": "m",
        "version": 3,
        "metrics": {"test": {"rmse": 0.1 + 0.2, "r2": float("nan"), "n": np.int64(3)}, "baseline": [np.float32(0.5)]},
        "golden": golden_rows(make_table(), predictor),
    }


@pytest.fixture
def written(tmp_path: Path, predictor: Predictor, facts: dict[str, Any]) -> Store:
    place = open_store(tmp_path / "bundle")
    write_bundle(place, predictor, manifest=facts, extra_files=EXTRA)
    return place


def reseal(place: Store, change: Any) -> None:
    """Change the manifest and seal it again, as a person with time would; what is left to find is in the content."""
    from claydist.bundle import _seal, _to_json

    manifest = place.join("manifest.json").read_json()
    change(manifest)
    place.join("manifest.json").write(_seal(_to_json(manifest)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, predictor: Predictor) -> bytes:
    place = open_store(tmp_path_factory.mktemp("whole"))
    write_bundle(place, predictor, manifest={"spec": {"name": "m", "x": 0.1}}, extra_files={})
    return place.join("manifest.json").read()


class TestEverywhere:
    def test_what_is_written_is_read_and_predicts_the_same(
        self, store: Store, predictor: Predictor, facts: dict[str, Any]
    ) -> None:
        digest = write_bundle(store, predictor, manifest=facts, extra_files=EXTRA)
        bundle = read_bundle(store)
        assert store.list() == ["features.json", "manifest.json", "model.ubj", "profile.json", "report.html"]
        assert (bundle.digest, bundle.uri) == (digest, store.url)
        assert digest == sha256(store.join("manifest.json").read())
        assert bundle.predict(make_table()).equals(predictor.predict(make_table()))
        assert bundle.read("report.html") == EXTRA["report.html"]
        check_golden(bundle)

    def test_the_manifest_says_what_the_bundle_is(
        self, store: Store, predictor: Predictor, facts: dict[str, Any]
    ) -> None:
        write_bundle(store, predictor, manifest={**facts, "versions": {"ray": "2.60.0"}}, extra_files=EXTRA)
        manifest = read_manifest(store)
        assert manifest["protocol"] == PROTOCOL
        assert manifest["metrics"] == {"test": {"rmse": 0.1 + 0.2, "r2": None, "n": 3}, "baseline": [0.5]}
        assert manifest["versions"] == {**versions(), "ray": "2.60.0"}
        assert {"claydist", "xgboost", "pyarrow", "numpy", "python"} <= manifest["versions"].keys()
        assert datetime.fromisoformat(manifest["created_at"]).utcoffset() is not None
        for name, fact in manifest["files"].items():
            assert fact == {"sha256": store.join(name).sha256(), "bytes": store.join(name).info().size}
        text = store.join("manifest.json").read().decode()
        assert json.loads(text, parse_constant=pytest.fail)["name"] == "m"
        assert "\n" in text

    def test_a_bundle_never_changes(self, store: Store, predictor: Predictor, facts: dict[str, Any]) -> None:
        write_bundle(store, predictor, manifest=facts, extra_files=EXTRA)
        before = store.files()
        with pytest.raises(AlreadyExists, match="never changes"):
            write_bundle(store, predictor, manifest={}, extra_files={})
        assert store.files() == before
        read_bundle(store)

    def test_without_its_manifest_it_is_no_bundle(self, store: Store, predictor: Predictor) -> None:
        for name, data in predictor.to_files().items():
            store.join(name).create(data)
        with pytest.raises(BundleError, match=r"expected a bundle at .*, found no manifest\.json"):
            read_bundle(store)
        with pytest.raises(AlreadyExists, match=r"features\.json"):
            write_bundle(store, predictor, manifest={}, extra_files={})
        assert not store.join("manifest.json").exists()


class TestDamage:
    @pytest.mark.parametrize("name", ["features.json", "model.ubj", "profile.json", "report.html"])
    @pytest.mark.parametrize("change", ["flip", "cut", "grow", "remove"])
    def test_a_changed_file_is_refused(self, written: Store, name: str, change: str) -> None:
        data = written.join(name).read()
        if change == "remove":
            written.join(name).remove()
        else:
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            written.join(name).write({"flip": flipped, "cut": data[:-1], "grow": data + b"\n"}[change])
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            read_bundle(written)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_any_changed_byte_of_the_manifest_is_refused(
        self, tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
    ) -> None:
        at = data.draw(st.integers(0, len(whole) - 1))
        change = data.draw(st.integers(1, 255))
        place = open_store(tmp_path_factory.getbasetemp() / "changed")
        place.join("manifest.json").write(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
        with pytest.raises(BundleError, match=r"manifest\.json (is|was written by a newer claydist, or) damaged"):
            read_manifest(place)

    @pytest.mark.parametrize("edit", [b" ", b"\n", b""])
    def test_a_manifest_longer_or_shorter_is_refused(self, written: Store, edit: bytes) -> None:
        place = written.join("manifest.json")
        place.write(place.read() + edit if edit else place.read()[:-1])
        with pytest.raises(BundleError, match="not those that it was sealed with"):
            read_manifest(written)

    @pytest.mark.parametrize("data", [b"", b"[]", b"null", b'{"protocol": true}', b"[" * 100_000, b"\xff"])
    def test_what_is_no_manifest_is_refused(self, written: Store, data: bytes) -> None:
        written.join("manifest.json").write(data)
        with pytest.raises(BundleError, match="damaged"):
            read_bundle(written)

    @pytest.mark.parametrize("protocol", [PROTOCOL + 1, 0, "1", None, True])
    def test_another_protocol_is_refused(self, written: Store, protocol: Any) -> None:
        reseal(written, lambda manifest: manifest.update(protocol=protocol))
        with pytest.raises(BundleError, match=r"written by a newer claydist, or damaged: expected protocol 1, found"):
            read_bundle(written)

    @pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", ".", "", "a\\b", ".hidden", "manifest.json"])
    def test_names_that_lead_elsewhere_are_refused(self, written: Store, name: str) -> None:
        reseal(written, lambda manifest: manifest["files"].update({name: {"sha256": sha256(b""), "bytes": 0}}))
        with pytest.raises(BundleError, match="not of files beside it"):
            read_bundle(written)

    @pytest.mark.parametrize("files", [None, [], {"model.ubj": "x"}])
    def test_a_manifest_without_facts_of_files_is_refused(self, written: Store, files: Any) -> None:
        reseal(written, lambda manifest: manifest.update(files=files))
        with pytest.raises(BundleError, match="expected the facts of every file"):
            read_bundle(written)

    def test_a_predictor_that_cannot_be_built_is_said_with_the_place(self, written: Store) -> None:
        broken = b'{"model": {"kind": "os.system"}}'
        written.join("features.json").write(broken)
        fact = {"sha256": sha256(broken), "bytes": len(broken)}
        reseal(written, lambda manifest: manifest["files"].update({"features.json": fact}))
        with pytest.raises(BundleError, match=rf"cannot build the predictor of {written.url}"):
            read_bundle(written)

    def test_a_file_that_is_not_in_the_manifest_is_not_read(self, written: Store) -> None:
        written.join("evil.py").write(b"raise SystemExit")
        assert "evil.py" not in read_bundle(written).manifest["files"]
        with pytest.raises(BundleError, match=r"no file 'evil\.py' in the bundle"):
            read_bundle(written).read("evil.py")

    @pytest.mark.parametrize("name", ["manifest.json", "a/b", "../x", ""])
    def test_our_own_mistakes_in_names_are_caught(self, tmp_path: Path, predictor: Predictor, name: str) -> None:
        with pytest.raises(AssertionError, match="not names for files"):
            write_bundle(open_store(tmp_path / "x"), predictor, manifest={}, extra_files={name: b""})
        assert open_store(tmp_path / "x").files() == []


class TestGolden:
    def test_rows_with_nulls_are_among_them_and_values_are_exact(self, predictor: Predictor) -> None:
        table = make_table()
        golden = golden_rows(table, predictor)
        rows = pa.ipc.open_stream(base64.b64decode(golden["rows"])).read_all()
        assert rows.schema.names == predictor.schema.names
        assert rows.num_rows == golden["n_rows"] == 32
        assert rows.column("x").null_count == rows.column("city").null_count == 1
        predictions = pa.ipc.open_stream(base64.b64decode(golden["predictions"])).read_all()
        assert predictions.equals(predictor.predict(rows))

    @pytest.mark.parametrize("n_rows", [1, 5, 31, 32, 33])
    def test_few_rows(self, predictor: Predictor, n_rows: int) -> None:
        golden = golden_rows(make_table().slice(0, n_rows), predictor)
        assert min(n_rows, 30) <= golden["n_rows"] <= min(n_rows, 32)

    def test_another_model_is_found_by_the_last_bit(self, written: Store, predictor: Predictor) -> None:
        bundle = read_bundle(written)

        class Off:
            def predict(self, table: pa.Table, where: str) -> pa.Table:
                values = predictor.predict(table, where).column(0).to_numpy().copy()
                values[4] = np.nextafter(values[4], np.float32(np.inf))
                return pa.table({"prediction": values})

        other = Bundle(Off(), bundle.manifest, bundle.digest, bundle.uri, bundle.store)  # type: ignore[arg-type]
        with pytest.raises(BundleError, match=r"does not repeat its golden rows(.|\n)*1 rows differ, the first is 4"):
            check_golden(other)

    @pytest.mark.parametrize(
        ("answer", "problem"),
        [
            ({"other": np.zeros(32, np.float32)}, "found 32 of"),
            ({"prediction": np.zeros(31, np.float32)}, "found 31 of"),
            ({"prediction": np.zeros(32)}, "expected float, found double"),
        ],
    )
    def test_another_shape_of_answer_is_found(self, written: Store, answer: dict[str, Any], problem: str) -> None:
        bundle = read_bundle(written)

        class Other:
            def predict(self, table: pa.Table, where: str) -> pa.Table:
                return pa.table(answer)

        with pytest.raises(BundleError, match=problem):
            check_golden(Bundle(Other(), bundle.manifest, "", bundle.uri, bundle.store))  # type: ignore[arg-type]

    def test_bits_and_not_values_are_compared(self) -> None:
        from claydist.bundle import _differences

        same = pa.table({"p": pa.array([float("nan"), 0.0, None])})
        assert _differences(same, same) == []
        assert "the first is 1" in _differences(same, pa.table({"p": pa.array([float("nan"), -0.0, None])}))[0]
        assert "the first is 2" in _differences(same, pa.table({"p": pa.array([float("nan"), 0.0, 0.0])}))[0]
        text = pa.table({"p": pa.array(["a", None])})
        assert _differences(text, text) == []
        assert len(_differences(text, pa.table({"p": pa.array(["a", "b"])}))) == 1

    @pytest.mark.parametrize("golden", [None, {}, {"rows": 1, "predictions": 1}, {"rows": "!", "predictions": "!"}])
    def test_golden_rows_that_are_none(self, written: Store, golden: Any) -> None:
        reseal(written, lambda manifest: manifest.update(golden=golden))
        with pytest.raises(BundleError, match="golden rows"):
            check_golden(read_bundle(written))


def test_reading_neither_unpickles_nor_imports_ray(written: Store) -> None:
    script = (
        "import pickle, sys\n"
        "def refuse(*a, **k): raise SystemExit('unpickled')\n"
        "from claydist.bundle import check_golden, read_bundle\n"
        "from claydist.storage import open_store\n"
        "pickle.loads = pickle.load = pickle.Unpickler = refuse\n"
        "check_golden(read_bundle(open_store(sys.argv[1])))\n"
        "assert 'ray' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", script, written.url], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_bundles_of_every_protocol_still_predict() -> None:
    found = sorted(OLD_BUNDLES.glob("bundle-*"))
    assert [path.name for path in found] == [f"bundle-{number}" for number in range(1, PROTOCOL + 1)]
    for path in found:
        check_golden(read_bundle(open_store(path)))


if __name__ == "__main__":  # python -m tests.test_bundle, on the day that a protocol is released
    made = make_predictor()
    release = {"name": "m", "version": 1, "golden": golden_rows(make_table(), made)}
    write_bundle(open_store(OLD_BUNDLES / f"bundle-{PROTOCOL}"), made, manifest=release, extra_files=EXTRA)
