"""Downloads: from the start, resumed, and the errors of failed ones."""

import hashlib
import http.server
import threading

import pytest

from l2sp_tf.data import fetch as fetching
from l2sp_tf.data.fetch import Download, fetch, reach
from l2sp_tf.files.errors import InputError

CONTENT = bytes(range(256)) * 5000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT under any name: with ranges, without them under "/whole", and breaking off under "/short"."""

    asked = []

    def do_GET(self):
        header = self.headers.get("Range")
        self.asked.append(header)
        if self.path == "/gone":
            return self.send_error(404)
        start = int(header[6:-1]) if header and self.path != "/whole" else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        return self.wfile.write(CONTENT[start : start + 1000] if self.path == "/short" else CONTENT[start:])

    def do_HEAD(self):
        self.send_error(405)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture
def no_host():
    """An address where nothing listens."""
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
    return f"http://127.0.0.1:{port}"


def of(server, path="file", kind="sha256"):
    return Download(f"{server}/{path}", f"{kind}:{hashlib.new(kind, CONTENT).hexdigest()}")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_a_file_is_loaded_once_and_checked(server, tmp_path, kind):
    said = []
    path = fetch(of(server, kind=kind), tmp_path / "new", say=said.append)
    assert path.read_bytes() == CONTENT and len(said) == 1 and server in said[0] and names(path.parent) == ["file"]
    assert fetch(of(server, kind=kind), tmp_path / "new", say=said.append) == path and len(said) == 1


@pytest.mark.parametrize("path", ["file", "whole"], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("done", [1000, len(CONTENT)])
def test_a_partial_download_resumes(server, tmp_path, path, done):
    (tmp_path / f"{path}.part").write_bytes(CONTENT[:done])
    Handler.asked.clear()
    assert fetch(of(server, path), tmp_path).read_bytes() == CONTENT
    assert Handler.asked == [f"bytes={done}-"] and names(tmp_path) == [path]


def test_a_connection_that_breaks_off_keeps_its_part(server, tmp_path):
    with pytest.raises(InputError, match="broke off after 1,000 of 1,280,000 bytes: run prepare.py again .* put short into"):
        fetch(of(server, "short"), tmp_path)
    with pytest.raises(InputError, match="broke off after 2,000"):
        fetch(of(server, "short"), tmp_path)
    assert (tmp_path / "short.part").read_bytes() == CONTENT[:2000]


def test_a_wrong_checksum_removes_the_download_but_no_file_of_the_user(server, tmp_path):
    wrong = Download(f"{server}/file", "md5:" + "0" * 32)
    with pytest.raises(InputError, match="was removed, because its md5 is [0-9a-f]{32} and should be 0+: run"):
        fetch(wrong, tmp_path)
    assert names(tmp_path) == []
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(InputError, match="file cannot be used, because its md5 is"):
        fetch(wrong, tmp_path)
    assert fetch(wrong, tmp_path, checksums=False).read_bytes() == b"mine"


def test_a_file_without_a_published_checksum_is_accepted(server, tmp_path):
    assert fetch(Download(f"{server}/file"), tmp_path).read_bytes() == CONTENT


def test_without_a_network_nothing_is_left(no_host, server, tmp_path):
    with pytest.raises(InputError, match=r"file cannot be downloaded \(.*refused.*\): run prepare.py again .* put file into"):
        fetch(of(no_host), tmp_path)
    with pytest.raises(InputError, match="Not Found"):
        fetch(of(server, "gone"), tmp_path)
    assert names(tmp_path) == []


def test_a_fetch_gives_up_on_a_silent_host_after_the_timeout(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(fetching, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        with pytest.raises(InputError, match="timed out"):
            reach(url)
        with pytest.raises(InputError, match="timed out"):
            fetch(Download(url), tmp_path)


def test_a_host_that_refuses_is_reached(server, no_host):
    reach(server)
    with pytest.raises(InputError, match="connect to the network"):
        reach(no_host)
