"""Reports in a real headless browser: they show, say nothing on the console, and ask for nothing outside."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from claydist.reporting.html import render_report, render_scored

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; `apt-get install chromium` brings it")

REPORT = {
    "model": {"name": "flights", "version": 1, "kind": "xgboost", "task": "binary", "created_at": "2026-11-22"},
    "promoted": True,
    "why": "the first version",
    "metrics": {"test": {"auc": 0.75}, "baseline": {"auc": 0.5}},
    "history": {"metric": "logloss", "train": [0.6, 0.5], "valid": [0.6, 0.55], "best_round": 1},
    "importance": [{"feature": "<b>carrier</b>", "gain": 1.0}],
}
SCORED = {"name": "flights", "date": "2026-11-21", "status": "published", "rows": 10, "model": {"name": "flights"}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A page's address on loopback, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            page = tmp_path / self.path.strip("/")
            self.send_response(200 if page.is_file() else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.read_bytes() if page.is_file() else b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize(("page", "shown"), [(render_report(REPORT), "the first version"),
                                             (render_scored(SCORED), "Published")])  # fmt: skip
def test_a_report_in_a_browser(server: tuple[str, list[str]], tmp_path: Path, page: str, shown: str, mode: str) -> None:
    url, asked = server
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    scheme = "--blink-settings=preferredColorScheme=" + ("0" if mode == "dark" else "1")
    quiet = ["--disable-background-networking", "--no-first-run", "--disable-sync", "--disable-component-update"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", scheme, *quiet, "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{url}/report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert shown in done.stdout
    assert "<b>carrier</b>" not in done.stdout
    assert "CONSOLE" not in done.stderr
    assert set(asked) <= {"/report.html", "/favicon.ico"}
