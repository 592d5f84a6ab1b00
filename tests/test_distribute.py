"""Work in Ray's tasks: the same bits as here, on two nodes, and after the death of a worker."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_cli import odtrt
from test_evaluate import evaluation  # noqa: F401
from tiny_model import model_folder

from odtrt_lib import distribute, int8, onnx_model
from odtrt_lib.app import cli
from odtrt_lib.distribute import LOCAL, mapped, require_cluster
from odtrt_lib.errors import ClusterError, InputError, MissingDependencyError
from odtrt_lib.evaluate import detect_item, merge, shards
from odtrt_lib.int8 import sweep

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20, "include_log_monitor": False}


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes with a core each, to which this process is connected."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", **token}.items():
            patch.setenv(name, value)
        ray = pytest.importorskip("ray")
        from ray.cluster_utils import Cluster

        head = {**NODE, "include_dashboard": False, "no_monitor": True}
        started = Cluster(initialize_head=True, head_node_args=head)
        try:
            started.add_node(**NODE)
            require_cluster(started.address)
            with distribute._connected(ray, started.address):
                yield started.address
        finally:
            started.shutdown()


def test_two_nodes_share_the_work_and_the_order_stays(cluster, tmp_path):
    """Two tasks wait for each other, so both run at the same time, for which there must be two nodes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def meet(number):
        import ray

        if number < 2:
            with pipe.open("w" if number else "r"):
                pass
        return number, str(Path.cwd()), ray.get_runtime_context().get_node_id()

    advanced = []
    found = mapped(meet, range(5), cluster, lambda: advanced.append(1))
    assert [(number, folder) for number, folder, _ in found] == [(i, str(Path.cwd())) for i in range(5)]
    assert found[0][2] != found[1][2] and len(advanced) == 5


def test_an_error_of_the_work_comes_back_as_it_is(cluster):
    def refuse(number):
        raise InputError(f"picture {number}: broken")

    with pytest.raises(InputError, match=r"^picture 7: broken$") as caught:
        mapped(refuse, [7], cluster)
    assert type(caught.value) is InputError


def test_a_task_that_is_lost_each_time_is_an_error_in_one_line(cluster, monkeypatch):
    monkeypatch.setattr(distribute, "_RETRIES", 0)
    with pytest.raises(ClusterError, match="Ray gave up a task after 0 retries: ") as caught:
        mapped(lambda item: os.kill(os.getpid(), signal.SIGKILL), [1], cluster)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(4)
    for number in range(8):
        pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_a_sweep_with_a_killed_worker_finds_the_same_bits(cluster, pictures, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    here, there = model_folder(tmp_path / "here"), model_folder(tmp_path / "there")
    int8.measure_sensitivity(here, int8.pictures_in(pictures, 8))
    marker, measure = tmp_path / "killed", sweep.unit_powers

    def killed_once(the_sweep, unit):
        if unit.conv == "middle_conv" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(the_sweep, unit)

    monkeypatch.setattr(sweep, "unit_powers", killed_once)
    status, out, _ = odtrt(capsys, "sensitivity", there, "--images", pictures, "--ray-address", cluster)
    assert status == 0 and "middle_conv" in out and marker.exists()
    reports = [(folder / "int8" / "sensitivity.json").read_bytes() for folder in (here, there)]
    assert reports[0] == reports[1]


def test_eval_finds_the_same_bits(cluster, evaluation, tmp_path, monkeypatch, capsys):  # noqa: F811
    recipe, coco = evaluation
    recipe = dataclasses.replace(recipe, threads=1)
    items = [(recipe, part) for part in shards(coco, 3)]
    here, there = merge(mapped(detect_item, items)), merge(mapped(detect_item, items, cluster))
    assert there == here and len(here.detections) > 30 and list(here.unreadable) == [coco.paths[2]]
    monkeypatch.setattr(cli, "_PICTURES_A_TASK", 2)
    content = json.loads(coco.annotations.read_text())
    for one in here.detections[::3]:
        content["annotations"].append({**one, "category_id": 1})
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(content))
    figures = []
    for arguments in ([], ["--ray-address", cluster]):
        json_file = tmp_path / f"{len(figures)}.json"
        status, _, err = odtrt(
            capsys, "eval", recipe.folder, "--annotations", annotations, "--images", coco.paths[0].parent,
            "--json", json_file, *arguments,
        )  # fmt: skip
        assert status == 1 and "1 of 7 pictures" in err
        figures.append(json_file.read_text())
    assert figures[0] == figures[1] and 0 < json.loads(figures[0])["map"] < 1


# --- without a cluster


def test_without_ray_the_work_is_done_here():
    advanced = []
    assert mapped(str, range(3), advance=lambda: advanced.append(1)) == ["0", "1", "2"]
    assert len(advanced) == 3


def one_line(call, kind):
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ray_absent_is_said_before_anything_is_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "run `pip install ray`" in one_line(lambda: mapped(str, [1], "auto"), MissingDependencyError)
    for command in (["sensitivity", "x", "--images", "y"], ["eval", "x", "--annotations", "y"]):
        status, _, err = odtrt(capsys, *command, "--ray-address", "auto")
        assert (status, err.count("\n")) == (1, 1) and "pip install ray" in err


@pytest.mark.parametrize("address", ["nonsense", "ray://host:10001", "host:", "host:6379 x", " "])
def test_an_address_of_another_form_is_refused(address):
    message = one_line(lambda: require_cluster(address), InputError)
    assert repr(address) in message and "HOST:PORT" in message


@pytest.fixture
def stand_in(monkeypatch):
    """In the place of Ray: what it was asked for. The variables that it reads are free."""
    asked = SimpleNamespace(init=[], shutdown=0, refuses=False)

    def init(**options):
        asked.init.append(options)
        if asked.refuses:
            raise RuntimeError("no\nmemory")

    def shutdown():
        asked.shutdown += 1

    asked.ray = SimpleNamespace(init=init, shutdown=shutdown, is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", asked.ray)
    for name in (
        "RAY_USAGE_STATS_ENABLED",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return asked


def test_nobody_at_the_address(stand_in):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "127.0.0.1:99999"):
        message = one_line(lambda address=address: mapped(str, [1], address), ClusterError)
        assert address in message and "nobody answers" in message
    assert stand_in.init == []


def test_a_cluster_of_this_machine_asks_for_a_token_and_reports_to_nobody(stand_in):
    with distribute._connected(require_cluster(LOCAL), LOCAL):
        assert stand_in.shutdown == 0
    assert stand_in.shutdown == 1
    (options,) = stand_in.init
    assert options["address"] == "local" and options["include_dashboard"] is False
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0" and os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize("address", [LOCAL, "auto"])
def test_a_cluster_that_does_not_start_is_one_line(stand_in, address):
    stand_in.refuses = True
    assert "no memory" in one_line(lambda: mapped(str, [1], address), ClusterError)
    assert stand_in.shutdown == 1


def test_one_thread_is_one_thread():
    onnxruntime = pytest.importorskip("onnxruntime")
    from tiny_model import heads_model

    model = heads_model().SerializeToString()
    assert onnx_model.session(model, threads=1).get_session_options().intra_op_num_threads == 1
    assert onnx_model.session(model).get_session_options().intra_op_num_threads == 0, onnxruntime.__version__
