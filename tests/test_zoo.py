"""Downloads from a server on this machine: whole, broken off, altered, malicious."""

import hashlib
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from odtrt_lib import zoo
from odtrt_lib.errors import CheckError, InputError

NAME = "ssd_tiny"
MODEL = zoo.ZooModel(NAME, 1.0)


def archive(*members, damage=None):
    """A .tar.gz of (name, content, type) members after a sound model's files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content, kind in (
            (f"{NAME}/pipeline.config", b"model {}", tarfile.REGTYPE),
            (f"{NAME}/checkpoint/ckpt-0.index", b"index" * 50_000, tarfile.REGTYPE),
            *members,
        ):
            entry = tarfile.TarInfo(name)
            entry.type = kind
            entry.size = len(content) if kind == tarfile.REGTYPE else 0
            entry.linkname = "" if kind in (tarfile.REGTYPE, tarfile.DIRTYPE) else content.decode()
            tar.addfile(entry, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return file.getvalue()


class Server:
    """Serves ``body`` at every path of the zoo; ``sent`` bytes of it if that is set. Counts requests."""

    def __init__(self):
        self.body, self.sent, self.status, self.paths = archive(), None, 200, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.paths.append(self.path)
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                if outer.status == 200:
                    self.wfile.write(outer.body[: outer.sent])

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/tf2"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_model_arrives_whole(server, tmp_path):
    seen = []
    download = zoo.get(
        MODEL, tmp_path / "zoo", base_url=server.url, progress=lambda done, total: seen.append((done, total))
    )
    assert server.paths == [f"/tf2/{MODEL.date}/{NAME}.tar.gz"]
    assert download.path == tmp_path / "zoo" / NAME
    assert (download.path / "pipeline.config").read_bytes() == b"model {}"
    assert (download.path / "checkpoint" / "ckpt-0.index").read_bytes() == b"index" * 50_000
    assert everything_in(tmp_path / "zoo") == [
        NAME,
        f"{NAME}/checkpoint",
        f"{NAME}/checkpoint/ckpt-0.index",
        f"{NAME}/pipeline.config",
        "zoo.json",
    ]
    assert seen[-1] == (len(server.body), len(server.body))


def test_the_first_download_is_trusted_and_recorded(server, tmp_path):
    download = zoo.get(MODEL, tmp_path, base_url=server.url)
    digest = hashlib.sha256(server.body).hexdigest()
    assert (download.is_first, download.is_up_to_date, download.sha256) == (True, False, digest)
    assert json.loads((tmp_path / "zoo.json").read_text())[NAME]["sha256"] == digest


def test_a_model_that_is_there_is_not_downloaded_again(server, tmp_path):
    first = zoo.get(MODEL, tmp_path, base_url=server.url)
    again = zoo.get(MODEL, tmp_path, base_url=server.url)
    assert again.is_up_to_date
    assert again.sha256 == first.sha256
    assert len(server.paths) == 1


def test_a_later_download_must_equal_the_first(server, tmp_path):
    path = zoo.get(MODEL, tmp_path, base_url=server.url).path
    for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    path.rmdir()
    server.body = archive((f"{NAME}/saved_model/extra", b"something new", tarfile.REGTYPE))
    with pytest.raises(CheckError, match=r"SHA-256 .* expected .*; the file changed"):
        zoo.get(MODEL, tmp_path, base_url=server.url)
    assert everything_in(tmp_path) == ["zoo.json"]


def test_a_known_checksum_is_checked_on_the_first_download(server, tmp_path):
    right = zoo.ZooModel(NAME, 1.0, sha256=hashlib.sha256(server.body).hexdigest())
    wrong = zoo.ZooModel(NAME, 1.0, sha256="0" * 64)
    with pytest.raises(CheckError, match=f"expected {'0' * 64}"):
        zoo.get(wrong, tmp_path / "wrong", base_url=server.url)
    assert not (tmp_path / "wrong").exists()
    assert not zoo.get(right, tmp_path / "right", base_url=server.url).is_first


def test_a_download_that_breaks_off(server, tmp_path):
    server.sent = 300
    with pytest.raises(InputError, match="the download broke off"):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize("keep", [0, 40, 400, -10])
def test_an_archive_that_is_not_whole(server, tmp_path, keep):
    """The server itself holds half a file: the length agrees, the content does not."""
    server.body = archive()[:keep]
    with pytest.raises((CheckError, InputError), match=r"not a whole \.tar\.gz archive|broke off"):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    assert not (tmp_path / "zoo").exists()


def test_a_flipped_bit_in_the_archive(server, tmp_path):
    body = bytearray(archive())
    body[-200] ^= 8
    server.body = bytes(body)
    with pytest.raises(CheckError, match=r"not a whole \.tar\.gz archive"):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    assert not (tmp_path / "zoo").exists()


def test_a_web_page_instead_of_an_archive(server, tmp_path):
    server.body = b"<html>please log in</html>"
    with pytest.raises(CheckError, match=r"not a whole \.tar\.gz archive"):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)


@pytest.mark.parametrize(
    "evil",
    [
        ("../escaped", b"x", tarfile.REGTYPE),
        (f"{NAME}/../../escaped", b"x", tarfile.REGTYPE),
        ("/tmp/odtrt-escaped", b"x", tarfile.REGTYPE),
        ("other_model/file", b"x", tarfile.REGTYPE),
        (f"{NAME}/link", b"/etc/passwd", tarfile.SYMTYPE),
        (f"{NAME}/link", b"../../outside", tarfile.LNKTYPE),
        (f"{NAME}/device", b"", tarfile.CHRTYPE),
        (f"{NAME}/pipe", b"", tarfile.FIFOTYPE),
    ],
)
def test_an_archive_that_reaches_out_is_refused(server, tmp_path, evil):
    server.body = archive(evil)
    folder = tmp_path / "deep" / "zoo"
    with pytest.raises(CheckError, match="expected only files inside ssd_tiny/; nothing was unpacked"):
        zoo.get(MODEL, folder, base_url=server.url)
    assert everything_in(tmp_path) == []


def test_an_archive_of_something_else(server, tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo(f"{NAME}/frozen_inference_graph.pb"))
    server.body = file.getvalue()
    with pytest.raises(CheckError, match=r"holds no ssd_tiny/pipeline\.config"):
        zoo.get(MODEL, tmp_path, base_url=server.url)
    assert everything_in(tmp_path) == []


def test_the_server_does_not_know_the_file(server, tmp_path):
    server.status = 404
    with pytest.raises(InputError, match="the server answers 404 Not Found; check the connection"):
        zoo.get(MODEL, tmp_path, base_url=server.url)


def test_offline(server, tmp_path):
    server.close()
    with pytest.raises(InputError, match=r"cannot be downloaded .*Connection refused") as caught:
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "zoo").exists()


def test_ctrl_c_leaves_nothing(server, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url, progress=interrupt)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize("content", ["{", "[1, 2]", '"text"'])
def test_damaged_checksums(server, tmp_path, content):
    (tmp_path / "zoo.json").write_text(content)
    with pytest.raises(InputError, match=r"zoo\.json: cannot be read"):
        zoo.get(MODEL, tmp_path, base_url=server.url)
    assert server.paths == []


def test_names():
    assert len({model.name for model in zoo.MODELS}) == len(zoo.MODELS)
    assert zoo.find(zoo.MODELS[3].name) is zoo.MODELS[3]
    with pytest.raises(InputError, match="did you mean efficientdet_d0_coco17_tpu-32"):
        zoo.find("efficientdet_d0")
    with pytest.raises(InputError, match="did you mean ssd_mobilenet_v2_320x320_coco17_tpu-8"):
        zoo.find("ssd_mobilenet_v2_320x320_coco17_tpu8")
    with pytest.raises(InputError, match="see `odtrt zoo list`"):
        zoo.find("yolo")
