from __future__ import annotations

import pickle
import re

import pytest

from claydist import errors
from claydist.errors import ClaydistError


def classes() -> list[type[ClaydistError]]:
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ClaydistError)]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("kind", classes())
@pytest.mark.parametrize("problems", [(), ("data.path: required and not given", "model.rouns: 'ü' {x} %s")])
def test_survives_pickling_with_the_same_text(kind: type[ClaydistError], problems: tuple[str, ...]) -> None:
    error = kind("expected {a}, found 'é' in s3://b/x.parquet", problems)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.args) == (kind, str(error), error.args)
    assert (again.problems, again.exit_code, again.kind) == (problems, error.exit_code, kind.__name__)


def test_text_lists_each_problem_on_its_own_line() -> None:
    assert str(ClaydistError("two problems", ["one", "two"])) == "two problems\n  - one\n  - two"
    assert str(ClaydistError("alone")) == "alone"


def test_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn: dict[str, tuple[str, int]] = {}
    path: list[str] = []
    for line in str(errors.__doc__).splitlines():
        if match := re.match(r"([│├└─ ]*)(\w+) +(\d)  \w", line):
            del path[len(match[1]) // 4 :]
            drawn[match[2]] = (path[-1] if path else "Exception", int(match[3]))
            path.append(match[2])
    assert drawn == {c.__name__: (str(c.__base__.__name__), c.exit_code) for c in classes()}
