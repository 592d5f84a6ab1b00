// Exact greedy suppression of up to 2560 candidates that are in their final order. A rival of a candidate is a better
// candidate of the same group whose IoU with it is above the threshold. Two kernels share the work:
//
// 1. compute_iou_mask, in many blocks, sets a bit for each candidate and each of its rivals. It does not matter here
//    which rivals are kept, so all pairs are tested at the same time.
// 2. suppress_chunks, in one block, goes through chunks of 64 candidates, best first, as a pipeline of warps. While
//    one warp decides about a chunk, eight warps test the next chunk against everything kept before, four warps copy
//    the masks of later chunks into shared memory, and one warp counts the detections of the chunk before. A chunk
//    takes a few rounds: each candidate without an undecided rival is kept, and each candidate that a kept one
//    suppresses is dropped. That is exactly the greedy result, because the best undecided candidate never has an
//    undecided rival.
#pragma once

#include <cuda_pipeline.h>

#include "launch.cuh"
#include "semantics.h"
#include "warp.cuh"

namespace odtrt {

constexpr int kChunk = 64;
constexpr int kMaxChunks = 40;
constexpr int kMaxCandidates = kChunk * kMaxChunks;
constexpr int kMaskThreads = 256;  // that compute one tile of the mask

constexpr int kTesters = 256;
constexpr int kParts = kTesters / kChunk;  // threads that test one candidate; each reads every kParts-th word
constexpr int kCopiers = 128;
constexpr int kSuppressThreads = kTesters + kCopiers + 64;
constexpr int kStages = 3;
constexpr int kRingBytes = kStages * kChunk * kMaxChunks * static_cast<int>(sizeof(uint64_t));

struct Candidate {
  Box box;  // corners ordered
  int32_t group;
};

// A rectangle for a quick first test: boxes whose rectangles do not overlap cannot suppress each other. A box that
// needs the full test against every other (NaN, infinities, a negative threshold) gets the whole plane. A box without
// area gets an empty rectangle, which overlaps nothing.
__device__ __forceinline__ Box outline_of(const Box &box, float area, float iou_threshold) {
  const float infinity = float_of(0x7f800000u);
  if (!isfinite(area) || !(iou_threshold >= 0.0f)) return {-infinity, -infinity, infinity, infinity};
  return area > 0.0f ? box : Box{infinity, infinity, -infinity, -infinity};
}

__device__ __forceinline__ bool overlap(const Box &a, const Box &b) {
  return a.ymin < b.ymax && b.ymin < a.ymax && a.xmin < b.xmax && b.xmin < a.xmax;
}

// Most pairs are decided without a division: with a threshold t, IoU <= t is the same as intersection <= t / (1 + t)
// * (area + other area). The fraction t / (1 + t) of the areas' sum is made smaller by a margin of 2^-19, which is
// more than all rounding errors together. An intersection below fraction * (area + other area) then does not
// suppress, and one above kCertainFactor times that surely does. An area or a threshold of unusual size gives NaN,
// for which both comparisons are false: such pairs take the exact test.
constexpr float kCertainFactor = 1.0f + 7.62939453125e-6f;  // 2^-17

__device__ __forceinline__ float union_fraction_for(float iou_threshold) {
  return iou_threshold >= 1e-6f && iou_threshold <= 2.0f
             ? mul(divide(iou_threshold, add(1.0f, iou_threshold)), 1.0f - 1.9073486328125e-6f)
             : float_of(0x7fc00000u);
}

__device__ __forceinline__ float scaled_area(float area, float union_fraction) {
  return area >= 1e-20f && area <= 1e10f ? mul(area, union_fraction) : float_of(0x7fc00000u);
}

__device__ __forceinline__ float intersection_of(const Box &a, const Box &b) {  // may be negative
  return mul(fmaxf(flushed_sub(fminf(a.ymax, b.ymax), fmaxf(a.ymin, b.ymin)), 0.0f),
             flushed_sub(fminf(a.xmax, b.xmax), fmaxf(a.xmin, b.xmin)));
}

__device__ __forceinline__ bool may_suppress(const Box &a, float scaled_area_of_a, const Box &b,
                                             float scaled_area_of_b) {
  return !(intersection_of(a, b) < add(scaled_area_of_a, scaled_area_of_b));
}

struct Tile {
  float4 outlines[kChunk];  // of the better candidates
  Candidate better[kChunk], weaker[kChunk];
  float better_area[kChunk], weaker_area[kChunk];
};

// Sets bit b of mask[(r * kMaxChunks + c) * 64 + l] if candidate 64 c + b comes before candidate 64 r + l and
// suppresses it. All threads of the block call this. Each group of kMaskThreads threads computes one tile of 64 x 64
// pairs at a time, and uses its own element of `tiles`. load(i) returns a Candidate; on_row(i) is called once for
// each i < count.
template <typename Load, typename OnRow>
__device__ __forceinline__ void compute_iou_mask(int count, float iou_threshold, uint64_t *__restrict__ mask,
                                                 Tile *tiles, Load load, OnRow on_row) {
  const int chunks = (count + kChunk - 1) / kChunk, num_tiles = chunks * (chunks + 1) / 2;
  const int thread = static_cast<int>(threadIdx.x) % kMaskThreads;
  const int at_once = static_cast<int>(blockDim.x) / kMaskThreads;
  const int own = static_cast<int>(threadIdx.x) / kMaskThreads;
  Tile &tile = tiles[own];
  for (int start = static_cast<int>(blockIdx.x) * at_once; start < num_tiles;
       start += static_cast<int>(gridDim.x) * at_once) {
    const int t = start + own;
    int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(t) + 1.0f) - 1.0f) * 0.5f);
    while ((row + 1) * (row + 2) / 2 <= t) ++row;
    while (row * (row + 1) / 2 > t) --row;
    const int column = t - row * (row + 1) / 2;
    __syncthreads();
    if (thread < 2 * kChunk && t < num_tiles) {
      const int local = thread % kChunk;
      const bool is_row = thread >= kChunk;
      const int i = (is_row ? row : column) * kChunk + local;
      if (i < count) {
        const Candidate candidate = load(i);
        const float area = signed_area(candidate.box);
        (is_row ? tile.weaker : tile.better)[local] = candidate;
        (is_row ? tile.weaker_area : tile.better_area)[local] = area;
        if (!is_row) {
          const Box outline = outline_of(candidate.box, area, iou_threshold);
          tile.outlines[local] = make_float4(outline.ymin, outline.xmin, outline.ymax, outline.xmax);
        }
        if (is_row && row == column) on_row(i);
      }
    }
    __syncthreads();
    const int local = thread >> 2, part = thread & 3;  // four threads a row
    const int j = row * kChunk + local;
    const bool is_in = j < count && t < num_tiles;
    uint64_t bits = 0;
    if (is_in) {
      const Candidate weaker = tile.weaker[local];
      const float area = tile.weaker_area[local];
      const Box outline = outline_of(weaker.box, area, iou_threshold);
      uint32_t rivals = 0;
#pragma unroll
      for (int k = 0; k < kChunk / 4; ++k) {
        const float4 other = tile.outlines[4 * k + part];
        const bool is_rival = tile.better[4 * k + part].group == weaker.group &&
                              overlap(outline, {other.x, other.y, other.z, other.w});
        rivals |= static_cast<uint32_t>(is_rival) << k;
      }
      if (row == column) rivals &= (1u << ((local - part + 3) >> 2)) - 1;  // only candidates before j
      for (; rivals != 0; rivals &= rivals - 1) {
        const int b = 4 * (__ffs(static_cast<int>(rivals)) - 1) + part;
        if (suppresses(tile.better[b].box, tile.better_area[b], weaker.box, area, iou_threshold))
          bits |= 1ull << b;
      }
    }
    bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
    bits |= __shfl_xor_sync(0xffffffffu, bits, 2);
    if (part == 0 && t < num_tiles) {
      mask[(static_cast<size_t>(row) * kMaxChunks + column) * kChunk + local] = bits;
    }
  }
}

struct Survivors {
  uint64_t kept[kMaxChunks];   // a bit for each candidate that was kept
  uint64_t found[kMaxChunks];  // those of them that `filter` returned
  int32_t before[kMaxChunks];  // how many bits of `found` are set in earlier chunks
  int32_t chunks;              // how many elements of these arrays are set
  int32_t num_found;           // at most max_found
  int32_t stop[2];             // enough are found; elements alternate: one is set while the other is read
  // Two elements each: for the chunk that is being decided, and for the next one.
  uint4 dead[2][2];               // 32 bits from each part of the testers: candidates that are suppressed
  uint64_t rivals[2][2][kChunk];  // in the same chunk, and in the chunk before
  // Copies of `kept`: the testers read one while the other is written.
  alignas(16) uint64_t kept_before[2][kMaxChunks];
};

// Decides about the 64 candidates of a chunk, and returns a bit for each that is kept. low, high: the bits of those
// that no earlier chunk suppresses. Lane l has the rivals of candidates l and l + 32; rivals have lower indices, so
// 32 bits are enough for candidate l. A whole warp calls this.
__device__ __forceinline__ uint64_t suppress_chunk(uint32_t low, uint32_t high, uint32_t rivals_of_low,
                                                   uint64_t rivals_of_high) {
  const int lane = lane_id();
  const uint32_t rivals_low = static_cast<uint32_t>(rivals_of_high), rivals_high = rivals_of_high >> 32;
  uint32_t kept_low = 0, kept_high = 0;
  while ((low | high) != 0) {
    const uint32_t stay_low = __ballot_sync(0xffffffffu, (low >> lane & 1) && !(rivals_of_low & low));
    const uint32_t stay_high =
        __ballot_sync(0xffffffffu, (high >> lane & 1) && !((rivals_low & low) | (rivals_high & high)));
    kept_low |= stay_low;
    kept_high |= stay_high;
    low &= ~stay_low;
    high &= ~stay_high;
    if ((low | high) == 0) break;
    low &= ~__ballot_sync(0xffffffffu, (rivals_of_low & stay_low) != 0);
    high &= ~__ballot_sync(0xffffffffu, ((rivals_low & stay_low) | (rivals_high & stay_high)) != 0);
  }
  return static_cast<uint64_t>(kept_high) << 32 | kept_low;
}

// Step 2. All kSuppressThreads threads of the block call this. was_dead: bits of candidates that are suppressed
// already, or NULL. ring: kRingBytes of shared memory. filter(chunk, kept bits) returns the bits that count as found;
// all lanes of one warp call it, chunk by chunk, until max_found are found.
template <typename Filter>
__device__ __forceinline__ void suppress_chunks(int count, const uint64_t *__restrict__ mask,
                                                const uint64_t *was_dead, int max_found, uint64_t *ring,
                                                Survivors &shared, Filter filter) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int chunks = (count + kChunk - 1) / kChunk;
  const bool is_tester = thread < kTesters, is_copier = !is_tester && thread < kTesters + kCopiers;
  const bool is_resolver = warp_id() == (kTesters + kCopiers) / 32,
             is_reporter = warp_id() == kSuppressThreads / 32 - 1;
  const int half = warp_id() & 1, part = warp_id() >> 1;  // of a tester: which 32 candidates, which words

  // Few warps run here, so the length of each one's chain of instructions decides about the time. The loops below are
  // therefore quicker if they are not unrolled.
  // Starts to copy a chunk's mask, up to the chunk itself.
  auto request = [&](int chunk, uint64_t *stage) {
    if (chunk < chunks) {
      const int first = (warp_id() - kTesters / 32) * kChunk + 2 * lane;
      const uint64_t *source = mask + static_cast<size_t>(chunk) * kMaxChunks * kChunk;
#pragma unroll 1
      for (int i = first; i < (chunk + 1) * kChunk; i += kCopiers / 32 * kChunk) {
        __pipeline_memcpy_async(stage + i, source + i, 16);
      }
    }
    __pipeline_commit();
  };
  // Tests a chunk against all kept candidates but those of the chunk before it.
  auto test = [&](int chunk, const uint64_t *stage) {
    const int now = chunk & 1;
    const uint64_t *words = stage + half * 32 + lane, *kept = shared.kept_before[now ^ 1];
    const uint64_t rivals = words[max(chunk - (part & 1), 0) * kChunk];
    uint64_t hit = 0;
#pragma unroll 2
    for (int word = part; word < chunk - 1; word += kParts) hit |= words[word * kChunk] & kept[word];
    const bool is_none = chunk * kChunk + half * 32 + lane >= count;
    uint32_t dead = __ballot_sync(0xffffffffu, hit != 0 || is_none);
    if (part == 0 && was_dead != nullptr)
      dead |= reinterpret_cast<const uint32_t *>(was_dead)[2 * chunk + half];
    if (lane == 0) reinterpret_cast<uint32_t *>(&shared.dead[now][half])[part] = dead;
    if (part < 2) shared.rivals[now][part][half * 32 + lane] = rivals;
  };
  auto stage_after = [ring](uint64_t *stage) {
    constexpr int kStage = kChunk * kMaxChunks;
    return stage == ring + (kStages - 1) * kStage ? ring : stage + kStage;
  };
  uint64_t *stage = ring;  // of the chunk that is being decided

  if (thread == 0) shared.stop[0] = shared.stop[1] = shared.num_found = shared.chunks = 0;
  if (thread < 2 * kMaxChunks) shared.kept_before[thread / kMaxChunks][thread % kMaxChunks] = 0;
  if (is_copier) {
#pragma unroll
    for (int chunk = 0; chunk < kStages; ++chunk) request(chunk, ring + chunk * kChunk * kMaxChunks);
    __pipeline_wait_prior(kStages - 1);
  }
  __syncthreads();
  if (is_tester && chunks > 0) test(0, ring);
  if (is_copier) __pipeline_wait_prior(kStages - 2);
  __syncthreads();
  uint64_t kept = 0;  // the resolver: what was kept of the last chunk
  int num_found = 0;  // the reporter
  auto report = [&](int chunk) {
    const uint64_t found = filter(chunk, shared.kept[chunk]);
    if (lane == 0) {
      shared.found[chunk] = found;
      shared.before[chunk] = num_found;
      shared.chunks = chunk + 1;
    }
    num_found += __popcll(found);
    if (lane == 0) {
      shared.num_found = min(num_found, max_found);
      shared.stop[~chunk & 1] = num_found >= max_found;  // a chunk is reported one round after it is decided
    }
  };
  int chunk = 0;
  for (; chunk < chunks; ++chunk) {
    if (is_copier) {
      request(chunk + kStages, stage);  // in place of this chunk's mask, which the testers have read
      __pipeline_wait_prior(kStages - 2);
    } else if (is_tester) {
      if (chunk + 1 < chunks) test(chunk + 1, stage_after(stage));
    } else if (is_resolver) {
      const int now = chunk & 1;
      const uint64_t low_rivals = shared.rivals[now][0][lane], high_rivals = shared.rivals[now][0][lane + 32];
      const uint64_t before = kept;  // 0 for the first chunk
      const bool low_hit = (shared.rivals[now][1][lane] & before) != 0;
      const bool high_hit = (shared.rivals[now][1][lane + 32] & before) != 0;
      const uint4 low_dead = shared.dead[now][0], high_dead = shared.dead[now][1];
      const uint32_t low =
          ~(low_dead.x | low_dead.y | low_dead.z | low_dead.w | __ballot_sync(0xffffffffu, low_hit));
      const uint32_t high =
          ~(high_dead.x | high_dead.y | high_dead.z | high_dead.w | __ballot_sync(0xffffffffu, high_hit));
      kept = suppress_chunk(low, high, static_cast<uint32_t>(low_rivals), high_rivals);
      if (lane == 0) {
        shared.kept[chunk] = kept;
        shared.kept_before[now ^ 1][chunk] = kept;
        if (chunk > 0) shared.kept_before[now ^ 1][chunk - 1] = before;
      }
    } else if (chunk > 0) {
      report(chunk - 1);
    }
    stage = stage_after(stage);
    __syncthreads();
    if (shared.stop[chunk & 1]) break;
  }
  if (is_reporter && chunk == chunks && chunks > 0) report(chunks - 1);
  if (is_copier) __pipeline_wait_prior(0);
  __syncthreads();
}

// Calls visit(place, candidate) for each candidate that was found. All threads call this. list: shared memory for
// kMaxCandidates indices; through it neighbouring threads write neighbouring places.
template <typename Visit>
__device__ __forceinline__ void visit_found(const Survivors &shared, uint16_t *list, Visit visit) {
  for (int i = static_cast<int>(threadIdx.x); i < shared.chunks * kChunk; i += kSuppressThreads) {
    const uint64_t found = shared.found[i / kChunk];
    const int place = shared.before[i / kChunk] + __popcll(found & ((1ull << (i % kChunk)) - 1));
    if ((found >> (i % kChunk) & 1) && place < shared.num_found) list[place] = static_cast<uint16_t>(i);
  }
  __syncthreads();
#pragma unroll 4
  for (int place = static_cast<int>(threadIdx.x); place < shared.num_found; place += kSuppressThreads) {
    visit(place, static_cast<int>(list[place]));
  }
}

}  // namespace odtrt
