# The CPU library for 64-bit Arm Linux (every Jetson), from another machine. `make plugin TARGET=jetson-orin` uses this
# file too; scripts/cross_compile.py adds what CUDA needs.
#   apt install g++-aarch64-linux-gnu
#   cmake -S plugins -B plugins/build-aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
