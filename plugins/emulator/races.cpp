// Detection of races. g++'s -fsanitize=thread calls a function before each access to memory. Its own library, which
// knows locks, is not linked. This file defines these functions, and they know barriers instead.
#include <dlfcn.h>

#include <cstdio>
#include <string>
#include <unordered_map>

#include "emulator.h"

extern "C" char __bss_start[] __attribute__((visibility("hidden"))),
    _end[] __attribute__((visibility("hidden")));

namespace emulator {

bool is_looking_for_races;

namespace {

struct Past {        // an access
  int cluster = -1;  // of the launch; -1: there was none
  int thread;        // in its cluster
  unsigned bytes;    // of the four, a bit each
  bool is_atomic;
  unsigned arrivals, block_barriers, warp_barriers;  // of the thread until then
  unsigned block;
  const void *where;
};

struct Word {  // four bytes
  Past write, reads[6];
  unsigned num_reads = 0;
};

std::unordered_map<uintptr_t, Word> words_shared, words_global;
int cluster;

bool is_ordered(const Past &past) {
  if (past.cluster != cluster) return false;
  if (past.thread == self->number || past.arrivals < self->waits) return true;
  const Thread &other = thread_of_cluster(past.thread);
  if (other.rank != self->rank) return false;
  if (past.block_barriers < self->block_barriers) return true;
  return other.warp == self->warp && past.warp_barriers < self->warp_barriers;
}

std::string place_of(const void *where) {  // for addr2line -e
  Dl_info info{};
  char text[32];
  if (dladdr(where, &info) == 0) return "?";
  snprintf(text, sizeof text, "%#tx", static_cast<const char *>(where) - static_cast<char *>(info.dli_fbase));
  return text;
}

bool is_shared(uintptr_t at) {  // dynamic, or what the kernels declare: to g++, static variables
  const auto dynamic = reinterpret_cast<uintptr_t>(running.shared);
  return (at >= dynamic && at < dynamic + running.shared_each * running.blocks_of_cluster) ||
         (at >= reinterpret_cast<uintptr_t>(__bss_start) && at < reinterpret_cast<uintptr_t>(_end));
}

}  // namespace

void forget_accesses(bool are_all) {
  words_shared.clear();
  if (are_all) {
    words_global.clear();
    is_looking_for_races = setting("RACES", 0) != 0;
    cluster = 0;
  } else {
    ++cluster;
  }
}

void note_access(const void *memory, size_t size, Access access, const void *where) {
  if (!is_looking_for_races || self == nullptr || *failure() != 0 || is_on_a_stack(memory)) return;
  const auto at = reinterpret_cast<uintptr_t>(memory);
  const bool is_write = access == Access::kWrite || access == Access::kAtomicWrite;
  const bool is_atomic = access == Access::kAtomicRead || access == Access::kAtomicWrite;
  const bool in_shared = is_shared(at);
  for (uintptr_t number = at / 4; number <= (at + size - 1) / 4; ++number) {
    unsigned bytes = 0;
    for (uintptr_t k = 0; k < 4; ++k) bytes |= (4 * number + k >= at && 4 * number + k < at + size) << k;
    Word &word = (in_shared ? words_shared : words_global)[number];
    const auto check = [&](const Past &past, const char *what) {
      if (past.cluster < 0 || (past.bytes & bytes) == 0 || (past.is_atomic && is_atomic) || is_ordered(past))
        return;
      const std::string text = std::string("race in ") + (in_shared ? "shared" : "global") + " memory, " +
                               what + ": at " + place_of(past.where) + " by block " +
                               std::to_string(past.block) + ", thread " +
                               std::to_string(past.thread % running.block.x) + ", and at " + place_of(where);
      fail(text.c_str());
    };
    check(word.write, is_write ? "two writes" : "a write and a read");
    if (is_write) {
      for (const Past &read : word.reads) check(read, "a read and a write");
    }
    const Past now{cluster,
                   self->number,
                   bytes,
                   is_atomic,
                   self->arrivals,
                   self->block_barriers,
                   self->warp_barriers,
                   self->block.x,
                   where};
    if (!is_write) {
      word.reads[word.num_reads++ % 6] = now;
      continue;
    }
    word.write = now;
    for (Past &read : word.reads) {  // what comes after this write comes after them
      if (!is_atomic && (read.bytes & ~bytes) == 0) read.cluster = -1;
    }
  }
}

}  // namespace emulator

using emulator::Access;
using emulator::note_access;

// ---- what g++ calls ------------------------------------------------------------------------------------------------

#define ODTRT_NOTE(at, size, access) \
  if (emulator::is_looking_for_races) note_access(at, size, access, __builtin_return_address(0))
#define ODTRT_HOOK(name, size, access) \
  extern "C" void __tsan_##name(void *at) { ODTRT_NOTE(at, size, access); }
#define ODTRT_HOOKS(size)                                    \
  ODTRT_HOOK(read##size, size, Access::kRead)                \
  ODTRT_HOOK(write##size, size, Access::kWrite)              \
  ODTRT_HOOK(unaligned_read##size, size, Access::kRead)      \
  ODTRT_HOOK(unaligned_write##size, size, Access::kWrite)    \
  ODTRT_HOOK(volatile_read##size, size, Access::kAtomicRead) \
  ODTRT_HOOK(volatile_write##size, size, Access::kAtomicWrite)
ODTRT_HOOKS(1)
ODTRT_HOOKS(2)
ODTRT_HOOKS(4)
ODTRT_HOOKS(8)
ODTRT_HOOKS(16)

extern "C" {
void __tsan_read_range(void *at, size_t size) { ODTRT_NOTE(at, size, Access::kRead); }
void __tsan_write_range(void *at, size_t size) { ODTRT_NOTE(at, size, Access::kWrite); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
// Of the host's part of a .cu file.
int __tsan_atomic32_load(const volatile int *at, int) { return *at; }
void __tsan_atomic32_store(volatile int *at, int value, int) { *at = value; }
char __tsan_atomic8_load(const volatile char *at, int) { return *at; }
}
