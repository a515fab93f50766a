"""The specs' keys as Markdown tables, made from the models of spec.py.

README holds the result between two markers. After a change of spec.py `python -m claydist.reference` puts it there
anew, and a test holds the two equal.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from claydist.errors import SpecError
from claydist.serving.settings import ServeSpec
from claydist.spec import ScoreSpec, TrainSpec

BEGIN = "<!-- reference: made by `python -m claydist.reference` -->"
END = "<!-- end of the reference -->"
_TABLE_HEAD = "| key | takes | default | meaning |\n|---|---|---|---|\n"
_SPECS: dict[str, type[BaseModel]] = {
    "Training spec": TrainSpec,
    "Scoring spec": ScoreSpec,
    "Serving: `args` of a Serve config": ServeSpec,
}
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
_LONGEST_CHOICE = 8


def make_reference() -> str:
    """The tables of all specs, as Markdown."""
    return "\n".join(f"#### {title}\n\n{_TABLE_HEAD}{''.join(_rows(spec))}" for title, spec in _SPECS.items())


def put_reference(text: str) -> str:
    """The text with the reference, as it is now, between the markers.

    Raises
    ------
    SpecError : when the text does not have both markers, once and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or END in after:
        raise SpecError(f"expected {BEGIN!r} and, below it, {END!r}, each once; put them back")
    return f"{before}{BEGIN}\n\n{make_reference()}\n{END}{after}"


def _rows(model: type[BaseModel]) -> Iterator[str]:
    return _rows_below(model, "", {})


def _rows_below(model: type[BaseModel], path: str, described: dict[Any, str]) -> Iterator[str]:
    """One row a key; a model that several keys take is written out under the first of them."""
    texts = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        key = f"{path}{name}"
        models = _models_in(field.annotation)
        if len(models) > 1:
            yield from _rows_by_kind(models, key, described)
            continue
        takes = _takes(field.annotation)
        if {"type": "string", "minLength": 1} in _choices(texts[name]) and "text" not in takes.split(" or "):
            takes = f"text or {takes}"
        same = described.get(models[0]) if models else None
        yield _row(key, takes, _default(field), _cell(field.description) + (f"; keys as in `{same}`" if same else ""))
        if models and not same:
            described[models[0]] = key
            yield from _rows_below(models[0], f"{key}[]." if _is_list(field.annotation) else f"{key}.", described)


def _rows_by_kind(models: list[type[BaseModel]], key: str, described: dict[Any, str]) -> Iterator[str]:
    for model in models:
        (kind,) = get_args(model.model_fields["kind"].annotation)
        yield _row(f"{key}.kind: {kind}", "", "required", _cell(model.__doc__))
        yield from (row for row in _rows_below(model, f"{key}.", described) if not row.startswith(f"| `{key}.kind`"))


def _choices(schema: dict[str, Any]) -> list[Any]:
    return [{k: v for k, v in one.items() if k in ("type", "minLength")} for one in schema.get("anyOf", ())]


def _row(key: str, takes: str, default: str, meaning: str) -> str:
    return f"| `{key}` | {takes} | {default} | {meaning} |\n"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).rstrip(".").replace("|", "\\|")


def _takes(annotation: Any) -> str:
    """What may be written, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_takes(a) for a in args if a is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in args[:_LONGEST_CHOICE])
    if origin is tuple:
        return f"list of {_takes(args[0])}"
    if origin is dict:
        return f"mapping of {_takes(args[0])} to {_takes(args[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return _WORDS[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        given = {name: getattr(value, name) for name in value.model_fields_set}
        return ", ".join(f"`{name}: {each}`" for name, each in given.items())
    if value is None or value in ((), {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an optional, a list or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for a in get_args(annotation) for found in _models_in(a)]


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def main(path: Path) -> None:
    """Put the reference into the file at `path`."""
    path.write_text(put_reference(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "README.md"))
