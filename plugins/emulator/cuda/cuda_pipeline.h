// Copies that a thread starts now and waits for later.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void *to, const void *from, size_t size) {
  emulator::copy_later(to, from, size);
}
inline void __pipeline_commit() { emulator::end_group_of_copies(); }
inline void __pipeline_wait_prior(size_t groups_left) { emulator::wait_for_copies(groups_left); }
