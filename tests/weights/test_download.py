"""Downloads from a server on this machine: whole, altered, cut off, absent."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from jaxdiff.weights.download import fetch_file, sha256_of

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write({"/altered": b"x" + CONTENT[1:], "/short": CONTENT[:2_000_000]}.get(self.path, CONTENT))

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["whole", "endless"])
def test_the_right_file_arrives(server, tmp_path, name):
    path = fetch_file(f"{server}/{name}", SHA256, tmp_path / "new folder" / "weights.pth")
    assert path.read_bytes() == CONTENT and sha256_of(path) == SHA256
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_there_is_kept(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"mine")
    assert fetch_file("http://127.0.0.1:9/", SHA256, tmp_path / "weights.pth").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("altered", rf"3,000,000 bytes whose SHA-256 is \w{{8}}..., not {SHA256[:8]}"),
        ("short", "broke off after 2,000,000 of 3,000,000 bytes"),
        ("missing", r"could not be downloaded \(404 Not Found\)"),
    ],
)
def test_anything_else_is_refused_and_leaves_nothing(server, tmp_path, name, message):
    with pytest.raises(ValueError, match=f"^{server}/{name} .*{message}") as error:
        fetch_file(f"{server}/{name}", SHA256, tmp_path / "weights.pth")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_no_server_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^http://127.0.0.1:9/file could not be downloaded \(.*refused\)$"):
        fetch_file("http://127.0.0.1:9/file", SHA256, tmp_path / "weights.pth")
    assert not list(tmp_path.iterdir())
