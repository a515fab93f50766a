import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from claydist.metrics import MetricSums, Outcome
from claydist.reporting.curves import curves
from claydist.reporting.html import render_report, render_scored
from claydist.reporting.plots import plot_history

HOSTILE = '<script>alert("x")</script>&\'" $\\frac{1}{2}$ http://evil.example/ü'
VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)

    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def outcome_of(task: str) -> tuple[Outcome, dict]:
    rng = np.random.default_rng(0)
    if task == "multiclass":
        return Outcome(rng.integers(0, 3, 300), rng.dirichlet(np.ones(3), 300)), {"n_classes": 3}
    if task == "regression":
        return Outcome(rng.normal(size=300), rng.normal(size=300)), {}
    group = rng.integers(0, 9, 300).astype(np.uint64)
    return Outcome(rng.integers(0, 2, 300), rng.random(300), group=group), {}


def report_of(task: str, name: str = "flight-delay") -> dict:
    outcome, settings = outcome_of(task)
    sums = MetricSums(task, **settings)
    sums.add(outcome)
    goal = {"metric": "auc", "bound": "at_least", "target": 0.75, "met": True, "on": "test"}
    data = {
        "model": {"name": name, "version": 3, "kind": "xgboost", "task": task, "classes": [name, "b", "c"]},
        "promoted": False,
        "why": name,
        "goals": [{**goal, "value": 0.8, "slice": None}, {**goal, "value": None, "met": False, "slice": name}],
        "metrics": {"valid": sums.values(), "test": sums.values(), "baseline": {"auc": None}},
        "curves": curves(sums),
        "curves_on": "test",
        "history": {"metric": name, "train": [1.0, 0.5, None], "valid": [1.0, 0.6, 0.7], "best_round": 1},
        "importance": [{"feature": f"{name}{i}", "gain": 1.0 / (i + 1)} for i in range(40)],
        "coefficients": [{"feature": name, "standardised": -1.5, "original": 2e-9}],
        "slices": [{"slice": name, "rows": 10, "metrics": {"auc": None, "logloss": 0.5}}],
        "profile": [
            {"feature": name, "type": "category", "nulls": 0.25, "top": [[name, 0.5]], "psi_valid": 0.3},
            {"feature": "day", "type": "numeric", "nulls": 0.0, "mean": 1.5, "min": 0, "max": 3, "psi_valid": 0.0},
        ],
        "rows": {"train": 229213, "valid": 0, "test": 65411},
        "stages": {"training": 12.5, name: 0.25},
        "memory_mb": {"worker 0": 812.0},
        "notes": [name],
        "lineage": {"digest": "3f1b", "versions": {"xgboost": "3.2.0", name: None}},
    }
    return json.loads(json.dumps(data))


SCORED = {
    "name": HOSTILE,
    "date": "2026-11-21",
    "status": "published",
    "model": {"name": "m", "version": 3},
    "rows": 1203332,
    "quarantined": 2,
    "gates": [
        {"gate": "null_fraction", "value": 0.0, "warn": None, "fail": 0.0, "outcome": "pass"},
        {"gate": "psi_training", "value": 0.31, "warn": 0.25, "fail": None, "outcome": "warn"},
    ],
    "scores": {"edges": [0.1, 0.5], "actual": [0.2, 0.5, 0.3], "training": [0.3, 0.4, 0.3]},
    "quarantine": [{"reason": HOSTILE, "rows": 2}],
    "notes": [HOSTILE],
    "lineage": {"input": HOSTILE},
}


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression", "ranking"])
def test_a_full_report_is_well_formed_and_has_every_section(task):
    page = Page(render_report(report_of(task)))
    assert page.sections() == [
        "verdict", "metrics", "history", "curves", "importance", "coefficients", "slices", "profile", "resources",
        "notes", "lineage",
    ]  # fmt: skip
    drawn = {"binary": 4, "multiclass": 1, "regression": 3, "ranking": 2}
    assert page.count("svg") == drawn[task]
    assert page.count("table") == page.count("caption")
    assert "Rows: train 229,213, test 65,411" in page.text
    assert page.text.count("✗ missed") == 1
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("text", [render_report(report_of("binary", HOSTILE)), render_scored(SCORED)])
def test_hostile_names_are_only_text_and_nothing_is_fetched(text):
    page = Page(text)
    assert page.count("script") == 0
    assert HOSTILE in page.text
    attributes = [(name, value or "") for _, attrs in page.tags for name, value in attrs.items()]
    outside = [(name, value) for name, value in attributes if re.search(r"//|javascript:|^on", value + name)]
    assert {name for name, _ in outside} <= {"xmlns", "xmlns:xlink", "aria-label"}
    assert not {"src", "srcset", "action"} & {name for name, _ in attributes}
    assert all(value.startswith("#") for name, value in attributes if name in ("href", "xlink:href"))
    assert not re.search(r"@import|url\((?!#)", text)


def test_every_plot_has_a_name_for_those_who_do_not_see_it():
    page = Page(render_report(report_of("binary")))
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert {attrs["role"] for attrs in plots} == {"img"}
    assert all(attrs["aria-label"] for attrs in plots)


def test_plots_take_the_colours_of_the_page():
    text = render_report(report_of("binary"))
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--first)" in svg
    assert "currentColor" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"(url\(|href=\")#\S+", "", svg))


def test_absent_keys_leave_their_section_out():
    assert Page(render_report({})).sections() == []
    assert Page(render_report({"model": {"name": "m"}, "notes": ["n"]})).sections() == ["notes"]
    assert Page(render_scored({"status": "failed", "why": "psi"})).sections() == ["verdict"]


def test_the_same_data_gives_the_same_bytes():
    assert render_report(report_of("binary")) == render_report(report_of("binary"))


def test_long_tables_are_cut_and_say_so():
    many = [{"feature": f"f{i}" * 50, "type": "category", "top": [["c" * 500, 0.1]] * 50} for i in range(5_000)]
    text = render_report({**report_of("binary"), "profile": many, "importance": [{"feature": "f", "gain": 1}] * 5_000})
    assert len(text.encode()) < 1_000_000
    assert "the first 300 of 5,000" in text
    assert "the first 30 of 5,000" in text


def test_numbers_read_well():
    values = {"a": 0.123456, "b": 1234567, "c": 98.7654, "d": 1e-9, "e": float("nan"), "f": None, "g": -0.5, "h": 4e7}
    text = render_report({"metrics": {"test": values}})
    cells = re.findall(r'<td class="n">(.*?)</td>', text)
    assert cells == ["0.1235", "1,234,567", "98.77", "1.000e-09", "–", "–", "-0.5000", "40,000,000"]


def test_a_scored_date_shows_its_gates_and_quarantine():
    page = Page(render_scored(SCORED))
    assert page.sections() == ["verdict", "gates", "scores", "quarantine", "notes", "lineage"]
    assert "1,203,332" in page.text
    assert "! warn" in page.text
    assert 'class="verdict warn"' in render_scored(SCORED)
    assert 'class="verdict bad"' in render_scored({**SCORED, "status": "failed"})


def test_coefficients_are_in_the_order_of_their_size_and_a_single_output_is_not_named():
    rows = [{"feature": f, "output": o, "standardised": s, "original": 1.0} for f, o, s in
            (("a", 0, 0.5), ("b", 0, -2.0), ("c", 1, 1.0))]  # fmt: skip
    several, single = (render_report({"coefficients": given}) for given in (rows, rows[:2]))
    assert "Largest standardised first" in several
    assert re.findall(r'<th scope="row">(.)</th>', several) == ["b", "c", "a"]
    assert re.findall(r'<th scope="row">(.)</th>', single) == ["b", "a"]
    assert ">output<" in several
    assert ">output<" not in single


def test_the_seconds_of_a_scored_date_are_tenths():
    assert "12.3" in Page(render_scored({**SCORED, "seconds": 12.34})).text


def test_a_metric_of_some_rounds_is_a_line() -> None:
    values = [0.9 if at == 0 else 0.8 - at / 1000 if at % 10 == 9 else None for at in range(60)]
    svg = str(plot_history({"metric": "logloss", "train": values, "valid": None, "best_round": None}))
    paths = re.findall(r'<path d="([^"]*)" clip-path', svg)
    assert max(path.count("L") for path in paths) == sum(value is not None for value in values) - 1
