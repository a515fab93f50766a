"""Arguments -> spec -> one call -> output. `claydist COMMAND --help` shows an example of each.

Exit codes: 0 done; 1 an error that needed the data or the cluster to be seen; 2 usage, or a spec that is wrong by
itself; 3 goals missed; 4 locked by another run; 5 a gate refused to publish.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from claydist import __version__
from claydist.cluster import prepare_environment

prepare_environment()

# Ray reads its environment when it is imported, which the modules below may do.
from claydist.display import display, json_lines  # noqa: E402
from claydist.errors import ClaydistError, ClusterError, GoalsMissed, SpecError  # noqa: E402
from claydist.output import (  # noqa: E402
    Address,
    AsJson,
    LogJson,
    Output,
    RegistryUrl,
    Verbose,
    metrics_table,
    show_number,
)
from claydist.registry_commands import models_app, report, runs_app  # noqa: E402

app = typer.Typer(
    name="claydist", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.add_typer(models_app, name="models")
app.add_typer(runs_app, name="runs")

Sets = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE: override a key of the spec; repeatable.")]
SpecPath = Annotated[Path, typer.Argument(help="The YAML spec.", show_default=False)]


class Terminated(BaseException):
    """SIGTERM, as `ray job stop` and a preempted node send it."""


@contextlib.contextmanager
def _ray(address: str | None, verbose: bool) -> Iterator[None]:
    from claydist.cluster import connected

    with connected(address, verbose=verbose):
        # Ray's own handler would end the process with the signal's number; a run should note that it was interrupted.
        signal.signal(signal.SIGTERM, _terminate)
        import ray

        try:
            yield
        except ray.exceptions.RayError as e:
            raise ClusterError(f"the cluster was lost ({type(e).__name__}: {_first_line(e)}); run again") from e


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


def _terminate(signum: int, frame: Any) -> None:
    raise Terminated


def _print_version(asked: bool) -> None:
    if asked:
        print(f"claydist {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train tabular models on a cluster, score tables every night and answer online, on Ray."""


@app.command()
def quickstart(
    dir: Annotated[Path, typer.Option("--dir", help="Where its table, registry and scores go.")] = Path("quickstart"),
    as_json: AsJson = False,
    address: Address = None,
    verbose: Verbose = False,
    log_json: LogJson = False,
) -> None:
    """Make a realistic table, train both families on it, promote the better one, score the newest day.

    Example: `claydist quickstart`
    """
    from claydist.quickstart import run_quickstart

    with _ray(address, verbose), display(log_json=log_json) as shown:
        result = run_quickstart(dir, shown)
    Output(as_json).result(result.summary, result.text)


@app.command()
def plan(
    spec: Annotated[Path | None, typer.Argument(help="The YAML spec.", show_default=False)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of the spec and end.")] = False,
    sets: Sets = None,
    as_json: AsJson = False,
    registry: RegistryUrl = None,
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Show what training would do, by footers alone: files, rows, columns, workers, memory.

    Example: `claydist plan jobs/flights.yaml`
    """
    from claydist.spec import TrainSpec
    from claydist.specfile import load_spec

    if schema:
        print(json.dumps(TrainSpec.model_json_schema(), indent=1))
        return
    if spec is None:
        raise typer.BadParameter("give a SPEC, or --schema")
    checked = load_spec(TrainSpec, spec, sets or ())
    from claydist.places import registry_of
    from claydist.plan import make_plan, plan_table

    with _ray(address, verbose):
        made = make_plan(checked, registry_of(checked, registry))
    Output(as_json).result(made, plan_table(made))


@app.command()
def train(
    spec: SpecPath,
    sets: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last unfinished run of this spec.")] = False,
    no_promote: Annotated[bool, typer.Option("--no-promote", help="Leave promotion to a person.")] = False,
    as_json: AsJson = False,
    registry: RegistryUrl = None,
    address: Address = None,
    verbose: Verbose = False,
    log_json: LogJson = False,
) -> None:
    """Train, evaluate, register and perhaps promote a model. Exit 3 when it misses a goal.

    Example: `claydist train jobs/flights.yaml --set model.rounds=100`
    """
    from claydist.spec import TrainSpec
    from claydist.specfile import load_spec

    checked = load_spec(TrainSpec, spec, sets or ())
    from claydist.pipeline import train as run
    from claydist.places import registry_of

    with _ray(address, verbose), display(log_json=log_json) as shown:
        trained = run(checked, registry_of(checked, registry), shown, resume=resume, promote=not no_promote)
    Output(as_json).result(trained.summary, _verdict(trained))
    if not trained.goals_met:
        raise typer.Exit(GoalsMissed.exit_code)


@app.command()
def evaluate(
    ref: Annotated[
        str | None, typer.Argument(help="NAME, NAME@ALIAS, NAME:VERSION or a bundle's URL.", show_default=False)
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="URL of labelled Parquet; repeatable.")] = None,
    where: Annotated[str | None, typer.Option("--where", help="Expression: only these rows.")] = None,
    slices: Annotated[
        list[str] | None, typer.Option("--slice", help="Expression: these rows apart; repeatable.")
    ] = None,
    scores: Annotated[str | None, typer.Option("--scores", help="URL of published scores, instead of REF.")] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="URL of their labels, once they arrive.")] = None,
    as_json: AsJson = False,
    registry: RegistryUrl = None,
    address: Address = None,
    verbose: Verbose = False,
    log_json: LogJson = False,
) -> None:
    """Exact metrics of a model on a labelled table, or of published scores once their labels have arrived.

    Example: `claydist evaluate flight-delay --data s3://tables/flights17`
    """
    if scores and labels and not (ref or data or where):
        from claydist.scoring.judge import evaluate_scores

        with _ray(address, verbose), display(log_json=log_json) as shown:
            tree = evaluate_scores(scores, labels, slices=slices or (), display=shown)
    elif ref and data and not scores and not labels:
        from claydist.assessment import evaluate_reference
        from claydist.registry import open_registry

        with _ray(address, verbose), display(log_json=log_json) as shown:
            opened = open_registry(registry)
            tree = evaluate_reference(ref, tuple(data), opened, where=where, slices=slices or (), display=shown)
    else:
        raise typer.BadParameter("give REF --data URL [--where E], or --scores URL --labels URL")
    Output(as_json).result(tree, metrics_table({"all": tree["metrics"], **tree["slices"]}))


@app.command()
def score(
    spec: SpecPath,
    date: Annotated[str | None, typer.Option("--date", help="Score this date, e.g. 2026-11-21.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Score the dates from this one on; without --to those found.")
    ] = None,
    stop: Annotated[str | None, typer.Option("--to", help="Score the dates up to this one.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Score published dates again.")] = False,
    replace_stale: Annotated[
        bool, typer.Option("--replace-stale", help="Score dates again whose model, input or spec has changed.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another run's lock instead of ending with 4.")] = False,
    sets: Sets = None,
    as_json: AsJson = False,
    registry: RegistryUrl = None,
    address: Address = None,
    verbose: Verbose = False,
    log_json: LogJson = False,
) -> None:
    """Score a table and publish each date whole, once, or not at all. Exit 4 when locked, 5 when a gate refuses.

    Example: `claydist score jobs/score-flights.yaml --date 2013-01-01`
    """
    from claydist.spec import ScoreSpec
    from claydist.specfile import load_spec

    checked = load_spec(ScoreSpec, spec, sets or ())
    from claydist.places import scoring_registry
    from claydist.scoring.choice import Choice
    from claydist.scoring.run import score as run

    Choice.of(date, start, stop, replace, replace_stale, wait)  # a wrong date needs no cluster to be seen
    with _ray(address, verbose), display(log_json=log_json) as shown:
        opened = scoring_registry(checked, registry)
        done = run(
            checked, opened, shown, date=date, start=start, stop=stop, replace=replace, replace_stale=replace_stale,
            wait=wait,
        )  # fmt: skip
    Output(as_json).result(done.summary, done.describe())
    raise typer.Exit(done.exit_code)


@app.command()
def serve(
    refs: Annotated[list[str], typer.Argument(help="References of the models.", show_default=False)],
    host: Annotated[str, typer.Option("--host", help="Where to listen; only loopback without keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port.")] = 8000,
    replicas: Annotated[
        int | None, typer.Option("--replicas", help="Copies of the server, one CPU each; 1 by default.")
    ] = None,
    keys_file: Annotated[Path | None, typer.Option("--keys-file", help="API keys, one a line.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML of further settings: limits, batch.")] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate (PEM), for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its private key (PEM).")] = None,
    as_json: AsJson = False,
    registry: RegistryUrl = None,
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Answer online with models of the registry, until Ctrl-C; follows their aliases.

    Example: `claydist serve flight-delay --port 8000`
    """
    from claydist.serving.run import serve as run
    from claydist.serving.run import tls_options
    from claydist.specfile import read_yaml

    keys = None if keys_file is None else str(keys_file)
    tree = run(
        refs, registry=registry, host=host, port=port, replicas=replicas, keys_file=keys, address=address,
        verbose=verbose, settings=None if config is None else read_yaml(config),
        tls=tls_options(tls_cert, tls_key),
    )  # fmt: skip
    Output(as_json).result(tree)


app.command()(report)


def _verdict(trained: Any) -> Table:
    s = trained.summary
    parts = {name: values for name, values in s["metrics"].items() if values}
    promoted = "promoted" if s["promoted"] else "not promoted"
    table = metrics_table(parts)
    table.title = f"{s['model']}:{s['version']}  {promoted}: {trained.why}"
    goals = "\n".join(
        f"{'✓' if g['met'] else '✗'} {g['metric']} {g['bound'].replace('_', ' ')} {g['target']:g}"
        f"{' where ' + g['slice'] if g['slice'] else ''}: {show_number(g['value'])} on {g['on']}" for g in s["goals"]
    )  # fmt: skip
    table.caption = f"{goals}\n{s['uri']}".strip()
    return table


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with the exit code of the command."""
    given = sys.argv[1:] if arguments is None else arguments
    output = Output("--json" in given, log_json="--log-json" in given)
    json_lines.cache_clear()
    try:
        code = app(args=given, standalone_mode=False)
    except ClaydistError as e:
        output.error(e.kind, e.message, e.problems)
        code = e.exit_code
    except typer.Exit as e:
        code = e.exit_code
    except (typer.Abort, KeyboardInterrupt):
        output.error("Interrupted", "interrupted; go on with --resume (train), or by the same command (score)")
        code = 130
    except Terminated:
        output.error("Terminated", "terminated; go on with --resume (train), or by the same command (score)")
        code = 143
    except Exception as e:
        if not hasattr(e, "format_message"):
            raise
        if message := e.format_message():  # a group of commands alone has printed its help and has none
            output.error("UsageError", message)
        code = SpecError.exit_code
    sys.exit(code or 0)
