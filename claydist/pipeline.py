"""The product in one function: from a spec to an evaluated, registered model.

Each step is one call whose argument is the result of the one before; what a step needs is decided before it starts.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from claydist import cluster
from claydist.bundle import golden_rows, read_bundle, write_bundle
from claydist.dataset.reader import read_pieces
from claydist.dataset.shards import Piece
from claydist.dataset.statistics import run_and_show
from claydist.display import Display, with_restarts
from claydist.errors import ClaydistError, DataError, RegistryError, TrainingError
from claydist.evaluate import ALL_ROWS, Evaluation, EvaluationPlan, evaluate
from claydist.memory import check_memory
from claydist.models import LinearModel, Model, XGBoostModel
from claydist.places import check_shared
from claydist.predictor import Predictor
from claydist.preparation import Prepared, Tables, memory_bytes, open_tables, plan_workers, prepare
from claydist.registry import Registry
from claydist.reporting.data import report_data
from claydist.reporting.html import render_report
from claydist.runs import (
    RESUMABLE_S,
    Run,
    clean_runs,
    find_unfinished,
    process_facts,
    public_spec,
    spec_digest,
    start_run,
)
from claydist.spec import TrainSpec, XGBoostSpec
from claydist.training.driver import TrainResult, train_on_ray
from claydist.training.goals import decide_promotion, deciding_metric, judge
from claydist.training.job import TrainJob, plan_part, versions


@dataclass
class Clock:
    """Seconds by stage, and the run's file kept up to date with the stage."""

    display: Display
    run: Run
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as this stage."""
        self.display.stage(name)
        self.run = self.run.update(stage=name)
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
        self.display.done()


@dataclass(frozen=True)
class Trained:
    """A training that came to its end: a registered version and what it is worth."""

    name: str
    version: int
    uri: str
    predictor: Predictor
    summary: Mapping[str, Any]
    why: str

    @property
    def goals_met(self) -> bool:
        """False when a goal was missed."""
        return all(goal["met"] for goal in self.summary["goals"])


def train(
    spec: TrainSpec, registry: Registry, display: Display, *, resume: bool = False, promote: bool = True
) -> Trained:
    """The model that the spec asks for, trained on the connected cluster, evaluated, registered, perhaps promoted.

    Raises
    ------
    ClaydistError : of the kind that says what is wrong; nothing is registered then.
    """
    registry.check_writable()
    layout = plan_workers(spec)  # what can never run is refused, and is no run
    clock = Clock(display, start_run(registry, "train", spec, spec.name))
    if not resume:
        display.run(clock.run.run_id)
    try:
        with clock.stage("inventory"):
            tables = open_tables(spec)
        resumed = _open_run(clock, spec, registry, tables, layout, resume=resume)
        if resume:
            display.run(clock.run.run_id)
        with clock.run.kept_alive(), _cache(clock.run, tables) as cache_dir:
            trained = _train(spec, registry, tables, layout, clock, cache_dir, promote=promote, resumed=resumed)
    except BaseException as e:
        clock.run.fail(e)
        raise
    clock.run.finish(version=trained.version, promoted=trained.summary["promoted"])
    clean_runs(registry)
    return trained


def _train(
    spec: TrainSpec, registry: Registry, tables: Tables, layout: cluster.Layout, clock: Clock, cache_dir: str,
    *, promote: bool, resumed: bool,
) -> Trained:  # fmt: skip
    display = clock.display
    with clock.stage("statistics"):
        check_shared(clock.run.store)
        if not layout.scales:
            # Tasks wait for a CPU without a word and without an end.
            cluster.wait_for_room(cluster.Layout(1, 1), spec.train.wait_s, display.say)
        prepared = prepare(spec, tables, cache_dir, display)
        # Parameters are checked before the memory, which is estimated by them.
        job = _job(spec, prepared, clock.run, cache_dir)
        if not layout.scales:
            check_memory(spec, prepared, clock.run.facts["layout"])
    for warning in prepared.warnings:
        display.say(warning)
    with clock.stage("training"):
        # A resumed run keeps its layout, which this cluster may not hold.
        planned = cluster.plan_layout(
            cluster.nodes(), job.n_workers, job.n_threads, memory_per_worker=memory_bytes(spec),
            autoscaler_cpus=cluster.autoscaler_cpus(),
        )  # fmt: skip
        cluster.wait_for_room(planned, spec.train.wait_s, display.say)
        result = train_on_ray(job, spec.train, memory_bytes(spec), with_restarts(display))
    predictor = Predictor(prepared.plan, _model(result, spec, prepared), prepared.target, spec.data.offset)
    with clock.stage("evaluation"):
        evaluations = {
            name: _evaluate(_evaluation_plan(predictor, prepared, spec, name, cache_dir), name, display)
            for name in prepared.judged_parts
        }
        doubts = _doubts(result, evaluations)
        for doubt in doubts:
            display.say(doubt)
        goals = _judge(spec, evaluations)
        champion = _judge_champion(spec, registry, prepared, evaluations, cache_dir, display)
    with clock.stage("registration"):
        prepared = replace(prepared, warnings=(*prepared.warnings, *doubts))
        return _register(spec, registry, prepared, job, result, predictor, evaluations, goals, champion,
                         promote, clock, resumed)  # fmt: skip


@contextmanager
def _cache(run: Run, tables: Tables) -> Iterator[str]:
    """The folder, on every node, where remote bytes of the run are kept; removed at the end."""
    cache_dir = str(Path(gettempdir()) / f"claydist-{run.run_id}")
    try:
        yield cache_dir
    finally:
        if tables.is_remote:
            with suppress(Exception):  # a node that is gone took its cache with it
                cluster.run_on_every_node(_remove_cache, cache_dir)


def _open_run(
    clock: Clock, spec: TrainSpec, registry: Registry, tables: Tables, layout: cluster.Layout, *, resume: bool
) -> bool:
    """Go on with the clock's run, or with an unfinished one in its place, and say which of the two by True.

    World size, threads and versions are frozen with the run.
    """
    here = versions()
    if resume:
        found = find_unfinished(registry, "train", spec_digest(spec), tables.fingerprint)
        if found and found.state == "running" and not found.is_mine:
            raise TrainingError(
                f"run {found.run_id} of this spec is still going on, as process {found.facts['pid']} of "
                f"{str(found.facts['host']).partition('/')[0]}; wait for its end, or end it first: a run whose process "
                f"is gone counts as lost a minute later"
            )
        if found and found.facts.get("versions", here) != here:
            clock.display.say(
                f"run {found.run_id} was made with other versions of {_other(found, here)}; starting a new one"
            )
        elif found and found.facts.get("layout"):
            clock.display.say(f"resuming run {found.run_id}, which came to {found.facts['stage']}")
            begun, clock.run = clock.run, found.update(state="running", error=None, ended_at=None, **process_facts())
            begun.store.remove(recursive=True)
            return True
        else:
            clock.display.say("no unfinished run of this spec and input; starting a new one")
    frozen = {"n_workers": layout.n_workers, "n_threads": layout.n_threads}
    clock.run = clock.run.update(inventory=tables.fingerprint, layout=frozen, versions=here)
    return False


def _other(run: Run, here: Mapping[str, str]) -> str:
    """The libraries whose versions are not those of the run."""
    then = run.facts["versions"]
    return ", ".join(f"{name} ({then.get(name)}, now {here[name]})" for name in here if then.get(name) != here[name])


def _job(spec: TrainSpec, prepared: Prepared, run: Run, cache_dir: str) -> TrainJob:
    frozen = run.facts["layout"]
    parts = {name: prepared.parts[name] for name in prepared.trained_parts}
    shards = plan_part(parts["train"], frozen["n_workers"])
    return TrainJob(
        run_id=run.run_id,
        run=run.store,
        parts=parts,
        shards={name: shards if name == "train" else plan_part(part, len(shards)) for name, part in parts.items()},
        plan=prepared.plan,
        target=prepared.target,
        roles=prepared.roles,
        model=spec.model,
        params=prepared.model_params(spec, frozen["n_threads"]),
        seed=spec.seed,
        n_workers=len(shards),
        n_threads=frozen["n_threads"],
        checkpoint_s=spec.train.checkpoint_s,
        cache_dir=cache_dir,
    )


def _remove_cache(path: str) -> None:
    """Remove a run's cache on this node, and those that killed drivers have left long ago."""
    shutil.rmtree(path, ignore_errors=True)
    for other in Path(path).parent.glob("claydist-[0-9]*T[0-9]*-*"):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > RESUMABLE_S:
                shutil.rmtree(other, ignore_errors=True)


def _model(result: TrainResult, spec: TrainSpec, prepared: Prepared) -> Model:
    raw = result.outcome["model"]
    if isinstance(spec.model, XGBoostSpec):
        return XGBoostModel(raw, prepared.target.task)
    return LinearModel.from_arrays(raw)


def _evaluation_plan(
    predictor: Predictor, prepared: Prepared, spec: TrainSpec, name: str, cache_dir: str
) -> EvaluationPlan:
    slices = list(dict.fromkeys([*spec.slices, *(goal.slice for goal in spec.goals if goal.slice)]))
    depths = sorted({int(g.metric.partition("@")[2]) for g in spec.goals if "@" in g.metric})
    return EvaluationPlan(
        predictor, prepared.parts[name], weight=spec.data.weight, group=spec.data.group, slices=tuple(slices),
        depths=tuple(depths), prior=prepared.prior, profile=spec.data, cache_dir=cache_dir,
        origins={name: profile.origin for name, profile in prepared.profiles.items()},
    )  # fmt: skip


def _evaluate(plan: EvaluationPlan, name: str, display: Display) -> Evaluation:
    return evaluate(plan, run_and_show(display, plan.part.counts, f"tasks of {name}"))


def _judge(spec: TrainSpec, evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    on = judging_part(evaluations)
    return judge(spec.goals, evaluations[on].metrics, evaluations[on].slices, on)


def judging_part(parts: Mapping[str, Any]) -> str:
    """The part that goals are judged on: test, else valid, else the training rows themselves."""
    return next(name for name in ("test", "valid", "train") if name in parts)


@dataclass(frozen=True)
class Champion:
    """The version to beat when the candidate was judged.

    Attributes
    ----------
    version : None where there is none.
    value : its metric on the candidate's test rows; None where it cannot be judged.
    objection : why the two cannot be compared at all; empty where they can.
    """

    version: int | None
    value: float | None = None
    objection: str = ""


def _judge_champion(
    spec: TrainSpec,
    registry: Registry,
    prepared: Prepared,
    evaluations: Mapping[str, Evaluation],
    cache_dir: str,
    display: Display,
) -> Champion:
    """The champion as it is now, judged on the candidate's test rows."""
    version = registry.alias_version(spec.name)
    if version is None or "test" not in evaluations:
        return Champion(version)
    try:
        predictor = read_bundle(registry.version_store(spec.name, version)).predictor
        theirs, ours = predictor.target, prepared.target
        is_other = (theirs.task, theirs.column, theirs.above) != (ours.task, ours.column, ours.above)
        if is_other or theirs.quantiles != ours.quantiles or (ours.task == "binary" and theirs.classes != ours.classes):
            return Champion(version, objection="the champion predicts another label; promote by hand if it shall go")
        # The constant model and the profile are the candidate's: they need not fit the champion's classes and columns.
        plan = replace(_evaluation_plan(predictor, prepared, spec, "test", cache_dir), prior=None, profile=None)
        theirs_on_test = _evaluate(plan, "test by the champion", display)
        return Champion(version, theirs_on_test.metrics.get(deciding_metric(spec.goals, ours.task)))
    except DataError:
        return Champion(version)  # trained on other columns, say: it cannot stand in the way
    except ClaydistError as e:
        return Champion(version, objection=f"the champion could not be judged: {e}; compare and promote by hand")


def _register(
    spec: TrainSpec, registry: Registry, prepared: Prepared, job: TrainJob, result: TrainResult, predictor: Predictor,
    evaluations: Mapping[str, Evaluation], goals: list[dict[str, Any]], champion: Champion, promote: bool,
    clock: Clock, resumed: bool,
) -> Trained:  # fmt: skip
    on = judging_part(evaluations)
    metric = deciding_metric(spec.goals, prepared.target.task)
    promoted, why = decide_promotion(
        goals=goals, metric=metric, candidate=evaluations[on].metrics.get(metric), champion=champion.value,
        has_champion=champion.version is not None, has_test="test" in evaluations, allowed=promote,
        objection=champion.objection,
    )  # fmt: skip
    if promoted and registry.alias_version(spec.name) != champion.version:
        promoted, why = False, "another version became champion meanwhile; compare and promote by hand"
    version = registry.reserve(spec.name)
    store = registry.version_store(spec.name, version)
    baseline = evaluations[on].baseline
    summary = {
        "model": spec.name, "version": version, "uri": store.url, "task": prepared.target.task,
        "rows": {n: prepared.parts[n].n_rows if n in prepared.parts else 0 for n in ("train", "valid", "test")},
        "metrics": {
            **{name: evaluation.metrics for name, evaluation in evaluations.items()},
            "baseline": baseline.values() if baseline else {},
        },
        "goals": goals, "promoted": promoted, "workers": job.n_workers, "threads": job.n_threads,
        "restarts": result.n_restarts, "resumed": resumed, "peak_mb": round(result.peak_mb, 1),
        "seconds": {name: round(took, 3) for name, took in clock.seconds.items()},
        "warnings": list(prepared.warnings),
    }  # fmt: skip
    manifest = {
        **{key: value for key, value in summary.items() if key not in ("model", "uri")},
        "name": spec.name, "kind": spec.model.kind, "run": job.run_id, "spec": public_spec(spec),
        "schema": predictor.schema.to_json(), "slices": evaluations[on].slices, "promotion": why,
        "inventory": prepared.parts["train"].inventory.to_json(),
        "trained": _facts(result), "unseen": {name: dict(e.unseen) for name, e in evaluations.items()},
        "versions": versions(), "golden": golden_rows(_some_rows(prepared), predictor),
    }  # fmt: skip
    report = render_report(report_data(manifest, predictor, evaluations, result.outcome["history"], prepared.profiles))
    extra = {
        "profile.json": json.dumps(_profile(prepared, evaluations[on])).encode(),
        "report.html": report.encode(),
    }
    write_bundle(store, predictor, manifest=manifest, extra_files=extra)
    if promoted:
        try:
            registry.promote(spec.name, version, why=why, expected=champion.version)
        except RegistryError as e:  # another trainer was faster, in the last moment
            summary["promoted"], why = False, e.message
    return Trained(spec.name, version, store.url, predictor, summary, why)


def _doubts(result: TrainResult, evaluations: Mapping[str, Evaluation]) -> list[str]:
    """What a person should know of a model before they use it, as warnings."""
    doubts = []
    if result.outcome.get("converged") is False:
        doubts.append(
            f"the fit did not converge: the largest gradient is {result.outcome['gradient_max']:.3g} after "
            f"{result.outcome['n_rounds']} iterations; raise model.max_iter or model.tolerance"
        )
    for name, evaluation in evaluations.items():
        if infinite := evaluation.sums[ALL_ROWS].infinite():
            doubts.append(
                f"{', '.join(infinite)} on {name} have no finite value, for some prediction is too large; "
                f"look for outliers in these rows"
            )
    return doubts


def _facts(result: TrainResult) -> dict[str, Any]:
    """What training says of itself, without the model."""
    facts = {k: v for k, v in result.outcome.items() if k not in ("model", "history")}
    return {**facts, "trained_at": datetime.now(UTC).isoformat(timespec="seconds")}


def _profile(prepared: Prepared, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "rows": prepared.parts["train"].n_rows,
        "columns": {name: profile.to_json() for name, profile in prepared.profiles.items()},
        "scores": evaluation.scores.to_json(),
    }


def _some_rows(prepared: Prepared, n_rows: int = 32) -> Any:
    """Some raw rows of the training part, to be predicted again wherever the bundle is loaded."""
    part = prepared.parts["train"]
    file, group = next((f, g) for f, counts in enumerate(part.counts) for g, rows in enumerate(counts) if rows)
    piece = Piece(file, group, 0, min(n_rows, part.counts[file][group]))
    columns = [column.name for column in prepared.plan.schema.columns]
    return next(iter(read_pieces(part.inventory, (piece,), columns, part.selection)))
