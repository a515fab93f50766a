"""What README says is so: paths, modules, commands, specs, messages, reference, version."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import claydist
from claydist import quickstart
from claydist.cli import app
from claydist.errors import ClaydistError, SpecError
from claydist.reference import make_reference, put_reference
from claydist.serving.settings import ServeSpec
from claydist.spec import ScoreSpec, TrainSpec
from claydist.specfile import load_spec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "claydist"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _section(title: str) -> str:
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match, f"README has no section {title!r}"
    return match[1]


def _layout() -> list[str]:
    """Paths of the tree in README, as they are from the project's root."""
    paths, folders = [], []
    (tree,) = re.findall(r"```\n(.*?)```", _section("Layout"), re.DOTALL)
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, phrase = line.strip().partition(" ")
        assert phrase.strip() or name == "claydist/", f"{name} has no phrase"
        del folders[depth:]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def _command_lines() -> list[str]:
    text = "\n".join(_blocks("sh") + [line[2:] for block in _blocks("console") for line in block.splitlines()
                                      if line.startswith("$ ")])  # fmt: skip
    return [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


# The page


def test_the_first_screen_has_two_commands():
    first = README.split("\n## ")[0]
    assert re.search(r"^pip install uv && uv run claydist quickstart( |$)", first, re.MULTILINE)
    assert re.search(r"^uv run pytest( |$)", first, re.MULTILINE)


def test_links_lead_somewhere():
    anchors = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in re.findall(r"^#+ (.*)$", README, re.M)}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 20
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_every_path_of_the_layout_is_there():
    paths = _layout()
    assert len(paths) > 80
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_file_of_the_package_and_of_jobs_is_in_the_layout():
    files = {file for folder in (PACKAGE, ROOT / "jobs") for file in folder.rglob("*") if file.is_file()}
    there = {file.relative_to(ROOT).as_posix() for file in files if "__pycache__" not in file.parts}
    named = {path for path in _layout() if path.split("/")[0] in ("claydist", "jobs") and not path.endswith("/")}
    assert sorted(there - named) == [], "add them to the layout in README, each with a phrase"
    assert sorted(named - there) == []


def test_every_file_of_deploy_is_explained():
    section = _section("Jobs and clusters")
    assert not [f.name for f in (ROOT / "deploy").iterdir() if f.is_file() and f"`deploy/{f.name}`" not in section]


def test_the_newest_change_is_this_version():
    assert re.search(r"^- \*\*([\d.]+)\*\*", _section("Changes"), re.MULTILINE)[1] == claydist.__version__


# Commands


def test_every_printed_command_parses():
    root = typer.main.get_command(app)
    n_parsed = 0
    for line in _command_lines():
        match = re.match(r"(?:.*&& )?(?:uv run )?(claydist .*)", line)
        if match is None:
            continue
        words = shlex.split(match[1], comments=True)
        command, arguments = root, words[1:]
        while hasattr(command, "commands"):
            command, arguments = command.commands[arguments[0]], arguments[1:]
        command.make_context(command.name, arguments)
        n_parsed += 1
    assert n_parsed > 30


def test_every_command_has_an_example():
    def leaves(command, path):
        for name, below in getattr(command, "commands", {}).items():
            yield from leaves(below, f"{path} {name}")
        if not hasattr(command, "commands"):
            yield path

    text = "\n".join(_blocks("sh"))
    names = list(leaves(typer.main.get_command(app), "claydist"))
    assert len(names) > 12
    assert not [name for name in names if not re.search(rf"^(.* )?{name}\b", text, re.MULTILINE)]


def test_every_option_of_every_command_is_named():
    root = typer.main.get_command(app)
    options = {opt for name in ("plan", "train", "score", "evaluate", "serve", "quickstart")
               for param in root.commands[name].params for opt in param.opts if opt.startswith("--")}  # fmt: skip
    assert len(options) > 15
    assert not [option for option in options - {"--help"} if not re.search(rf"{option}\b", README)]


def test_exit_codes_are_those_of_the_errors():
    def codes(kind):
        return {kind.exit_code}.union(*(codes(below) for below in kind.__subclasses__()))

    table = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", _section("Commands"), re.M) for code in row.split(",")
    }
    assert codes(ClaydistError) | {0, 130, 143} == table


# Specs and code


def test_yaml_blocks_are_valid_specs():
    blocks = [yaml.safe_load(block) for block in _blocks("yaml")]
    assert len(blocks) >= 3
    for block in blocks:
        load_spec(TrainSpec if "name" in block else ScoreSpec, block)


def test_the_examples_are_the_specs_of_quickstart_and_of_the_job():
    shown = [yaml.safe_load(block) for block in _blocks("yaml")]
    place = Path("/srv/quickstart")
    assert shown[0] == quickstart.spec_of(place, quickstart.MODELS["xgboost"])
    assert shown[1] == quickstart.scoring_spec_of(place)
    assert shown[2] == yaml.safe_load((ROOT / "jobs" / "flights.yaml").read_text())


@pytest.mark.parametrize(("environment", "command"), [({}, "claydist"), ({"UV": "/bin/uv"}, "uv run claydist")])
def test_what_quickstart_says_to_do_next_parses(environment, command, monkeypatch):
    monkeypatch.delenv("UV", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    title, *lines = quickstart._next_steps(Path("/srv/quickstart")).splitlines()
    assert title == "Next:"
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line.removeprefix(f"  {command} "))
        assert line.startswith(f"  {command} {words[0]}")
        found = typer.main.get_command(app)
        while hasattr(found, "commands"):
            found, words = found.commands[words[0]], words[1:]
        found.make_context(found.name, words)


def test_python_blocks_are_python():
    blocks = _blocks("python")
    assert len(blocks) >= 3
    for block in blocks:
        names = {node.attr for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute)
                 and isinstance(node.value, ast.Name) and node.value.id == "claydist"}  # fmt: skip
        assert names <= set(claydist.__all__)


def test_every_public_name_is_shown():
    shown = "\n".join(_blocks("python"))
    assert not [name for name in claydist.__all__ if f"claydist.{name}(" not in shown]


def test_the_reference_is_made_from_the_specs():
    assert put_reference(README) == README, "run `python -m claydist.reference`"


def test_the_reference_has_every_key():
    reference = make_reference()
    for spec in (TrainSpec, ScoreSpec, ServeSpec):
        for name in spec.model_fields:
            assert f"| `{name}" in reference
    for key in ("data.label.above", "split.valid.fraction", "model.l2", "goals[].at_least", "gates.constant"):
        assert f"| `{key}` |" in reference


@pytest.mark.parametrize("text", ["", "<!-- end of the reference -->"])
def test_without_markers_the_reference_has_no_place(text):
    with pytest.raises(SpecError, match="put them back"):
        put_reference(text)


# Messages and variables


def _messages() -> list[str]:
    """Every text in the package, with `…` where something is filled in."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_real_messages():
    quoted = re.findall(r"^\| `(.+?)` \| ", _section("Troubleshooting"), re.MULTILINE)
    assert len(quoted) > 25
    messages = _messages()
    missing = []
    for quote in quoted:
        pieces = [re.escape(piece.strip()) for piece in quote.split("…") if piece.strip(" ;:")]
        pattern = re.compile(".*?".join(pieces), re.DOTALL)
        if not any(pattern.search(message) for message in messages):
            missing.append(quote)
    assert not missing


def test_variables_of_claydist_are_explained():
    used = {name for message in _messages() for name in re.findall(r"\bCLAYDIST_[A-Z_]+\b", message)}
    assert used >= {"CLAYDIST_REGISTRY", "CLAYDIST_API_KEYS"}
    assert not [name for name in used if f"`{name}`" not in _section("Environment")]
