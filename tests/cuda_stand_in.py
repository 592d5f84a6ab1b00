"""The CUDA runtime library on host memory: what :mod:`odtrt_lib.cuda` calls, without a GPU.

It knows every allocation's bounds, which side of a copy is which, and does what was put on a stream only when
somebody waits for it. What it is stricter about than a GPU is there to catch mistakes: device memory and
mapped memory have addresses of their own for kernels, pinned memory is read when the stream gets there, fresh
memory is full of 0xA5, and pageable memory cannot be recorded in a graph. As on a GPU, what is allocated
after something was freed often has its address.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

OUT_OF_MEMORY, INVALID_VALUE, NOT_SUPPORTED, UNSUPPORTED_IN_CAPTURE = 2, 1, 801, 900
_FOR_KERNELS = 1 << 45  # from the host's address of mapped memory to the GPU's


@dataclasses.dataclass
class Block:
    content: np.ndarray
    is_mapped: bool = False


class Host:
    """Addresses, streams and graphs of one are never those of another: what a test leaves cannot hit others.

    free_bytes: device memory that is left, None: any. refuses: functions that return a status instead.
    """

    numbers = itertools.count(1)

    def __init__(self) -> None:
        self.arena = np.empty(1 << 26, np.uint8)
        self.memory: dict[int, Block] = {}
        self.pinned: dict[int, Block] = {}
        self.pending: list[Callable[[], None]] = []
        self.capture: list[Callable[[], None]] | None = None
        self.streams: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, float | None] = {}
        self.free_bytes: int | None = None
        self.refuses: dict[str, int] = {}
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            return object.__getattribute__(self, name)
        self.calls.append(name)
        if name in self.refuses:
            return lambda *arguments: self.refuses[name]
        return object.__getattribute__(self, name)

    # ---- for kernels and tests

    def view(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """An array where a kernel reaches it; an address or a size outside an allocation is an error."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        found = self._where(address)
        assert found is not None and found[0] != "pinned", f"{address:#x}: no memory that a kernel reaches"
        content = found[1]
        assert size <= len(content), f"{size} bytes in an allocation of {len(content)}"
        return content[:size].view(dtype).reshape(shape)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        assert stream in self.streams
        (self.pending if self.capture is None else self.capture).append(work)

    def is_empty(self) -> bool:
        return not (self.memory or self.pinned or self.streams or self.graphs or self.events)

    def _where(self, address: int) -> tuple[str, np.ndarray] | None:
        """The kind of memory at an address, and its bytes from there on; None if it is pageable."""
        for blocks, shift, kind in (
            (self.memory, 0, "device"),
            (self.pinned, 0, "pinned"),
            (self.pinned, _FOR_KERNELS, "mapped"),
        ):
            for start, block in blocks.items():
                offset = address - start - shift
                if 0 <= offset < len(block.content) and (kind != "mapped" or block.is_mapped):
                    return kind, block.content[offset:]
        return None

    # ---- the library's functions

    def cudaGetErrorString(self, number: int) -> bytes:
        return {OUT_OF_MEMORY: b"out of memory"}.get(number, b"an error")

    def cudaGetLastError(self) -> int:
        return 0

    def cudaMalloc(self, out: Any, size: int) -> int:
        if self.free_bytes is not None and size > self.free_bytes:
            return OUT_OF_MEMORY
        first = self.arena.ctypes.data
        start = first + -first % 256
        for address, block in sorted(self.memory.items()):
            if address - start >= size + 256:
                break
            start = address + len(block.content) + 256
            start += -start % 256
        assert start + size <= first + len(self.arena), "the stand-in has no more memory"
        content = self.arena[start - first : start - first + size]
        content.fill(0xA5)
        self.memory[start], out._obj.value = Block(content), start
        return 0

    def cudaFree(self, address: int) -> int:
        del self.memory[address]
        return 0

    def cudaHostAlloc(self, out: Any, size: int, flags: int) -> int:
        whole = np.full(size + 256, 0xA5, np.uint8)
        start = -whole.ctypes.data % 256
        content = whole[start : start + size]
        out._obj.value = content.ctypes.data
        self.pinned[out._obj.value] = Block(content, bool(flags & 2))
        return 0

    def cudaFreeHost(self, address: int) -> int:
        del self.pinned[address]
        return 0

    def cudaHostGetDevicePointer(self, out: Any, address: int, flags: int) -> int:
        if not self.pinned[address].is_mapped:
            return INVALID_VALUE
        out._obj.value = address + _FOR_KERNELS
        return 0

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> int:
        assert kind == 4, "the addresses say which side is which"
        sides = self._where(target), self._where(source)
        if None in sides and self.capture is not None:
            return UNSUPPORTED_IN_CAPTURE
        for side in sides:
            assert side is None or size <= len(side[1]), "a copy past the end"
        if sides[1] is None:
            content = np.frombuffer(ctypes.string_at(source, size), np.uint8)
        else:
            content = sides[1][1][:size]

        def work() -> None:
            if sides[0] is None:
                ctypes.memmove(target, content.ctypes.data, size)
            else:
                sides[0][1][:size] = content

        self.enqueue(stream, work)
        return 0

    def cudaMemsetAsync(self, address: int, byte: int, size: int, stream: int) -> int:
        content = self.view(address, np.uint8, (size,))
        self.enqueue(stream, lambda: content.fill(byte))
        return 0

    def cudaStreamCreateWithFlags(self, out: Any, flags: int) -> int:
        out._obj.value = next(self.numbers)
        self.streams.add(out._obj.value)
        return 0

    def cudaStreamDestroy(self, stream: int) -> int:
        self.streams.remove(stream)
        return 0

    def cudaStreamSynchronize(self, stream: int) -> int:
        assert stream in self.streams and self.capture is None
        while self.pending:
            self.pending.pop(0)()
        return 0

    def cudaEventCreate(self, out: Any) -> int:
        out._obj.value = next(self.numbers)
        self.events[out._obj.value] = None
        return 0

    def cudaEventDestroy(self, event: int) -> int:
        del self.events[event]
        return 0

    def cudaEventRecord(self, event: int, stream: int) -> int:
        if self.capture is not None:
            return UNSUPPORTED_IN_CAPTURE  # such an event has no time
        self._record(event, stream)
        return 0

    def cudaEventRecordWithFlags(self, event: int, stream: int, flags: int) -> int:
        if flags != 1 or self.capture is None:
            return INVALID_VALUE
        self._record(event, stream)
        return 0

    def _record(self, event: int, stream: int) -> None:
        assert event in self.events

        def happen() -> None:
            self.events[event] = time.perf_counter()

        self.enqueue(stream, happen)

    def cudaEventSynchronize(self, event: int) -> int:
        while self.pending:
            self.pending.pop(0)()
        return 0

    def cudaEventElapsedTime(self, out: Any, start: int, end: int) -> int:
        times = self.events[start], self.events[end]
        if None in times:
            return INVALID_VALUE
        out._obj.value = 1e3 * (times[1] - times[0])
        return 0

    def cudaPointerGetAttributes(self, out: Any, address: int) -> int:
        found = self._where(address)
        out._obj.type = 0 if found is None else 2 if found[0] == "device" else 1
        return 0

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        assert stream in self.streams and self.capture is None
        self.capture = []
        return 0

    def cudaStreamEndCapture(self, stream: int, out: Any) -> int:
        assert self.capture is not None
        out._obj.value = next(self.numbers)
        self.graphs[out._obj.value], self.capture = self.capture, None
        return 0

    def cudaGraphInstantiateWithFlags(self, out: Any, graph: int, flags: int) -> int:
        out._obj.value = next(self.numbers)
        self.graphs[out._obj.value] = list(self.graphs[graph])
        return 0

    def cudaGraphUpload(self, graph: int, stream: int) -> int:
        return 0

    def cudaGraphLaunch(self, graph: int, stream: int) -> int:
        for work in self.graphs[graph]:
            self.enqueue(stream, work)
        return 0

    def cudaGraphDestroy(self, graph: int) -> int:
        del self.graphs[graph]
        return 0

    cudaGraphExecDestroy = cudaGraphDestroy
