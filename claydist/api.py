"""claydist from Python: what the commands do, on the Ray that is already initialised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from claydist.bundle import Bundle
from claydist.registry import load
from claydist.scoring.readers import read_scores
from claydist.spec import ScoreSpec, TrainSpec
from claydist.specfile import Spec, load_spec

__all__ = ["Bundle", "load", "read_scores", "score", "train"]


def train(spec: str | Path | Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Train, evaluate, register and perhaps promote a model; gives the JSON object of `claydist train`.

    Parameters
    ----------
    spec : path of a YAML spec, or the mapping itself.
    overrides : keys of the spec: `model__rounds=50`, or `**{"model.rounds": 50}`.

    Raises
    ------
    ClaydistError : of the kind that says what is wrong. A missed goal is no error: look at `goals`.
    """
    from claydist.cluster import connected
    from claydist.display import Silent
    from claydist.pipeline import train as run
    from claydist.places import registry_of

    checked = _checked(TrainSpec, spec, overrides)
    with connected():
        return dict(run(checked, registry_of(checked), Silent()).summary)


def score(
    spec: str | Path | Mapping[str, Any],
    *,
    date: str | None = None,
    start: str | None = None,
    stop: str | None = None,
    replace: bool = False,
    replace_stale: bool = False,
    wait: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Score a table and publish each date whole; gives the JSON object of `claydist score`.

    Parameters
    ----------
    spec, overrides : as of `train`.
    date, start, stop : one date, or a range with both ends; all dates of the input without.
    replace, replace_stale, wait : as the options of the command.

    Raises
    ------
    ClaydistError : as the command; of several dates what went wrong stands in `dates`.
    """
    from claydist.cluster import connected
    from claydist.display import Silent
    from claydist.places import scoring_registry
    from claydist.scoring.run import score as run

    checked = _checked(ScoreSpec, spec, overrides)
    with connected():
        done = run(
            checked, scoring_registry(checked), Silent(), date=date, start=start, stop=stop, replace=replace,
            replace_stale=replace_stale, wait=wait,
        )  # fmt: skip
    return dict(done.summary)


def _checked(kind: type[Spec], spec: str | Path | Mapping[str, Any], overrides: Mapping[str, Any]) -> Spec:
    given = _plain(spec) if isinstance(spec, Mapping) else spec
    return load_spec(kind, given, [(key.replace("__", "."), _plain(value)) for key, value in overrides.items()])


def _plain(value: Any) -> Any:
    """The value as YAML would have it: numpy's numbers and arrays, and paths, are what programs have at hand."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value) if isinstance(value, PurePath) else value
