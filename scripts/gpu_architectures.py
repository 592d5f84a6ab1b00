#!/usr/bin/env python3
"""Prints the CUDA architectures of the GPUs here, such as ``87`` or ``86 90``; nothing where there is none.

`make plugin` compiles for these. The CUDA driver is asked, not nvidia-smi, because a Jetson may have only the
driver. It runs on a Jetson's Python 3.8, before anything is installed.
"""

import ctypes

# From cuda.h: CUdevice_attribute's values, which never change.
MAJOR, MINOR = 75, 76


def architectures(driver):
    """The architectures, without repetition, in ascending order. driver: libcuda.so.1, loaded."""
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = set()
    for number in range(count.value):
        values = (ctypes.c_int(), ctypes.c_int())
        if driver.cuDeviceGet(ctypes.byref(device), number) == 0 and all(
            driver.cuDeviceGetAttribute(ctypes.byref(value), which, device) == 0
            for value, which in zip(values, (MAJOR, MINOR))
        ):
            found.add(values[0].value * 10 + values[1].value)
    return sorted(found)


if __name__ == "__main__":
    try:
        print(*architectures(ctypes.CDLL("libcuda.so.1")))
    except OSError:
        print()
