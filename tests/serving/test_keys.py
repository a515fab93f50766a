from __future__ import annotations

import os
from pathlib import Path

import pytest

from claydist.errors import SpecError
from claydist.serving import keys as module
from claydist.serving.keys import KeyRing
from claydist.serving.refusals import Refusal


def passes(ring: KeyRing, key: str) -> bool:
    try:
        ring.check(f"Bearer {key}".encode())
    except Refusal as e:
        return e.status != 401
    return True


def test_several_keys_fit_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAYDIST_API_KEYS", "first-key-1, second-key-2")
    ring = KeyRing.open(None)
    assert passes(ring, "first-key-1")
    assert passes(ring, "second-key-2")
    assert not any(passes(ring, key) for key in ("", "first", "first-key-1,", "third-key-3", "first-key-11"))


def test_without_keys_everybody_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLAYDIST_API_KEYS", raising=False)
    ring = KeyRing.open(None)
    assert not ring
    assert passes(ring, "")


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    file = tmp_path / "keys"
    file.write_text("# rotated in May\nold-key-000  # the old one\n\n")
    ring = KeyRing(["fixed-key-0"], str(file))
    assert passes(ring, "old-key-000")
    assert passes(ring, "fixed-key-0")
    file.write_text("new-key-0000\n")
    os.utime(file, ns=(1, 1))
    assert passes(ring, "new-key-0000")
    assert passes(ring, "fixed-key-0")
    assert not passes(ring, "old-key-000")
    file.unlink()
    assert passes(ring, "new-key-0000")
    file.write_text("")
    assert passes(ring, "new-key-0000")


def test_bad_keys_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="8 characters or more, key 2"):
        KeyRing(["long-enough", "short"])
    with pytest.raises(SpecError, match="cannot read"):
        KeyRing([], str(tmp_path / "absent"))
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(SpecError, match="found none"):
        KeyRing([], str(tmp_path / "empty"))


def test_a_key_has_its_rate() -> None:
    ring = KeyRing(["first-key-1", "second-key-2"], per_s=2)
    ring.check(b"Bearer first-key-1")
    ring.check(b"Bearer first-key-1")
    with pytest.raises(Refusal, match="2 times a second") as caught:
        ring.check(b"Bearer first-key-1")
    assert caught.value.status == 429
    assert caught.value.headers[0][0] == b"retry-after"
    ring.check(b"Bearer second-key-2")


def test_a_key_is_in_no_repr() -> None:
    ring = KeyRing(["very-secret-key"])
    assert "very-secret-key" not in repr(vars(ring))
