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
from tests.reporting.test_html import HOSTILE, SCORED, report_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; `apt-get install chromium` brings it")

PAGES = {task: (render_report(report_of(task, HOSTILE)), "Not promoted")
         for task in ("binary", "multiclass", "regression", "ranking")}  # fmt: skip
PAGES["scored"] = (render_scored(SCORED), "Published")


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
@pytest.mark.parametrize("name", PAGES)
def test_a_report_in_a_browser(server: tuple[str, list[str]], tmp_path: Path, name: str, mode: str) -> None:
    page, shown = PAGES[name]
    url, asked = server
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    scheme = "--blink-settings=preferredColorScheme=" + ("0" if mode == "dark" else "1")
    quiet = ["--disable-background-networking", "--no-first-run", "--disable-sync", "--disable-component-update"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", scheme, *quiet, "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{url}/report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert shown in done.stdout
    assert "<script>" not in done.stdout
    assert "CONSOLE" not in done.stderr
    assert set(asked) <= {"/report.html", "/favicon.ico"}
