from __future__ import annotations

import json
from typing import Any

from claydist.registry import open_registry
from claydist.runs import public_spec, spec_digest, start_run
from claydist.spec import ScoreSpec, TrainSpec
from claydist.specfile import load_spec


def train_spec(**data: Any) -> TrainSpec:
    tree = {"path": "in.parquet", "label": "y", "storage_options": {"token": "hunter2"}, **data}
    apart = {"path": ["sftp://me:hunter2@h/v", "plain/v"]}
    return load_spec(TrainSpec, {"name": "m", "data": tree, "model": {"kind": "linear"}, "split": {"valid": apart}})


def test_no_credential_is_written_down() -> None:
    signed = "https://acct.blob.core.windows.net/c/x.parquet?sig=hunter2"
    spec = train_spec(path=[signed, "abfss://raw@acct/t", "data/a?.parquet"])
    run = start_run(open_registry("memory://runs-secrets"), "train", spec, spec.name, "x")
    tree = run.store.join("run.json").read_json()["spec"]
    assert "hunter2" not in run.store.join("run.json").read().decode()
    assert tree == public_spec(spec)
    assert tree["data"]["path"] == [signed.replace("sig=hunter2", "***"), "abfss://raw@acct/t", "data/a?.parquet"]
    assert tree["split"]["valid"]["path"] == ["sftp://***@h/v", "plain/v"]
    places = {name: f"https://me:hunter2@h/{name}?sig=hunter2" for name in ("input", "output", "registry", "model")}
    public = public_spec(load_spec(ScoreSpec, places))
    assert "hunter2" not in json.dumps(public)
    assert public["input"] == ["https://***@h/input?***"]


def test_urls_in_labels_and_expressions_are_values_of_rows() -> None:
    where, label = "page = 'https://h/x?id=1'", {"column": "y", "positive": "https://h/x?id=1"}
    data = public_spec(train_spec(where=where, label=label))["data"]
    assert (data["where"], data["label"]["positive"]) == (where, "https://h/x?id=1")
    assert spec_digest(train_spec(where=where)) != spec_digest(train_spec(where=where.replace("1", "2")))


def test_a_url_that_is_signed_anew_is_the_same_spec() -> None:
    digests = {spec_digest(train_spec(path=f"https://h/x.parquet?sig={sig}")) for sig in ("one", "two")}
    assert len(digests) == 1
    assert digests != {spec_digest(train_spec(path="https://h/y.parquet?sig=one"))}
