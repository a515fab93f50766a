from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from claydist import spec
from claydist.api import _checked
from claydist.errors import SpecError
from claydist.spec import ScoreSpec, TrainSpec
from claydist.specfile import load_spec

ROOT = Path(__file__).parent.parent
PLAIN: dict[str, Any] = {"name": "m", "data": {"path": "x", "label": "y"}, "model": {"kind": "xgboost"}}
LINEAR: dict[str, Any] = {**PLAIN, "model": {"kind": "linear"}}

# DESIGN section 11, with what stands there as default.
DEFAULTS: dict[str, Any] = {
    "data.format": "parquet", "data.storage_options": {}, "data.weight": None, "data.offset": None,
    "data.group": None, "data.features": None, "data.drop": (), "data.key": (), "data.types": {},
    "data.calendar": {}, "data.max_categories": 1000, "data.unseen": "missing", "data.where": None,
    "split.valid": None, "split.test": None, "model.task": None, "model.rounds": 100,
    "model.early_stopping": None, "model.params": {}, "model.objective": None, "model.quantiles": (),
    "model.monotone": {}, "model.interactions": (), "model.binning": "exact", "train.workers": "auto",
    "train.cpus_per_worker": "auto", "train.memory_gb": None, "train.max_failures": 3, "train.timeout_s": 600,
    "train.wait_s": 600, "train.checkpoint_s": 60, "train.device": "cpu", "goals": (), "slices": (), "seed": 0,
    "registry": None,
}  # fmt: skip
LINEAR_DEFAULTS: dict[str, Any] = {
    "model.loss": None, "model.l1": 0, "model.l2": 1, "model.tolerance": 1e-8, "model.max_iter": 200,
    "model.solver": "auto", "model.missing_indicator": False,
}  # fmt: skip


def at(checked: BaseModel, path: str) -> Any:
    value: Any = checked
    for key in path.split("."):
        value = value[key] if isinstance(value, Mapping) else getattr(value, key)
    return value


def problems(tree: Any, kind: type[Any] = TrainSpec, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        load_spec(kind, tree, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems or (caught.value.message,)


def with_key(path: str, value: Any, tree: Mapping[str, Any] = PLAIN) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    return {**tree, first: with_key(rest, value, tree.get(first) or {}) if rest else value}


@pytest.mark.parametrize(("path", "value"), DEFAULTS.items())
def test_defaults_of_the_design(path: str, value: Any) -> None:
    assert at(load_spec(TrainSpec, PLAIN), path) == value


@pytest.mark.parametrize(("path", "value"), LINEAR_DEFAULTS.items())
def test_defaults_of_linear_models(path: str, value: Any) -> None:
    assert at(load_spec(TrainSpec, LINEAR), path) == value


def test_every_field_is_described() -> None:
    kinds = [kind for kind in vars(spec).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    fields = {f"{kind.__name__}.{name}": f.description for kind in kinds for name, f in kind.model_fields.items()}
    assert len(fields) > 60
    assert [name for name, description in fields.items() if not description] == []


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_specs_of_the_jobs_load(file: Path) -> None:
    kind = ScoreSpec if "input" in yaml.safe_load(file.read_text()) else TrainSpec
    assert load_spec(kind, file)
    assert len(list((ROOT / "jobs").glob("*.yaml"))) >= 4


def test_label_by_name_and_one_path() -> None:
    checked = load_spec(TrainSpec, PLAIN)
    assert (checked.data.label.column, checked.data.path) == ("y", ("x",))
    assert load_spec(TrainSpec, with_key("data.path", ["a", "b"])).data.path == ("a", "b")


def test_all_problems_at_once_each_with_its_path() -> None:
    tree = {
        "name": "Not A Name", "data": {"path": [], "label": {"colunm": "y"}, "max_categories": 0},
        "model": {"kind": "xgboost", "rouns": 5, "rounds": "many"}, "train": {"workers": 0},
        "goals": [{"metric": "auk", "at_least": 1}, {"metric": "auc"}], "sede": 1,
        "split": {"valid": {"fraction": 1.5}},
    }  # fmt: skip
    found = problems(tree)
    starts = [
        "name: expected a name", "data.path: ", "data.label.column: required and not given",
        "data.label.colunm: unknown key; did you mean 'column'?", "data.max_categories: ",
        "model.rouns: unknown key; did you mean 'rounds'?", "model.rounds: ", "train.workers",
        "goals.0.metric: unknown metric 'auk'; did you mean 'auc'?", "goals.1: expected exactly one of at_least",
        "sede: unknown key; did you mean 'seed'?", "split.valid.fraction: ",
    ]  # fmt: skip
    for start in starts:
        assert any(p.startswith(start) for p in found), (start, found)


@pytest.mark.parametrize(("path", "near"), [
    ("model.max_itre", "max_iter"), ("train.worker", "workers"), ("data.labels", "label"),
    ("split.tset", "test"), ("goal", "goals"),
])  # fmt: skip
def test_unknown_key_names_the_nearest_of_its_own_mapping(path: str, near: str) -> None:
    assert f"{path}: unknown key; did you mean {near!r}?" in problems(with_key(path, 1, LINEAR))


def test_unknown_key_of_the_other_kind_lists_what_there_is() -> None:
    (problem,) = problems(with_key("model.zzz", 1, LINEAR))
    assert problem.startswith("model.zzz: unknown key; known keys: ")
    assert "l2" in problem
    assert "rounds" not in problem


def test_unknown_key_in_goals_and_split_parts() -> None:
    assert problems({**PLAIN, "goals": [{"metric": "auc", "at_lest": 1}]})[0].endswith("did you mean 'at_least'?")
    assert problems(with_key("split.test", {"fracton": 0.1}))[0].endswith("did you mean 'fraction'?")


@pytest.mark.parametrize(("tree", "problem"), [
    (with_key("model", {"kind": "forest"}), "model.kind: expected 'xgboost' or 'linear', found 'forest'"),
    (with_key("model", {}), "model.kind: expected 'xgboost' or 'linear', found None"),
    (with_key("model", "xgboost"), "model"),
    (with_key("model", None), "model"),
    (with_key("data", [1]), "data"),
    ({**PLAIN, "name": "a..b"}, "name: expected a name"),
    ({**PLAIN, "name": "x" * 64}, "name: expected a name"),
    (with_key("data.weight", "y"), "data: column 'y' is both label and weight"),
    (with_key("data.features", ["y"]), "data: features names ['y']"),
    (with_key("data.features", ["a", "a"]), "data: features names a column twice"),
    ({**PLAIN, "data": {**PLAIN["data"], "features": ["a"], "drop": ["b"]}}, "data: features and drop exclude"),
    (with_key("split.test", {}), "split.test: expected one of fraction, by"),
    (with_key("split.test", {"where": "a", "path": "b"}), "split.test: expected one of"),
    (with_key("split.test", {"where": "a", "fraction": 0.5}), "split.test: expected one of"),
    (with_key("model.early_stopping", 5), "spec: model.early_stopping needs rows to watch"),
    ({**PLAIN, "split": {"valid": {"fraction": 0.5}, "test": {"fraction": 0.5}}}, "spec: split: fractions [0.5, 0.5]"),
    (with_key("model.params", {"seed": 1, "nthread": 2}), "model: params.nthread is set by train.cpus_per_worker; p"),
    (with_key("model.params", {"booster": "gblinear"}), "model: params.booster: expected gbtree or dart"),
    (with_key("model.params", {"tree_method": "exact"}), "model: params.tree_method"),
    ({**PLAIN, "split": {"valid": {"fraction": 0.1}},
      "model": {"kind": "xgboost", "early_stopping": 5, "params": {"booster": "dart"}}},
     "model: early_stopping with params.booster dart: each round changes"),
    (with_key("model.quantiles", [0.5, 1.0]), "model.quantiles.1"),
    (with_key("model", {"kind": "linear", "l1": 1, "solver": "newton"}), "model: solver 'newton' cannot have l1"),
    ({**PLAIN, "goals": [{"metric": "auc", "at_least": 0.1, "at_most": 1}]}, "goals.0: expected exactly one"),
    ({**PLAIN, "goals": [{"metric": "auc@3", "at_least": 0.1}]}, "goals.0.metric: unknown metric 'auc@3'"),
    ({**PLAIN, "goals": [{"metric": "ndcg@0", "at_least": 0.1}]}, "goals.0.metric: unknown metric 'ndcg@0'"),
    ({**PLAIN, "goals": [{"metric": "auc", "at_least": float("nan")}]}, "goals.0.at_least"),
    ({**PLAIN, "seed": -1}, "seed"),
    ({**PLAIN, "registry": ""}, "registry"),
])  # fmt: skip
def test_wrong_by_itself(tree: Any, problem: str) -> None:
    (found,) = problems(tree)
    assert found.startswith(problem), found


def test_by_takes_a_fraction_and_ndcg_a_depth() -> None:
    tree = {**PLAIN, "split": {"test": {"by": "day", "fraction": 0.3}}, "goals": [{"metric": "ndcg@5", "at_least": 0}]}
    checked = load_spec(TrainSpec, tree)
    assert checked.split.test is not None
    assert (checked.split.test.by, checked.split.test.fraction) == (("day",), 0.3)


@pytest.mark.parametrize(("item", "path", "value"), [
    ("model.params.max_depth=6", "model.params.max_depth", 6),
    ("model.params.eta=0.1", "model.params.eta", 0.1),
    ("model.rounds=7", "model.rounds", 7),
    ("data.drop=[a, 'b c', é]", "data.drop", ("a", "b c", "é")),
    ("data.where=origin = 'JFK' and a >= 2", "data.where", "origin = 'JFK' and a >= 2"),
    ("data.label=z", "data.label.column", "z"),
    ("data.label={column: z, above: 3}", "data.label.above", 3),
    ("split.test={fraction: 0.25}", "split.test.fraction", 0.25),
    ("split.test.where=month = 11", "split.test.where", "month = 11"),
    ("goals=[{metric: auc, at_least: 0.5}]", "goals.0.metric", None),
    ("registry=s3://b/r?x=1", "registry", "s3://b/r?x=1"),
    ("seed=3", "seed", 3),
    ("model.early_stopping=null", "model.early_stopping", None),
])  # fmt: skip
def test_set_overrides_any_key(item: str, path: str, value: Any) -> None:
    checked = load_spec(TrainSpec, PLAIN, [item])
    if path == "goals.0.metric":
        assert checked.goals[0].metric == "auc"
    else:
        assert at(checked, path) == value


def test_set_goes_into_a_label_given_by_name() -> None:
    checked = load_spec(TrainSpec, PLAIN, ["data.label.above=15"])
    assert (checked.data.label.column, checked.data.label.above) == ("y", 15)
    checked = load_spec(TrainSpec, PLAIN, ["data.label.column=z"])
    assert checked.data.label.column == "z"


def test_set_of_a_list_item() -> None:
    tree = {**PLAIN, "goals": [{"metric": "auc", "at_least": 0.5}]}
    assert load_spec(TrainSpec, tree, ["goals.0.at_least=0.7"]).goals[0].at_least == 0.7
    for item in ("goals.1.at_least=0.7", "goals.x=1", "goals.-1=1"):
        assert "none of the 1 items" in problems(tree, overrides=(item,))[0]


@pytest.mark.parametrize(("item", "problem"), [
    ("rounds", "expected KEY=VALUE"), ("=5", "expected KEY=VALUE"), ("a=[1", "not YAML"),
    ("name.x=1", "leads through name, which is not"), ("name.column=1", "leads through name"),
    ("model.kind.x.y=1", "leads through model.kind"), ("goals.0.metric=auc", "goals"),
    ("model..rounds=3", "expected KEY=VALUE"),
])  # fmt: skip
def test_set_that_leads_nowhere(item: str, problem: str) -> None:
    (found,) = problems(PLAIN, overrides=(item,))
    assert problem in found


def test_set_leaves_the_given_mapping_as_it_is() -> None:
    before = yaml.safe_dump(PLAIN)
    load_spec(TrainSpec, PLAIN, ["model.params.max_depth=6", "data.drop=[a]"])
    assert yaml.safe_dump(PLAIN) == before


def test_specs_are_frozen() -> None:
    checked = load_spec(TrainSpec, PLAIN)
    with pytest.raises(ValidationError, match="frozen"):
        checked.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        checked.data.where = "x"  # type: ignore[misc]


def test_storage_options_are_never_shown() -> None:
    secret = {"key": "AKIA-visible", "secret": "s3cr3t"}
    checked = load_spec(TrainSpec, with_key("data.storage_options", secret))
    assert "s3cr3t" not in repr(checked)
    assert "s3cr3t" not in str(checked)
    score = load_spec(ScoreSpec, {"model": "m", "input": "x", "output": "y", "storage_options": secret})
    assert "s3cr3t" not in repr(score)
    wrong = {**PLAIN, "data": {**PLAIN["data"], "label": {}, "storage_options": secret}}
    assert "s3cr3t" not in str(problems(wrong))
    assert "s3cr3t" not in str(problems(with_key("data.storage_options", "s3cr3t")))
    assert "s3cr3t" not in str(problems(PLAIN, overrides=("data.storage_options.secret=[s3cr3t",)))


@pytest.mark.parametrize(("text", "problem"), [
    ("a: [1", "is not YAML"), ("- 1", "expected a mapping of keys, found list"),
    ("", "expected a mapping of keys, found NoneType"), ("a: !!python/object:os.system x", "is not YAML"),
])  # fmt: skip
def test_file_that_is_no_spec(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(text, encoding="utf-8")
    assert problem in problems(str(file))[0]


@pytest.mark.parametrize(("text", "line"), [
    ('a: 1\nstorage_options: {key: A, secret: "s3cr3t\nb: 1\n', 4), ("storage_options:\n  secret: s3cr3t: 1\n", 2),
    ("secret: *s3cr3t", 1), ("secret: !s3cr3t x", 1), ("secret: !s3!cr3t x", 1), ("&s3cr3t a: &s3cr3t b", 1),
])  # fmt: skip
def test_a_mistake_in_yaml_is_told_by_its_line_and_not_by_its_text(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
    [problem] = problems(tmp_path / "spec.yaml")
    assert "cr3t" not in problem
    assert f", in line {line}, column " in problem


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no spec at" in problems(tmp_path / "absent.yaml")[0]
    assert "cannot read the spec" in problems(tmp_path)[0]
    (tmp_path / "latin").write_bytes("name: é".encode("latin-1"))
    assert "cannot read the spec" in problems(tmp_path / "latin")[0]


def test_number_keys_are_a_problem_and_not_a_traceback() -> None:
    assert problems({**PLAIN, 5: 1})
    assert problems({**PLAIN, "goals": {"metric": "auc"}})


def test_score_spec_wants_a_whole_date() -> None:
    base = {"model": "m", "input": "x", "output": "y"}
    assert "expected year, month and day" in problems({**base, "date": {"year": "y"}}, ScoreSpec)[0]
    assert load_spec(ScoreSpec, {**base, "date": {"year": "y", "month": "m", "day": "d"}}).date


def test_python_gives_numbers_and_paths_of_its_libraries() -> None:
    spec = {**PLAIN, "data": {**PLAIN["data"], "path": Path("/x")}}
    params = {"eta": np.float64(0.5)}
    found = _checked(TrainSpec, spec, {"model__rounds": np.int64(5), "model__params": params,
                                       "data__drop": np.array(["a"]), "registry": Path("/r")})  # fmt: skip
    assert (found.model.rounds, found.data.path, found.data.drop, found.registry) == (5, ("/x",), ("a",), "/r")
    assert type(found.model.params["eta"]) is float
    with pytest.raises(SpecError, match=r"model\.rounds"):
        _checked(TrainSpec, PLAIN, {"model__rounds": object()})
