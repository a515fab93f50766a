"""One whole training with data, registry and runs on S3; its credentials are nowhere in what it leaves."""

from __future__ import annotations

import io
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import claydist
from claydist import pipeline
from claydist.bundle import check_golden
from claydist.cli import main
from claydist.registry import open_registry
from claydist.storage import Store, open_store
from tests.checks import run_job
from tests.stores import BUCKET, s3_options
from tests.tables import cut, make_table, spec_of

pytestmark = [pytest.mark.ray]

__all__ = ["s3_options"]
SECRET = "do-not-write-me-down"
KEY = "AKIADONOTWRITE"


@pytest.fixture
def bucket(s3_options: dict[str, Any]) -> tuple[str, Store, dict[str, Any]]:
    """URL and place of an empty folder that holds a table, and options with credentials in them."""
    options = {**s3_options, "key": KEY, "secret": SECRET}
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    place = open_store(url, options)
    for number, table in enumerate(cut(make_table(0, 500), 3)):
        sink = io.BytesIO()
        pq.write_table(table, sink)
        place.join("data", f"month={number + 1}", "part-0.parquet").write(sink.getvalue())
    return url, place, options


def write_spec(bucket: tuple[str, Store, dict[str, Any]], folder: Path, **more: Any) -> str:
    url, _, options = bucket
    tree = spec_of(f"{url}/data", f"{url}/registry", split={"test": {"where": "month = 3"}}, **more)
    tree["data"]["storage_options"] = options
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return str(path)


def check_no_secret(place: Store, *texts: str) -> None:
    """Neither key nor secret is in any file below a place, nor in what was printed."""
    files = place.files()
    assert len(files) > 5
    for file in files:
        data = place.join(*file.path.split("/")).read()
        assert SECRET.encode() not in data, file.path
        assert KEY.encode() not in data, file.path
    for text in texts:
        assert SECRET not in text
        assert KEY not in text


@pytest.mark.slow
def test_a_whole_training_on_s3_by_ray_train(
    bucket: tuple[str, Store, dict[str, Any]], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, place, options = bucket
    given = ["--set", "train.workers=2", "--set", "train.cpus_per_worker=1", "--set", "train.checkpoint_s=0"]
    with pytest.raises(SystemExit) as ended:
        main(["train", write_spec(bucket, tmp_path, model__rounds=30), *given, "--json"])
    out, err = capfd.readouterr()
    assert ended.value.code == 0, out
    tree = json.loads(out)
    assert (tree["uri"], tree["promoted"], tree["workers"]) == (f"{url}/registry/parcels/1", True, 2)
    assert sum(tree["rows"].values()) == 500
    check_no_secret(place.join("registry"), out, err)
    bundle = claydist.load("parcels", open_registry(f"{url}/registry", options=options))
    check_golden(bundle)
    table = make_table(0, 500).append_column("month", pa.array([1] * 500))
    assert bundle.predict(table).num_rows == 500


def test_an_error_on_s3_shows_no_credentials(
    bucket: tuple[str, Store, dict[str, Any]], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)
    _, place, _ = bucket
    place.join("data", "month=2", "part-0.parquet").write(b"PAR1 but not really PAR1")
    with pytest.raises(SystemExit) as ended:
        main(["train", write_spec(bucket, tmp_path), "--json"])
    out, err = capfd.readouterr()
    assert ended.value.code == 1
    assert json.loads(out)["error"]["kind"] == "DataError"
    assert "month=2/part-0.parquet" in out
    assert "Traceback" not in err
    assert SECRET not in out + err
    assert KEY not in out + err
    assert not [name for name in place.join("registry").list() if name != "_runs"]


def test_a_bucket_that_is_not_there_is_an_error_before_anything_else(
    bucket: tuple[str, Store, dict[str, Any]], ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", write_spec(bucket, tmp_path), "--registry", "s3://no-such-bucket-here/registry", "--json"])
    out, _ = capfd.readouterr()
    assert ended.value.code == 1
    error = json.loads(out)["error"]
    assert error["kind"] == "StorageError"
    assert "s3://no-such-bucket-here" in error["message"]
    assert SECRET not in out


def test_the_environment_alone_is_enough(
    bucket: tuple[str, Store, dict[str, Any]], s3_options: dict[str, Any], ray_cluster: None, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # The commands on models have no spec to take storage options from.
    monkeypatch.setattr(pipeline, "train_on_ray", run_job)
    url, _, _ = bucket
    with pytest.raises(SystemExit) as ended:
        main(["train", write_spec(bucket, tmp_path), "--json"])
    assert ended.value.code == 0, capfd.readouterr().out
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_options["endpoint_url"])
    capfd.readouterr()
    for arguments in (
        ["models", "verify", "parcels"],
        ["models", "show", f"{url}/registry/parcels/1"],
        ["report", "parcels"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--registry", f"{url}/registry", "--json"])
        assert ended.value.code == 0, capfd.readouterr().out
        assert "error" not in json.loads(capfd.readouterr().out)
