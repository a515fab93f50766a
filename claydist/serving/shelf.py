"""Shelf: the models that a replica holds, and how each follows its alias.

A new version is read beside the old one, in a thread, repeats its golden rows, is warmed, and then takes the old one's
place in one assignment. Requests keep the object that they were admitted with, and the old one stays, loaded and
addressable by its version, until the next swap: rolling back costs nothing.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from claydist.bundle import Bundle, check_golden, read_bundle
from claydist.errors import ClaydistError, SpecError
from claydist.predictor import Predictor
from claydist.registry import Ref, Registry, parse_ref
from claydist.rows import RowEncoder
from claydist.serving.refusals import Refusal
from claydist.storage import open_store
from claydist.values import to_plain

logger = logging.getLogger("claydist.serving")

_WARM_ROWS = 512
_LONGEST_WAIT_S = 300.0


@dataclass(frozen=True, eq=False)
class Served:
    """One version of a model, ready to answer.

    Attributes
    ----------
    name, version, digest : in every answer; version is text, `0` for a bundle outside a registry that says none.
    encoder : from plain rows to what the model takes.
    outputs : names and Arrow types of the columns of a prediction.
    examples : some golden rows as JSON has them.
    seconds_per_row : measured while warming.
    """

    name: str
    version: str
    digest: str
    predictor: Predictor
    encoder: RowEncoder
    outputs: pa.Schema
    examples: tuple[dict[str, Any], ...]
    seconds_per_row: float
    manifest: dict[str, Any] = field(repr=False)

    @property
    def task(self) -> str:
        """One of binary, multiclass, regression, ranking."""
        return self.predictor.task

    def predict_values(self, values: np.ndarray) -> np.ndarray:
        """Values of the model for rows of a RowMatrix; the same bits as `Predictor.predict_arrays`."""
        encoded, offset = self.encoder.encoded(values)
        return self.predictor.model.predict_encoded(self.predictor.plan, encoded, offset)

    def identity(self) -> dict[str, str]:
        """Model, version and digest, as every answer names them."""
        return {"model": self.name, "version": self.version, "digest": self.digest}


def make_served(name: str, version: int | None, bundle: Bundle) -> Served:
    """The bundle as a model that answers, once it has repeated its golden rows.

    Raises
    ------
    BundleError : when it does not repeat them.
    """
    check_golden(bundle)
    predictor = bundle.predictor
    predictor.model.set_threads(1)
    rows = _golden_table(bundle)
    encoder = RowEncoder(predictor.plan, predictor.offset)
    examples = to_plain(rows.slice(0, 4), predictor.plan)
    served = Served(
        name, str(version or 0), bundle.digest, predictor, encoder, predictor.predict(rows).schema,
        tuple(examples), 0.0, bundle.manifest,
    )  # fmt: skip
    return replace(served, seconds_per_row=_warm(served)) if examples else served


def _warm(served: Served) -> float:
    """Seconds that a row takes, once everything that is lazy has been done."""
    examples = served.encoder.from_rows(served.examples).values
    values = np.tile(examples, (_WARM_ROWS // len(examples), 1))
    served.predict_values(values)
    start = time.perf_counter()
    served.predict_values(values)
    return (time.perf_counter() - start) / len(values)


def _golden_table(bundle: Bundle) -> pa.Table:
    with pa.ipc.open_stream(base64.b64decode(bundle.manifest["golden"]["rows"])) as stream:
        return stream.read_all()


@dataclass(frozen=True)
class Failure:
    """A version that could not be loaded, how long to leave it alone, and until when (time.monotonic)."""

    version: int
    wait_s: float
    until: float


class _NotYet(Exception):
    """A version that failed is not tried again yet."""


@dataclass(eq=False)
class Slot:
    """One reference, the version it is at, the one it was at before, and the one it should be at and cannot."""

    ref: Ref
    text: str
    current: Served
    previous: Served | None = None
    error: str = ""
    failure: Failure | None = None


class Shelf:
    """All slots of a replica.

    Parameters
    ----------
    refs : references as the spec has them.
    registry : where names are looked up.
    poll_s : how often aliases are looked up.

    Attributes
    ----------
    on_swap : called with the new model after each swap; set by whoever counts.

    Raises
    ------
    ClaydistError : when a reference cannot be loaded now, or two mean different bundles of one name and version.
    """

    def __init__(self, refs: Sequence[str], registry: Registry, *, poll_s: float = 3.0) -> None:
        self._registry = registry
        self._poll_s = poll_s
        self.on_swap: Callable[[Served], None] = lambda served: None
        self._task: asyncio.Task[None] | None = None
        # A look by the clock and one that was asked for would each load what has moved, and swap it for itself.
        self._turn = asyncio.Lock()
        self.slots: list[Slot] = []
        for text in refs:
            ref = parse_ref(text)
            self.slots.append(Slot(ref, text, self._load(ref)))
        first: dict[tuple[str, str], Slot] = {}
        for slot in self.slots:
            other = first.setdefault((slot.current.name, slot.current.version), slot)
            if other.current.digest != slot.current.digest:
                raise SpecError(
                    f"models: {other.text!r} and {slot.text!r} are different bundles of the same name and version; "
                    f"give one of them"
                )
            # An alias may come to another's version at any time; one object answers for both.
            slot.current = other.current

    @property
    def served(self) -> list[Served]:
        """Every version that answers now, those in front first."""
        versions = [slot.current for slot in self.slots] + [slot.previous for slot in self.slots if slot.previous]
        return list({(s.name, s.version): s for s in reversed(versions)}.values())[::-1]

    def find(self, name: str, version: str | None = None) -> Served:
        """The model by its name, and by its version where one is asked for.

        Raises
        ------
        Refusal : 404 with what there is.
        """
        for slot in self.slots:
            if slot.current.name == name and (version is None or slot.current.version == version):
                return slot.current
        for slot in self.slots:
            old = slot.previous
            if old is not None and old.name == name and old.version == version:
                return old
        there = sorted({s.name for s in self.served})
        if name not in there:
            raise Refusal(404, f"no model {name[:80]!r} here; models: {', '.join(there)}", field="model")
        versions = self.versions(name)
        raise Refusal(404, f"no version {str(version)[:20]!r} of {name!r} here; versions: {', '.join(versions)}")

    def versions(self, name: str) -> list[str]:
        """Versions of a model that answer now."""
        return sorted({s.version for s in self.served if s.name == name}, key=int)

    def follow(self) -> None:
        """Begin to follow the aliases, in this event loop."""
        if self._task is None and any(slot.ref.alias for slot in self.slots):
            self._task = asyncio.get_running_loop().create_task(self._follow())

    def close(self) -> None:
        """Follow no more."""
        if self._task is not None:
            self._task.cancel()

    async def refresh(self) -> list[str]:
        """Look all aliases up now, and swap what has moved; the references that did."""
        async with self._turn:
            return [slot.text for slot in self.slots if await self._refresh(slot)]

    async def _refresh(self, slot: Slot) -> bool:
        """Look the alias up; whether it has moved."""
        try:
            new = await asyncio.to_thread(self._moved, slot)
        except _NotYet:
            return False
        except ClaydistError as e:
            self._keep_old(slot, e)
            return False
        slot.error, slot.failure = "", None
        return new is not None and self._swap(slot, new)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except Exception:  # following must outlive whatever a storage or a damaged file raises
                logger.exception("could not follow the aliases; the versions that answer stay")

    def _swap(self, slot: Slot, new: Served) -> bool:
        """Put the version in front; False where it is there already."""
        old = slot.current
        if (old.version, old.digest) == (new.version, new.digest):
            return False
        slot.previous, slot.current = old, new
        logger.info("%s: version %s replaces %s", slot.text, new.version, old.version)
        self.on_swap(new)
        return True

    def _keep_old(self, slot: Slot, error: ClaydistError) -> None:
        if str(error) != slot.error:
            logger.warning("%s stays at version %s: %s", slot.text, slot.current.version, error)
        slot.error = str(error)

    def _moved(self, slot: Slot) -> Served | None:
        """The version that the alias is at now, where that is not the one that answers."""
        if slot.ref.alias is None:
            return None
        version = self._registry.alias_version(slot.ref.name, slot.ref.alias)
        if version is None or str(version) == slot.current.version:
            return None
        if found := self._here(slot.ref.name, version):
            return found
        last = slot.failure if slot.failure and slot.failure.version == version else None
        if last and time.monotonic() < last.until:
            raise _NotYet
        try:
            return self._load(Ref(slot.ref.name, version=version))
        except Exception:
            # What is damaged stays so, mostly: it must not be read again and again, by every replica at once.
            wait_s = min(last.wait_s * 2 if last else self._poll_s, _LONGEST_WAIT_S)
            slot.failure = Failure(version, wait_s, time.monotonic() + wait_s)
            raise

    def _here(self, name: str, version: int) -> Served | None:
        """A version of the registry that is loaded already, in front or kept warm, for whichever reference."""
        slots = [slot for slot in self.slots if slot.ref.url is None]
        loaded = [slot.current for slot in slots] + [slot.previous for slot in slots if slot.previous]
        return next((s for s in loaded if s.name == name and s.version == str(version)), None)

    def _load(self, ref: Ref) -> Served:
        if ref.url is not None:
            bundle = read_bundle(open_store(ref.url))
            name = str(bundle.manifest.get("name") or "model")
            version = bundle.manifest.get("version")
            return make_served(name, version if isinstance(version, int) else None, bundle)
        found = self._registry.resolve(ref)
        if found.version is not None and (here := self._here(found.name, found.version)):
            return here
        return make_served(found.name, found.version, read_bundle(found.store))
