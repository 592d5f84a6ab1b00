// Runs CUDA kernels that g++ has compiled on the CPU: see README.md. cuda/ has the headers that kernels/*.cu include.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned of_x = 1, unsigned of_y = 1, unsigned of_z = 1) : x(of_x), y(of_y), z(of_z) {}
};

namespace emulator {

struct Thread {
  uint3 index, block;      // threadIdx, blockIdx
  int number, warp, rank;  // in its cluster: the thread's, its warp's, its block's
  // How many barriers it has passed. Only these order its accesses with those of other threads.
  unsigned arrivals, waits, block_barriers, warp_barriers;
};

struct Launch {
  dim3 grid, block;
  int blocks_of_cluster;
  char *shared;  // dynamic shared memory of the cluster's blocks, one after the other
  size_t shared_each;
};

extern Thread *self;  // nullptr outside of kernels
extern Launch running;

// Runs `kernel` in every thread of the grid, one cluster of blocks after the other. Returns whether nothing went wrong;
// otherwise failure() tells what did.
bool launch(dim3 grid, dim3 block, size_t shared_bytes, int blocks_of_cluster,
            const std::function<void()> &kernel);
const char *failure();
void fail(const char *what);                  // notes the first failure of a launch; it ends with the kernel
[[noreturn]] void give_up(const char *what);  // ends the kernel at once; in kernels only

// The environment variable ODTRT_EMULATED_<name> as a number, or `otherwise`.
long long setting(const char *name, long long otherwise);

// ---- what a thread can do ------------------------------------------------------------------------------------------

enum class Collective { kBarrier, kVote, kShuffle, kMatch };

// Waits for all lanes of the warp to come with a value each, and returns these 32.
const uint64_t *exchange_in_warp(Collective kind, uint64_t value, unsigned mask);
inline int lane() { return self->number % 32; }

int block_barrier(bool vote);  // waits for all threads of the block; returns for how many `vote` was true
void cluster_arrive();
void cluster_wait();
void let_others_run();

void copy_later(void *to, const void *from, size_t size);  // see cuda_pipeline.h
void end_group_of_copies();
void wait_for_copies(size_t groups_left);

inline int cluster_rank() { return self->rank; }
inline int cluster_size() { return running.blocks_of_cluster; }
inline char *own_shared_memory() { return running.shared + running.shared_each * self->rank; }
char *shared_memory_of(int rank, const void *own);

template <typename T>
T *in_block(T *own, int rank) {
  return reinterpret_cast<T *>(shared_memory_of(rank, own));
}

// ---- races (races.cpp) ---------------------------------------------------------------------------------------------

enum class Access { kRead, kWrite, kAtomicRead, kAtomicWrite };

extern bool is_looking_for_races;  // in the launch that is running

// Fails if another thread's access to this memory is not ordered before this one.
void note_access(const void *memory, size_t size, Access access, const void *where);
void forget_accesses(bool are_all);  // of a cluster that has ended, to shared memory; or all
bool is_on_a_stack(const void *memory);
const Thread &thread_of_cluster(int number);

}  // namespace emulator
