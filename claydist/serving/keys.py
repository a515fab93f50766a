"""API keys: several, rotating, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from claydist.errors import SpecError
from claydist.serving.refusals import Refusal

logger = logging.getLogger("claydist.serving")

ENVIRONMENT = "CLAYDIST_API_KEYS"
_LEAST_CHARACTERS = 8
_LOOK_S = 1.0

Stamp = tuple[int, ...]


class KeyRing:
    """The keys that a server takes; only their SHA-256 is kept.

    Parameters
    ----------
    fixed : keys from the environment.
    file : one key a line, `#` begins a comment; read again when it changes, at most once a second. A line that cannot
        be a key is logged and left out; a file without any key takes none away from those at work.
    per_s : requests a second of one key (burst of the same size); None for any number.

    Raises
    ------
    SpecError : when the file cannot be read or holds no key, or a key from the environment is too short.
    """

    def __init__(self, fixed: Sequence[str] = (), file: str | None = None, per_s: float | None = None) -> None:
        self._fixed = [_digest(key.encode()) for key in _checked(fixed)]
        self._file = Path(file).expanduser() if file else None
        self._stamp: Stamp = ()
        self._refused: Stamp | None = None
        self._looked = 0.0
        self._digests: list[bytes] = self._fixed
        self._per_s = per_s
        self._buckets: dict[bytes, tuple[float, float]] = {}
        if self._file is not None:
            self._read_file(self._file)

    @classmethod
    def open(cls, file: str | None, per_s: float | None = None) -> KeyRing:
        """Keys of CLAYDIST_API_KEYS (commas between them) and of the file."""
        fixed = [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",")]
        return cls([key for key in fixed if key], file, per_s)

    def __bool__(self) -> bool:
        return bool(self._digests) or self._file is not None

    def check(self, authorization: bytes) -> None:
        """Pass when the header holds one of the keys, or there are none.

        Raises
        ------
        Refusal : 401 for another key or none, 429 for a key that comes too often.
        """
        if not self:
            return
        self._refresh()
        scheme, _, presented = authorization.partition(b" ")
        digest = hashlib.sha256(presented.strip()).digest()
        # No early end: the time must not tell which key nearly fits.
        fits = sum(hmac.compare_digest(digest, known) for known in self._digests)
        if not fits or scheme.lower() != b"bearer":
            raise Refusal(
                401,
                "expected one of the server's keys in the header 'Authorization: Bearer KEY'",
                headers=[(b"www-authenticate", b"Bearer")],
            )
        if self._per_s is not None:
            self._take(digest, self._per_s)

    def _take(self, digest: bytes, per_s: float) -> None:
        """One request out of the key's bucket, which fills at `per_s`."""
        now = time.monotonic()
        room = max(1.0, per_s)
        left, last = self._buckets.get(digest, (room, now))
        left = min(room, left + (now - last) * per_s)
        self._buckets[digest] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            wait = str(max(1, round((1 - left) / per_s))).encode()
            raise Refusal(429, f"this key may ask {per_s:g} times a second", headers=[(b"retry-after", wait)])

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < _LOOK_S:
            return
        self._looked = now
        stamp = _stamp(self._file)
        try:
            if stamp != self._stamp:
                self._read_file(self._file)
            self._refused = None
        except SpecError as e:
            # A file that is being replaced, or was emptied by mistake, takes no key away from those at work.
            if stamp != self._refused:
                logger.error("%s; the keys that were read before stay", e)
            self._refused = stamp

    def _read_file(self, file: Path) -> None:
        stamp = _stamp(file)
        try:
            lines = file.read_bytes().splitlines()
        except OSError as e:
            raise SpecError(f"keys_file: cannot read {file}: {e}; write one key a line") from None
        keys = {n: key for n, line in enumerate(lines, 1) if (key := line.partition(b"#")[0].strip())}
        wrong = {n: text for n, key in keys.items() if (text := _problem(key))}
        found = ", ".join(f"line {n} {text}" for n, text in wrong.items()) or "none"
        good = [key for n, key in keys.items() if n not in wrong]
        if not good:
            raise SpecError(f"keys_file: expected a key a line in {file}, found {found}")
        if wrong:
            # The other lines count: whoever takes a leaked key out must not keep it by a mistake elsewhere.
            logger.error("keys_file: left out of %s: %s", file, found)
        self._digests = [*self._fixed, *map(_digest, good)]
        self._stamp = stamp


def _stamp(file: Path) -> Stamp:
    """What changes when the file does; empty where it cannot be looked at."""
    try:
        status = file.stat()
    except OSError:
        return ()
    # The size too, for a file is emptied and written within one tick of the clock.
    return status.st_mtime_ns, status.st_ino, status.st_size


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _problem(key: bytes) -> str:
    """Why these bytes cannot be a key; empty where they can."""
    try:
        short = len(key.decode()) < _LEAST_CHARACTERS
    except UnicodeDecodeError:
        return "is not UTF-8"
    return f"has less than {_LEAST_CHARACTERS} characters" if short else ""


def _checked(keys: Sequence[str]) -> Sequence[str]:
    if short := [i for i, key in enumerate(keys) if len(key) < _LEAST_CHARACTERS]:
        raise SpecError(
            f"keys in ${ENVIRONMENT}: expected {_LEAST_CHARACTERS} characters or more, key {short[0] + 1} is shorter"
        )
    return keys
