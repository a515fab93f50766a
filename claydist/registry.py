"""Names, versions, aliases and their history, as files that are created exclusively and never changed.

```
REGISTRY/
  <name>/<version>/reserved.json          who took the number; two trainers never take the same
  <name>/<version>/manifest.json, ...     the bundle; a version exists once its manifest is there
  <name>/_aliases/<alias>/000001.json     one move: when, from, to, why, by; the highest number is where the alias is
  _runs/                                  of training and scoring; names that begin with `_` are not models
```
"""

from __future__ import annotations

import difflib
import getpass
import json
import os
import re
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from claydist.bundle import MANIFEST, Bundle, read_bundle, read_manifest
from claydist.errors import AlreadyExists, RegistryError, SpecError
from claydist.spec import NAME_PATTERN
from claydist.storage import Store, open_store

CHAMPION = "champion"
ENVIRONMENT = "CLAYDIST_REGISTRY"
DEFAULT_URL = "./registry"

_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_MOVE = re.compile(r"([0-9]{6,})\.json")


@dataclass(frozen=True)
class Ref:
    """What a reference says: a name with an alias or a version, or the URL of a bundle alone."""

    name: str = ""
    alias: str | None = None
    version: int | None = None
    url: str | None = None


@dataclass(frozen=True)
class Resolved:
    """A version that exists; `version` is None for a bundle given by its URL that says none of itself."""

    name: str
    version: int | None
    store: Store
    alias: str | None = None


@dataclass(frozen=True)
class Move:
    """One move of an alias; `from_version` is None for the first."""

    alias: str
    sequence: int
    when: str
    from_version: int | None
    to_version: int
    why: str
    by: str

    def to_json(self) -> dict[str, Any]:
        """The move as its file has it."""
        return {
            "alias": self.alias, "sequence": self.sequence, "when": self.when,
            "from": self.from_version, "to": self.to_version, "why": self.why, "by": self.by,
        }  # fmt: skip


@dataclass(frozen=True)
class Registry:
    """The models below one URL. Made by `open_registry`."""

    store: Store

    def models(self) -> list[str]:
        """Names of the models that have a version, sorted."""
        names = (name for name in self.store.list() if _is_name(name))
        return [name for name in names if self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """Numbers of the versions that exist, in order; empty for a name that has none."""
        files = self.store.join(check_name(name)).files()
        found = (path.removesuffix(f"/{MANIFEST}") for path in (f.path for f in files) if path.endswith(f"/{MANIFEST}"))
        return sorted(int(number) for number in found if _VERSION.fullmatch(number))

    def reserve(self, name: str) -> int:
        """The next free number of the model, taken for the caller alone; one that stays unused is a gap."""
        place = self.store.join(check_name(name))
        taken = [int(number) for number in place.list() if _VERSION.fullmatch(number)]
        version = max(taken, default=0) + 1
        claim = _to_bytes({"when": _now(), "by": whoami(), "pid": os.getpid()})
        while True:
            try:
                place.join(str(version), "reserved.json").create(claim)
            except AlreadyExists:
                version += 1
            else:
                return version

    def version_store(self, name: str, version: int) -> Store:
        """Where the bundle of a version is, or is to be."""
        return self.store.join(check_name(name), str(version))

    def resolve(self, ref: str | Ref) -> Resolved:
        """The version that a reference means now.

        Raises
        ------
        SpecError : when the text is no reference.
        RegistryError : when there is no such model, alias or version; it says which there are.
        """
        ref = parse_ref(ref) if isinstance(ref, str) else ref
        if ref.url is not None:
            return _resolve_url(ref.url)
        version = self._alias_target(ref) if ref.version is None else ref.version
        self._check_version(ref.name, version)
        return Resolved(ref.name, version, self.version_store(ref.name, version), ref.alias)

    def alias_version(self, name: str, alias: str = CHAMPION) -> int | None:
        """The version that the alias is at; None when it was never moved."""
        last = self._last_move(name, alias)
        return last.to_version if last else None

    def promote(
        self,
        name: str,
        version: int,
        alias: str = CHAMPION,
        why: str = "",
        by: str | None = None,
        *,
        expected: int | Literal["any"] | None = "any",
    ) -> Move:
        """Move an alias to a version that exists; the move that made it so, also when it was there already.

        Parameters
        ----------
        why, by : for the history; `by` is this user and host where not given.
        expected : the version that the caller believes the alias to be at (None: at none); refused when it is not.

        Raises
        ------
        RegistryError : when the version does not exist, or the alias is not at `expected`.
        """
        self._check_version(name, version)
        while True:
            last = self._last_move(name, alias)
            current = last.to_version if last else None
            if expected not in ("any", current):
                raise RegistryError(
                    f"expected {name}@{alias} at {_shown(expected)}, found it at {_shown(current)}: somebody moved it; "
                    f"look at `claydist models history {name}` and decide again"
                )
            if last and current == version:
                return last
            move = Move(alias, last.sequence + 1 if last else 1, _now(), current, version, why, by or whoami())
            try:
                self._alias_store(name, alias).join(f"{move.sequence:06}.json").create(_to_bytes(move.to_json()))
            except AlreadyExists:
                continue  # another move took the number; look again where the alias is
            return move

    def rollback(self, name: str, alias: str = CHAMPION, why: str = "", by: str | None = None) -> Move:
        """Move an alias to the last version before the one it is at; the history grows by this move.

        Raises
        ------
        RegistryError : when the alias was never at another version, or somebody moves it at the same time.
        """
        moves = self.history(name, alias)
        current = moves[-1].to_version if moves else None
        before = next((m.to_version for m in reversed(moves) if m.to_version != current), None)
        if before is None:
            raise RegistryError(
                f"nothing to roll {name}@{alias} back to: it is at {_shown(current)} and was never elsewhere; "
                f"versions: {_listed(self.versions(name))}"
            )
        return self.promote(name, before, alias, why or f"rollback from version {current}", by, expected=current)

    def history(self, name: str, alias: str | None = None) -> list[Move]:
        """Moves of an alias, or of all aliases of the model, the oldest first."""
        aliases = [alias] if alias else filter(_is_name, self.store.join(check_name(name), "_aliases").list())
        moves = [self._read_move(name, a, n) for a in aliases for n in self._sequence(name, a)]
        return moves if alias else sorted(moves, key=lambda m: (m.when, m.alias, m.sequence))

    def check_writable(self) -> None:
        """Pass when files can be created in the registry; a StorageError now, and not after hours of training."""
        probe = self.store.join(f"_probe-{uuid.uuid4().hex}")
        probe.create(b"")
        probe.remove()

    def _alias_target(self, ref: Ref) -> int:
        alias = ref.alias or CHAMPION
        version = self.alias_version(ref.name, alias)
        if version is None:
            self._check_model(ref.name)
            versions = self.versions(ref.name)
            newest = f"{ref.name}:{versions[-1]}"
            raise RegistryError(
                f"{ref.name!r} has no {alias} in {self.store}; versions: {_listed(versions)}; name one, e.g. {newest}, "
                f"or promote it: claydist models promote {newest} --alias {alias}"
            )
        return version

    def _check_version(self, name: str, version: int) -> None:
        if not self.version_store(name, version).join(MANIFEST).exists():
            self._check_model(name)
            raise RegistryError(
                f"{name!r} has no version {version} in {self.store}; versions: {_listed(self.versions(name))}"
            )

    def _check_model(self, name: str) -> None:
        if self.versions(name):
            return
        models = self.models()
        near = difflib.get_close_matches(name, models, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"models: {_listed(models)}"
        raise RegistryError(f"no model {name!r} in {self.store}; {hint}; train it, or check --registry")

    def _alias_store(self, name: str, alias: str) -> Store:
        return self.store.join(check_name(name), "_aliases", check_name(alias, "an alias"))

    def _sequence(self, name: str, alias: str) -> list[int]:
        matches = (_MOVE.fullmatch(file) for file in self._alias_store(name, alias).list())
        return sorted(int(match[1]) for match in matches if match)

    def _last_move(self, name: str, alias: str) -> Move | None:
        numbers = self._sequence(name, alias)
        return self._read_move(name, alias, numbers[-1]) if numbers else None

    def _read_move(self, name: str, alias: str, sequence: int) -> Move:
        place = self._alias_store(name, alias).join(f"{sequence:06}.json")
        tree = place.read_json()
        try:
            return Move(alias, sequence, tree["when"], tree["from"], int(tree["to"]), tree["why"], tree["by"])
        except (KeyError, TypeError, ValueError) as e:
            raise RegistryError(f"{place} is damaged: expected a move of an alias, found {tree!r}; restore it") from e


def open_registry(
    flag: str | None = None, spec: str | None = None, options: Mapping[str, Any] | None = None
) -> Registry:
    """The registry of the command's flag, else of the spec, else of $CLAYDIST_REGISTRY, else ./registry."""
    return Registry(open_store(registry_url(flag, spec), options))


def registry_url(flag: str | None = None, spec: str | None = None) -> str:
    """The URL that `open_registry` opens, as it was given."""
    return flag or spec or os.environ.get(ENVIRONMENT) or DEFAULT_URL


def load(ref: str, registry: str | Registry | None = None) -> Bundle:
    """The bundle that a reference means: `name` (its champion), `name@alias`, `name:version`, or a bundle's URL.

    Parameters
    ----------
    registry : a registry or its URL; by default $CLAYDIST_REGISTRY, else ./registry.

    Raises
    ------
    SpecError : when the text is no reference.
    RegistryError : when there is no such model, alias or version.
    BundleError : when the bundle is damaged.
    """
    parsed = parse_ref(ref)
    if parsed.url is not None:
        return read_bundle(open_store(parsed.url))
    found = registry if isinstance(registry, Registry) else open_registry(registry)
    return read_bundle(found.resolve(parsed).store)


def parse_ref(text: str) -> Ref:
    """What a reference says.

    Raises
    ------
    SpecError : when it is none of `name`, `name@alias`, `name:version`, a URL, or a path that begins with `/` or `.`.
    """
    if "://" in text or text.startswith(("/", "./", "../", "~/")):
        return Ref(url=text)
    name, mark, rest = re.match(r"([^@:]*)([@:]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    ok = _is_name(name) and (not mark or bool(_VERSION.fullmatch(rest) if mark == ":" else _is_name(rest)))
    if not ok:
        raise SpecError(
            f"expected a reference to a model: name, name@alias, name:version, or a bundle's URL or path "
            f"(/..., ./...), found {text!r}"
        )
    return Ref(name, alias=None if mark == ":" else rest or CHAMPION, version=int(rest) if mark == ":" else None)


def check_name(name: str, what: str = "a model's name") -> str:
    """`name` itself when it is fit for a folder of the registry; else a SpecError."""
    if not _is_name(name):
        raise SpecError(
            f"expected {what} of a-z 0-9 . _ - that starts with a letter or digit, has no '..' "
            f"and at most 63 characters, found {name!r}"
        )
    return name


def whoami() -> str:
    """User and host, for the history."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _resolve_url(url: str) -> Resolved:
    store = open_store(url)
    manifest = read_manifest(store)
    version = manifest.get("version")
    return Resolved(str(manifest.get("name") or store.name), version if isinstance(version, int) else None, store)


def _is_name(name: str) -> bool:
    return re.fullmatch(NAME_PATTERN, name) is not None and ".." not in name


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _to_bytes(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, ensure_ascii=False, indent=1).encode()


def _shown(version: object) -> str:
    return "no version" if version is None else f"version {version}"


def _listed(values: list[Any]) -> str:
    return ", ".join(map(str, values)) or "none"
