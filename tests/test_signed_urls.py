"""A signed URL is a credential: whatever the store answers, no error, traceback or run file shows it."""

from __future__ import annotations

import http.server
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from claydist.dataset.footers import take_inventory
from claydist.dataset.reader import read_parts
from claydist.errors import ClaydistError
from claydist.registry import Registry
from claydist.runs import start_run
from claydist.spec import TrainSpec
from claydist.specfile import load_spec
from claydist.storage import open_store
from tests.tables import make_table, spec_of

pytest.importorskip("aiohttp")

SECRET = "hidden-signature"


class Signed(http.server.ThreadingHTTPServer):
    """One Parquet file, by ranges; the request number `refused` gets a 403."""

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.data = data
        self.n_gets = 0
        self.refused = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/part.parquet?X-Amz-Signature={SECRET}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Signed

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(200, b"")

    def do_GET(self) -> None:
        self.server.n_gets += 1
        if self.server.n_gets == self.server.refused:
            self._answer(403, b"")
            return
        start, _, stop = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        self._answer(206, self.server.data[int(start) : int(stop) + 1 if stop else None])

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if self.command == "GET" else len(self.server.data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def signed(tmp_path: Path) -> Iterator[Signed]:
    pq.write_table(make_table(), tmp_path / "part.parquet", row_group_size=200)
    with Signed((tmp_path / "part.parquet").read_bytes()) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def read_all(url: str, cache_dir: str | None) -> int:
    inventory = take_inventory(url)
    return sum(
        table.num_rows
        for _, _, table in read_parts(inventory, 0, [0, 1, 2], ["km", "city"], "km > 1", cache_dir=cache_dir)
    )


@pytest.mark.parametrize("cached", [False, True])
def test_a_store_that_refuses_in_the_middle_shows_no_signature(signed: Signed, tmp_path: Path, cached: bool) -> None:
    assert read_all(signed.url, str(tmp_path / "good") if cached else None) > 500
    n_gets, texts = signed.n_gets, set()
    assert n_gets >= 3
    for number in range(1, n_gets + 1):
        signed.n_gets, signed.refused = 0, number
        with pytest.raises(ClaydistError, match=r"403|Forbidden|read") as caught:
            read_all(signed.url, str(tmp_path / f"cache-{number}") if cached else None)
        texts |= {str(caught.value), "".join(traceback.format_exception(caught.value))}
    assert not [text for text in texts if SECRET in text]
    assert any("cannot read the footer of" in text for text in texts)
    assert any("cannot be read as Parquet" in text for text in texts)


def test_what_a_run_ended_with_is_written_without_signatures(signed: Signed, tmp_path: Path) -> None:
    registry = Registry(open_store(str(tmp_path)))
    run = start_run(registry, "train", load_spec(TrainSpec, spec_of(signed.url, tmp_path)), "parcels", "x")
    run.fail(RuntimeError(f"403, message='Forbidden', url='{signed.url}'"))
    text = run.store.join("run.json").read().decode()
    assert "Forbidden" in text
    assert SECRET not in text
