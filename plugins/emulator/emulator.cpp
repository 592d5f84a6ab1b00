// Fibers, one a CUDA thread, and the order in which they run.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

Thread *self;
Launch running;

namespace {

constexpr size_t kStack = 96 << 10;
constexpr long kMaxRounds = 1 << 18;  // far more than any kernel here takes

enum class State : uint8_t { kReady, kInWarp, kInBlock, kInCluster, kDone };

struct Copy {
  void *to;
  const void *from;
  size_t size, group;
};

struct Fiber {
  Thread thread{};
  void *stack_pointer = nullptr;
  bool has_arrived = false;  // at the cluster's barrier
  unsigned cluster_generation = 0;
  std::vector<Copy> copies;  // not made yet
  size_t groups = 0;         // of copies
};

struct Warp {
  Collective kind{};
  unsigned arrived = 0;
  int turn = 0;  // of the values: some lanes still read the last ones
  uint64_t values[2][32];
  bool has_ended = false;  // one of its lanes
};

struct Block {
  int live = 0, arrived = 0, votes = 0, last_votes = 0;
};

struct Cluster {
  int live = 0, arrived = 0;
  unsigned generation = 0;
};

std::vector<Fiber> fibers;
std::vector<State> states;  // of the fibers
std::vector<Warp> warps;
std::vector<Block> blocks;
Cluster cluster;
const std::function<void()> *kernel_of_launch;
void *stack_of_scheduler;
char *stacks;
size_t num_stacks;
bool is_given_up;
std::string what_failed;

// Pushes the registers that a function must preserve, stores the stack pointer in *save, and continues on the stack
// `load`.
extern "C" void odtrt_emulator_switch(void **save, void *load);
asm(R"(
.text
.type odtrt_emulator_switch,@function
odtrt_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size odtrt_emulator_switch,.-odtrt_emulator_switch
)");

Fiber &current() { return fibers[self->number]; }

void leave(State state) {
  states[self->number] = state;
  odtrt_emulator_switch(&current().stack_pointer, stack_of_scheduler);
}

// Makes those of `count` threads from `first` on ready that wait in this state.
void release(State state, size_t first, size_t count) {
  const auto begin = states.begin() + static_cast<ptrdiff_t>(first);
  std::replace(begin, begin + static_cast<ptrdiff_t>(count), state, State::kReady);
}

void release_block(int rank) {
  blocks[rank].last_votes = std::exchange(blocks[rank].votes, 0);
  blocks[rank].arrived = 0;
  release(State::kInBlock, running.block.x * rank, running.block.x);
}

void release_cluster() {
  cluster.arrived = 0;
  ++cluster.generation;
  for (Fiber &fiber : fibers) fiber.has_arrived = false;
  release(State::kInCluster, 0, states.size());
}

void main_of_fiber() {
  (*kernel_of_launch)();
  const Fiber &fiber = current();
  const int rank = fiber.thread.rank;
  warps[fiber.thread.warp].has_ended = true;
  if (--blocks[rank].live > 0 && blocks[rank].arrived == blocks[rank].live) release_block(rank);
  cluster.arrived -= fiber.has_arrived;
  if (--cluster.live > 0 && cluster.arrived == cluster.live) release_cluster();
  leave(State::kDone);
}

bool make_stacks(size_t count) {
  if (count <= num_stacks) return true;
  if (stacks != nullptr) munmap(stacks, num_stacks * kStack);
  void *const made =
      mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  num_stacks = made == MAP_FAILED ? 0 : count;
  stacks = num_stacks == 0 ? nullptr : static_cast<char *>(made);
  return num_stacks > 0;
}

void make_fibers(unsigned first_block, unsigned row) {
  const int threads = static_cast<int>(running.block.x), count = threads * running.blocks_of_cluster;
  fibers.assign(count, {});
  states.assign(count, State::kReady);
  warps.assign(count / 32, {});
  blocks.assign(running.blocks_of_cluster, {});
  cluster = {};
  cluster.live = count;
  for (Block &block : blocks) block.live = threads;
  for (int i = 0; i < count; ++i) {
    Thread &thread = fibers[i].thread;
    thread.index = {static_cast<unsigned>(i % threads), 0, 0};
    thread.rank = i / threads;
    thread.block = {first_block + thread.rank, row, 0};
    thread.number = i;
    thread.warp = i / 32;
    // The tops lie at different offsets in their pages; otherwise all stacks would compete for the same few cache
    // lines.
    auto top = reinterpret_cast<void **>(stacks + kStack * (i + 1) - 64 * (i % 256 + 1));
    *--top = nullptr;  // as if main_of_fiber had been called: the stack is aligned for it
    *--top = reinterpret_cast<void *>(main_of_fiber);
    fibers[i].stack_pointer = std::fill_n(top - 6, 6, nullptr) - 6;
  }
}

// Runs all threads of a cluster to their ends. In each round the warps run in a random order, each for as long as it
// can; the lanes of a warp run in a random direction.
void run_cluster(std::mt19937_64 &random) {
  std::vector<int> order(warps.size());
  std::iota(order.begin(), order.end(), 0);
  for (long round = 0; cluster.live > 0; ++round) {
    if (round == kMaxRounds) return fail("threads wait for something for ever");
    bool has_run = false;
    std::shuffle(order.begin(), order.end(), random);
    for (const int warp : order) {
      const unsigned first = random() % 32, step = random() % 2 ? 1 : 31;
      bool goes_on = true;
      for (int turn = 0; turn < 4 && goes_on; ++turn) {
        goes_on = false;
        for (unsigned k = 0; k < 32; ++k) {
          const unsigned number = warp * 32 + (first + k * step) % 32;
          if (states[number] != State::kReady) continue;
          has_run = goes_on = true;
          self = &fibers[number].thread;
          odtrt_emulator_switch(&stack_of_scheduler, fibers[number].stack_pointer);
          self = nullptr;
          if (is_given_up) return;
        }
      }
    }
    if (!has_run) return fail("deadlock: threads wait for others that will not come");
  }
}

}  // namespace

long long setting(const char *name, long long otherwise) {
  const char *const value = getenv((std::string("ODTRT_EMULATED_") + name).c_str());
  return value == nullptr ? otherwise : atoll(value);
}

const char *failure() { return what_failed.c_str(); }

void fail(const char *what) {
  if (!what_failed.empty()) return;
  what_failed = what;
  if (self != nullptr) {
    what_failed += " by block " + std::to_string(self->block.x) + ", thread " + std::to_string(self->index.x);
  }
}

void give_up(const char *what) {
  fail(what);
  is_given_up = true;
  leave(State::kDone);
  abort();
}

bool launch(dim3 grid, dim3 block, size_t shared_bytes, int blocks_of_cluster,
            const std::function<void()> &kernel) {
  what_failed.clear();
  is_given_up = false;
  if (block.x % 32 != 0 || block.y * block.z * grid.z != 1 || grid.x % blocks_of_cluster != 0) {
    fail("a launch of a shape that is not emulated");
  } else if (!make_stacks(static_cast<size_t>(block.x) * blocks_of_cluster)) {
    fail("no memory for so many threads");
  }
  if (!what_failed.empty()) return false;
  // Blocks of a row wait for its first one, never for others.
  std::mt19937_64 random(static_cast<uint64_t>(setting("SEED", 1)));
  std::vector<std::pair<unsigned, unsigned>> clusters;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += blocks_of_cluster) clusters.emplace_back(x, y);
  }
  std::shuffle(clusters.begin(), clusters.end(), random);
  std::stable_partition(clusters.begin(), clusters.end(), [](const auto &at) { return at.first == 0; });
  const size_t each = (shared_bytes + 255) & ~size_t{255};
  std::vector<char> memory(each * blocks_of_cluster + 256);
  char *const shared = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 255);
  running = {grid, block, blocks_of_cluster, shared, each};
  kernel_of_launch = &kernel;
  forget_accesses(true);
  for (const auto &at : clusters) {
    std::fill_n(shared, each * blocks_of_cluster, static_cast<char>(0xcd));  // a kernel must not rely on zeros
    forget_accesses(false);
    make_fibers(at.first, at.second);
    run_cluster(random);
    if (!what_failed.empty()) return false;
  }
  return true;
}

const uint64_t *exchange_in_warp(Collective kind, uint64_t value, unsigned mask) {
  Warp &warp = warps[self->warp];
  if (mask != 0xffffffffu) give_up("a collective of some lanes only");
  if (warp.has_ended) give_up("a collective of lanes of which one has ended");
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) give_up("lanes of a warp in different collectives");
  self->warp_barriers += kind == Collective::kBarrier;
  uint64_t *const values = warp.values[warp.turn];
  values[lane()] = value;
  warp.arrived |= 1u << lane();
  if (warp.arrived != mask) {
    leave(State::kInWarp);
    return values;
  }
  warp.arrived = 0;
  warp.turn ^= 1;
  release(State::kInWarp, self->number - lane(), 32);
  return values;
}

int block_barrier(bool vote) {
  Block &block = blocks[self->rank];
  block.votes += vote;
  if (++block.arrived == block.live) {
    release_block(self->rank);
  } else {
    leave(State::kInBlock);
  }
  ++self->block_barriers;
  return block.last_votes;
}

void cluster_arrive() {
  Fiber &fiber = current();
  if (fiber.has_arrived) give_up("a thread arrives at the cluster's barrier twice");
  fiber.has_arrived = true;
  fiber.cluster_generation = cluster.generation;
  ++self->arrivals;
  if (++cluster.arrived == cluster.live) release_cluster();
}

void cluster_wait() {
  if (self->waits == self->arrivals) give_up("a thread waits at the cluster's barrier and has not arrived");
  if (current().cluster_generation == cluster.generation) leave(State::kInCluster);
  ++self->waits;
}

void let_others_run() { leave(State::kReady); }

// A copy is made as late as it may be: who reads before the wait reads what was there.
void copy_later(void *to, const void *from, size_t size) {
  current().copies.push_back({to, from, size, current().groups});
}

void end_group_of_copies() { ++current().groups; }

void wait_for_copies(size_t groups_left) {
  Fiber &fiber = current();
  const auto is_due = [&](const Copy &copy) { return copy.group + groups_left < fiber.groups; };
  for (const Copy &copy : fiber.copies) {
    if (!is_due(copy)) continue;
    note_access(copy.from, copy.size, Access::kRead, __builtin_return_address(0));
    note_access(copy.to, copy.size, Access::kWrite, __builtin_return_address(0));
    std::memcpy(copy.to, copy.from, copy.size);
  }
  fiber.copies.erase(std::remove_if(fiber.copies.begin(), fiber.copies.end(), is_due), fiber.copies.end());
}

char *shared_memory_of(int rank, const void *own) {
  const ptrdiff_t offset = static_cast<const char *>(own) - own_shared_memory();
  if (offset < 0 || static_cast<size_t>(offset) >= running.shared_each) {
    give_up("what lies in no dynamic shared memory is looked for in another block");
  }
  if (rank != self->rank && self->waits == 0)
    give_up("another block's memory is reached for before it is there");
  if (blocks[rank].live == 0) give_up("the memory of a block is reached for that has ended");
  return running.shared + running.shared_each * rank + offset;
}

bool is_on_a_stack(const void *memory) { return memory >= stacks && memory < stacks + num_stacks * kStack; }

const Thread &thread_of_cluster(int number) { return fibers[number].thread; }

}  // namespace emulator
