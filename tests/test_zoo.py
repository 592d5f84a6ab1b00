"""Downloads from a server on this machine: whole, broken off, altered, malicious."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import stat
import tarfile
import threading
import types
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from odtrt_lib import zoo
from odtrt_lib.errors import CheckError, InputError

NAME = "ssd_tiny"
MODEL = zoo.ZooModel(NAME, 1.0)


def archive(*members, name=NAME, mode=0o644):
    """A .tar.gz of (name, content, type) members after a sound model's files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for path, content, kind in (
            (f"{name}/pipeline.config", b"model {}", tarfile.REGTYPE),
            (f"{name}/checkpoint/ckpt-0.index", b"index" * 50_000, tarfile.REGTYPE),
            *members,
        ):
            entry = tarfile.TarInfo(path)
            entry.type, entry.mode = kind, mode
            entry.size = len(content) if kind == tarfile.REGTYPE else 0
            entry.linkname = "" if kind in (tarfile.REGTYPE, tarfile.DIRTYPE) else content.decode()
            tar.addfile(entry, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return file.getvalue()


class Server:
    """Serves ``body`` at every path of the zoo; ``sent`` bytes of it if that is set. Counts requests.

    headers: instead of Content-Length. hold: is called before the answer begins. first_alone: an event that
    the body waits for after its first byte.
    """

    def __init__(self):
        self.body, self.sent, self.status, self.paths = archive(), None, 200, []
        self.headers, self.hold, self.first_alone = None, lambda: None, None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.paths.append(self.path)
                outer.hold()
                self.send_response(outer.status)
                headers = {"Content-Length": len(outer.body)} if outer.headers is None else outer.headers
                for name, value in headers.items():
                    self.send_header(name, str(value))
                self.end_headers()
                body = outer.body
                if outer.status in (200, 203, 206):
                    if outer.first_alone:
                        self.wfile.write(body[:1])
                        assert outer.first_alone.wait(300)
                        body = body[1:]
                    with contextlib.suppress(ConnectionError):
                        self.wfile.write(body[: outer.sent])

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/tf2"
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
    with pytest.raises(InputError, match="broke off"):
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
    with pytest.raises(CheckError, match="inside ssd_tiny/; nothing was unpacked"):
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


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1, 2]",
        '"text"',
        "null",
        "[" * 100_000,
        f'{{"{NAME}": "text"}}',
        f'{{"{NAME}": {{"url": "x"}}}}',
        f'{{"{NAME}": {{"url": 1, "sha256": "{"0" * 64}"}}}}',
        f'{{"{NAME}": {{"url": "x", "sha256": "{"g" * 64}"}}}}',
        f'{{"other": {{"url": "x", "sha256": null}}, "{NAME}": null}}',
        " " * (1 << 20) + "{}",
    ],
)
def test_damaged_checksums(server, tmp_path, content):
    (tmp_path / "zoo.json").write_text(content)
    with pytest.raises(InputError, match=r"zoo\.json: cannot be read"):
        zoo.get(MODEL, tmp_path, base_url=server.url)
    assert server.paths == []


def test_checksums_that_are_no_file_are_not_waited_for(server, tmp_path):
    os.mkfifo(tmp_path / "zoo.json")
    with pytest.raises(InputError, match=r"zoo\.json: cannot be read"):
        zoo.get(MODEL, tmp_path, base_url=server.url)


def test_downloads_at_once_lose_no_checksum(tmp_path, monkeypatch):
    """All of them read zoo.json before the first one writes it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    models = [zoo.ZooModel(f"{NAME}_{i}", 1.0) for i in range(6)]
    bodies = {model.name: archive(name=model.name) for model in models}
    meet = threading.Barrier(len(models))
    servers = {}
    for model in models:
        servers[model.name] = Server()
        servers[model.name].body, servers[model.name].hold = bodies[model.name], meet.wait
    with ThreadPoolExecutor(len(models)) as pool:
        jobs = [pool.submit(zoo.get, m, tmp_path, base_url=servers[m.name].url) for m in models]
        found = {job.result().path.name: job.result().sha256 for job in jobs}
    for one in servers.values():
        one.close()
    assert found == {name: hashlib.sha256(body).hexdigest() for name, body in bodies.items()}
    recorded = json.loads((tmp_path / "zoo.json").read_text())
    assert {name: entry["sha256"] for name, entry in recorded.items()} == found


def test_one_model_twice_at_once(server, tmp_path):
    """The second one to end finds it there; with other bytes, it is refused."""
    server.hold = threading.Barrier(2).wait
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(zoo.get, MODEL, tmp_path, base_url=server.url) for _ in range(2)]
        assert sorted(job.result().is_up_to_date for job in jobs) == [False, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "zoo.json"]


@pytest.mark.parametrize("length", ["abc", "-5", "1e3", "9" * 30, str(1 << 40)])
def test_a_length_that_is_none_or_too_much(server, tmp_path, length):
    server.headers = {"Content-Length": length}
    with pytest.raises(InputError, match=r"Content-Length is|more than 1024 MiB") as caught:
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    assert "\n" not in str(caught.value) and not (tmp_path / "zoo").exists()


def test_a_body_without_an_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "_MAX_ARCHIVE_BYTES", 1 << 20)
    server.headers, server.body = {}, bytes(20 << 20)
    with pytest.raises(InputError, match="sends more than 1 MiB"):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(("seconds", "is_refused"), [(59, False), (61, True), (20_000, True)])
def test_a_server_that_is_too_slow(server, tmp_path, monkeypatch, seconds, is_refused):
    """The clock is set: one second at its start, ``seconds`` later when the first bytes are there."""
    times = itertools.chain([1.0], itertools.repeat(1.0 + seconds))
    # Not the module's own function: other threads of this process look at the clock, too.
    monkeypatch.setattr(zoo, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    if is_refused:
        with pytest.raises(InputError, match=rf"too slow, \d+ bytes in {seconds} seconds"):
            zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
        assert not (tmp_path / "zoo").exists()
    else:
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)


def test_single_bytes_are_looked_at_as_they_come(server, tmp_path, monkeypatch):
    """A read that waits for its whole block would wait for days, however short the timeout."""
    received, server.first_alone = [], threading.Event()

    def look(url, count, *_):
        received.append(count)
        server.first_alone.set()

    monkeypatch.setattr(zoo, "_refuse_when_slow", look)
    zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    assert received[0] == 1 and received[-1] == len(server.body)


def test_an_answer_that_never_begins(server, tmp_path, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(zoo, "_SECONDS_TO_ANSWER", 0.2)
    server.hold = lambda: stop.wait(300)
    with pytest.raises(InputError, match=r"broke off|cannot be downloaded"):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    stop.set()


@pytest.mark.parametrize(
    "target",
    [
        "http://localhost:{port}/x",
        "http://example.org/x",
        "https://example.org/x",
        "https://download.tensorflow.org.example.org/x",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "http://[/x",
        "https://download.tensorflow.org@example.org/x",
    ],
)
def test_a_redirect_to_another_host_is_not_followed(server, tmp_path, target):
    server.status, server.headers = 302, {"Location": target.format(port=server.port)}
    with pytest.raises(InputError, match=r"leads to|broke off|answers 302|cannot be downloaded") as caught:
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    assert "\n" not in str(caught.value) and len(server.paths) == 1


@pytest.mark.parametrize(
    ("old", "new", "is_followed"),
    [
        ("https://download.tensorflow.org/a", "https://storage.googleapis.com/b", True),
        ("https://download.tensorflow.org/a", "https://download.tensorflow.org/b", True),
        ("https://download.tensorflow.org/a", "http://download.tensorflow.org/b", False),
        ("https://download.tensorflow.org/a", "http://storage.googleapis.com/b", False),
        ("http://127.0.0.1/a", "http://127.0.0.1/b", True),
        ("http://127.0.0.1/a", "https://storage.googleapis.com/b", True),
    ],
)
def test_which_redirects_are_followed(old, new, is_followed):
    request = urllib.request.Request(old)
    arguments = (request, None, 302, "Found", {}, new)
    if is_followed:
        assert zoo._SameHosts().redirect_request(*arguments).full_url == new
    else:
        with pytest.raises(InputError, match="expected https on"):
            zoo._SameHosts().redirect_request(*arguments)


@pytest.mark.parametrize("status", [203, 206])
def test_another_status_is_no_whole_file(server, tmp_path, status):
    server.status = status
    with pytest.raises(InputError, match=f"the server answers {status}, expected 200"):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)


def test_a_small_archive_that_unpacks_to_much(server, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "_MAX_UNPACKED_BYTES", 10 << 20)
    server.body = archive((f"{NAME}/zeros", bytes(11 << 20), tarfile.REGTYPE))
    with pytest.raises(CheckError, match="holds more than 10 MiB"):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)
    assert not (tmp_path / "zoo").exists()


def test_an_archive_of_too_many_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "_MAX_MEMBERS", 20)
    server.body = archive(*((f"{NAME}/{i}", b"", tarfile.REGTYPE) for i in range(20)))
    with pytest.raises(CheckError, match="holds more than 20 files"):
        zoo.get(MODEL, tmp_path / "zoo", base_url=server.url)


def test_no_file_gets_special_rights(server, tmp_path):
    server.body = archive((f"{NAME}/run", b"x", tarfile.REGTYPE), mode=0o6777)
    path = zoo.get(MODEL, tmp_path, base_url=server.url).path
    assert stat.S_IMODE((path / "run").stat().st_mode) == 0o644


def test_names():
    assert len({model.name for model in zoo.MODELS}) == len(zoo.MODELS)
    assert zoo.find(zoo.MODELS[3].name) is zoo.MODELS[3]
    with pytest.raises(InputError, match="did you mean efficientdet_d0_coco17_tpu-32"):
        zoo.find("efficientdet_d0")
    with pytest.raises(InputError, match="did you mean ssd_mobilenet_v2_320x320_coco17_tpu-8"):
        zoo.find("ssd_mobilenet_v2_320x320_coco17_tpu8")
    with pytest.raises(InputError, match="see `odtrt zoo list`"):
        zoo.find("yolo")
