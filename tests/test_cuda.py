"""The CUDA runtime by ctypes: the real library's errors, other libraries' addresses, the rest on a stand-in.

What a GPU does with it, tests/test_gpu.py checks.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_stand_in import Host

from odtrt_lib import cuda
from odtrt_lib.errors import InputError, MissingDependencyError
from odtrt_lib.machine import this_machine


@pytest.fixture
def host(monkeypatch) -> Host:
    host = Host()
    monkeypatch.setattr(cuda, "library", lambda: host)
    return host


def test_the_real_library_says_why_there_is_no_gpu():
    if this_machine().gpu is not None:
        pytest.skip("there is a GPU here")
    try:
        cuda.library()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    for make in (lambda: cuda.Memory(16), lambda: cuda.Memory(16, "pinned"), cuda.Stream, cuda.Event):
        with pytest.raises(cuda.CudaError) as caught:
            make()
        assert caught.value.number in (35, 100) and "\n" not in str(caught.value)


class PyCudaAllocation:
    """PyCUDA's DeviceAllocation is no integer and has no interface; int() gives its address."""

    def __int__(self) -> int:
        return 4096


@pytest.mark.parametrize(
    "memory",
    [
        4096,
        np.uint64(4096),
        PyCudaAllocation(),
        SimpleNamespace(__cuda_array_interface__={"data": (4096, False), "shape": (1,), "typestr": "<f4"}),
    ],
    ids=["an integer", "numpy's integer", "PyCUDA", "CuPy, PyTorch"],
)
def test_addresses_of_other_libraries(memory):
    assert cuda.address_of(memory) == 4096


@pytest.mark.parametrize("memory", [None, np.zeros(3), [4096], 4096.5j])
def test_what_is_no_device_memory(memory):
    with pytest.raises(InputError, match="expected device memory"):
        cuda.address_of(memory)


@pytest.mark.parametrize("kind", [*cuda.KINDS, "pageable"])
def test_a_buffer_brings_each_array_to_the_gpu_and_back(host, kind):
    rng = np.random.default_rng(1)
    stream, buffer = cuda.Stream(), cuda.Buffer(kind)
    for sizes in ((3, 5), (3, 5), (40, 7), (2, 1)):
        arrays = {
            "image": rng.integers(0, 256, (sizes[0], 7, 3), dtype=np.uint8),
            "boxes": rng.normal(size=(sizes[1], 4)).astype(np.float32),
        }
        buffer.arrange([(name, array.dtype, array.shape) for name, array in arrays.items()])
        for name, array in arrays.items():
            assert buffer.address(name) % 256 == 0
            if kind == "device":
                buffer.write(name, array, stream)
            else:
                buffer.array(name)[:] = array
        if kind != "device":
            buffer.upload(stream)
            stream.synchronize()
        for name, array in arrays.items():
            on_gpu = host.view(buffer.address(name), array.dtype, array.shape)
            assert np.array_equal(on_gpu, array)
            on_gpu[:] = array[::-1]
            assert np.array_equal(buffer.read(name, stream), array[::-1])
        if kind != "device":
            buffer.download(stream)
            stream.synchronize()
            assert all(np.array_equal(buffer.array(name), array[::-1]) for name, array in arrays.items())
    buffer.free()
    buffer.free()
    del stream
    gc.collect()
    assert host.is_empty()


def test_a_buffer_tells_when_graphs_know_a_wrong_address(host):
    buffer = cuda.Buffer("pinned")
    large, small = [("a", np.float32, (100,))], [("a", np.float32, (10,)), ("b", np.float32, (10,))]
    assert buffer.arrange(large) and not buffer.arrange(large)
    base = buffer.base
    assert buffer.arrange(small) and buffer.base == base, "it does not shrink"
    assert buffer.arrange([("a", np.float32, (1000,))])
    assert len(host.memory) == len(host.pinned) == 1, "the old memory is given back"


def test_no_memory_leaves_nothing_behind(host):
    host.refuses["cudaHostAlloc"] = 2
    buffer = cuda.Buffer("pinned")
    with pytest.raises(cuda.CudaError, match="CUDA error 2: out of memory"):
        buffer.arrange([("a", np.float32, (10,))])
    buffer.free()
    assert host.is_empty()
    with pytest.raises(InputError, match="expected one of device, pinned, mapped"):
        cuda.Memory(3, "managed")


def test_a_graph_does_again_what_was_enqueued(host):
    stream, memory, pinned = cuda.Stream(), cuda.Memory(4), cuda.Memory(4, "pinned")
    pinned.host[:] = 1
    graph = cuda.Graph(stream, lambda: cuda.copy(memory.address, pinned.address, 4, stream))
    stream.synchronize()
    assert 1 not in host.view(memory.address, np.uint8, (4,)), "recording runs nothing"
    for number in (1, 2):
        pinned.host[:] = number
        graph.launch(stream)
        stream.synchronize()
        assert (host.view(memory.address, np.uint8, (4,)) == number).all()


@pytest.mark.parametrize("failing", ["the function", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"])
def test_a_graph_that_cannot_be_recorded_leaves_the_stream_usable(host, failing):
    stream, memory = cuda.Stream(), cuda.Memory(4)

    def enqueue() -> None:
        if failing == "the function":
            raise KeyError("inside")

    if failing != "the function":
        host.refuses[failing] = 901
    with pytest.raises((KeyError, cuda.CudaError)):
        cuda.Graph(stream, enqueue)
    host.capture = None if failing == "cudaStreamEndCapture" else host.capture
    host.refuses.clear()
    cuda.fill(memory.address, 3, 4, stream)
    stream.synchronize()
    assert (host.view(memory.address, np.uint8, (4,)) == 3).all() and not host.graphs
