"""From a YAML file, or a mapping, to a checked spec: overrides, and every problem at once with its path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from claydist.errors import SpecError

Spec = TypeVar("Spec", bound=BaseModel)


def load_spec(
    kind: type[Spec], source: str | Path | Mapping[str, Any], overrides: Iterable[str | tuple[str, Any]] = ()
) -> Spec:
    """The checked spec of a YAML file or mapping, after `key.path=value` overrides.

    Parameters
    ----------
    kind : TrainSpec or ScoreSpec.
    source : path of a YAML file, or the mapping itself.
    overrides : items like `model.params.max_depth=6`, whose value is read as YAML, or pairs of key and value.

    Raises
    ------
    SpecError : with every problem and its path, e.g. `model.rouns: unknown key; did you mean 'rounds'?`.
    """
    where = "the given mapping" if isinstance(source, Mapping) else str(source)
    tree = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    for item in overrides:
        tree = _override(tree, item)
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        problems = [_explain(kind, error) for error in e.errors()]
        raise SpecError(f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)} in the spec", problems) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file.

    Raises
    ------
    SpecError : when there is no such file, or it holds no mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"no spec at {path}; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"cannot read the spec {path}: {e}") from None
    except yaml.YAMLError as e:
        raise SpecError(f"{path} is not YAML: {_yaml_problem(e)}") from None
    if not isinstance(tree, dict):
        raise SpecError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where; never the line itself, nor a name from it, which may be a credential."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    problem = re.sub(r"(alias|tag|tag handle) ['\"].*", r"\1", error.problem or "it cannot be read")
    return f"{problem}, in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def _override(tree: dict[str, Any], item: str | tuple[str, Any]) -> dict[str, Any]:
    key, value = _read_item(item) if isinstance(item, str) else item
    keys = key.split(".")
    if not all(keys):
        raise SpecError(f"--set {key!r}: expected KEY=VALUE, e.g. model.params.max_depth=6")

    def put(node: Any, depth: int) -> Any:
        if depth == len(keys):
            return value
        part = keys[depth]
        if isinstance(node, (list, tuple)):
            if not part.isdecimal() or int(part) >= len(node):
                raise SpecError(f"--set {key!r}: {part!r} is none of the {len(node)} items, counted from 0")
            return [put(old, depth + 1) if i == int(part) else old for i, old in enumerate(node)]
        if isinstance(node, str) and keys[:depth] == ["data", "label"]:
            node = {"column": node}
        if not isinstance(node, (Mapping, type(None))):
            raise SpecError(f"--set {key!r} leads through {'.'.join(keys[:depth])}, which is not a mapping")
        return {**(node or {}), part: put((node or {}).get(part), depth + 1)}

    return put(tree, 0)


def _read_item(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals:
        raise SpecError(f"--set {key!r}: expected KEY=VALUE, e.g. model.params.max_depth=6")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(f"--set {key!r}: the value is not YAML; quote it, or close its brackets") from None


def _explain(kind: type[BaseModel], error: Any) -> str:
    """One problem as `path: what is wrong`, with the nearest right key for one that is unknown."""
    tags = {"xgboost", "linear"}
    loc = [part for i, part in enumerate(error["loc"]) if not (part in tags and i and error["loc"][i - 1] == "model")]
    path = ".".join(str(part) for part in loc) or "spec"
    if error["type"] == "extra_forbidden":
        known = _known_keys(kind, error["loc"][:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{path}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{path}: required and not given"
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return f"{path}.kind: expected 'xgboost' or 'linear', found {error.get('input', {}).get('kind')!r}"
    message = error["msg"].removeprefix("Value error, ")
    found = error.get("input")
    is_plain = isinstance(found, (str, int, float, bool)) and "storage_options" not in loc
    shown = f", found {found!r}" if is_plain and "found" not in message else ""
    return f"{path}: {message}{shown}"


def _known_keys(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    """Keys of the model that the path leads to."""
    for part in loc:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation if part in kind.model_fields else kind
        kind = _model_within(kind, part)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _model_within(annotation: Any, tag: Any) -> Any:
    """The model class inside an optional, a tuple or a tagged union; the annotation itself where there is none."""
    if get_origin(annotation) is None:
        return annotation
    inner = [_model_within(a, tag) for a in get_args(annotation)]
    models = [m for m in inner if isinstance(m, type) and issubclass(m, BaseModel)]
    tagged = [m for m in models if "kind" in m.model_fields and tag in get_args(m.model_fields["kind"].annotation)]
    if tagged:
        return tagged[0]
    if len(models) > 1:
        return Union[tuple(models)]  # noqa: UP007  the members are only known at run time
    return models[0] if models else annotation
