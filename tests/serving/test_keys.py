from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("bad", [b"short", b"k\xe9y-with-latin-1"])
def test_a_bad_line_keeps_no_key_that_was_taken_out(
    bad: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    file = tmp_path / "keys"
    file.write_text("leaked-key-0\nkept-key-0000\n")
    ring = KeyRing(["fixed-key-0"], str(file))
    file.write_bytes(b"kept-key-0000\n" + bad + b"\nnew-key-0000  # by Andr\xe9\n")
    for _ in range(3):
        assert all(passes(ring, key) for key in ("kept-key-0000", "new-key-0000", "fixed-key-0"))
        assert not any(passes(ring, key) for key in ("leaked-key-0", "short"))
    (line,) = caplog.messages
    assert "line 2" in line
    assert bad.decode(errors="replace") not in line


def test_a_file_without_keys_is_said_once_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    file = tmp_path / "keys"
    file.write_text("old-key-000\n")
    ring = KeyRing([], str(file))
    steps: list[tuple[Callable[[], Any], str]] = [
        (file.unlink, "cannot read"),
        (file.touch, "found none"),
        (lambda: file.write_text("short"), "found line 1"),
        (file.unlink, "cannot read"),
    ]
    for n, (step, text) in enumerate(steps, 1):
        step()
        assert all(passes(ring, "old-key-000") for _ in range(3))
        assert len(caplog.messages) == n
        assert text in caplog.messages[-1]
    file.write_text("new-key-0000\n")
    assert passes(ring, "new-key-0000")
    assert not passes(ring, "old-key-000")
    assert len(caplog.messages) == len(steps)


def test_bad_keys_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="8 characters or more, key 2"):
        KeyRing(["long-enough", "short"])
    with pytest.raises(SpecError, match="cannot read"):
        KeyRing([], str(tmp_path / "absent"))
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "wrong").write_text("short\n")
    for name, text in (("empty", "found none"), ("wrong", "found line 1 has less than 8 characters")):
        with pytest.raises(SpecError, match=text):
            KeyRing([], str(tmp_path / name))


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
