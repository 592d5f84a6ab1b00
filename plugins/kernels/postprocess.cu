// odtrt_postprocess_cuda: five kernels, each as wide as its work allows.
//
// clear     zeroes the histogram (the workspace comes uninitialised).
// grade     streams the logits once; each anchor's best score, and a histogram: of these, or, where there are few
//           pairs of an anchor and a class, of all pairs' scores.
// gather    finds in the histogram a score bound above which at least 2048 of them lie, and collects the pairs above.
// mark      puts the best pairs, at most 2560, in the final order, decodes their boxes only, and marks who overlaps
//           whom (suppression.cuh). Each block does the ordering for itself: that is quicker than to wait for one.
// keep      settles who stays, clips, and writes the detections.
//
// The bound never separates equal scores, so what lies above it is exactly the head of the final order. Where that
// head does not decide all (thousands of pairs suppressed before max_total_detections are found), `keep` goes on
// below the bound, batch by batch: nothing is ever truncated. Its other blocks only help with that. None of them is
// waited for before it has taken work, so the answer does not depend on how many of them run at the same time.
#include <cuda_fp16.h>

#include "check.h"
#include "odtrt.h"
#include "suppression.cuh"

namespace odtrt {
namespace {

constexpr int kBins = 2048;
constexpr int kEnough = 2048;          // pairs to aim at
constexpr int kMaxGathered = 1 << 16;  // pairs that gather can hold
constexpr int64_t kFewPairs = 1 << 20;
constexpr int kGradeThreads = 256;
constexpr int kRowsAtOnce = 4;
constexpr int kColumnsAtOnce = 96;
constexpr int kGatherThreads = 512;
constexpr int kOrderThreads = 1024;  // of mark
constexpr int kBatchOfRest = 2048;
constexpr int kRowsOfTile = 64;
constexpr uint32_t kFinished = 0xffffffffu;

struct Progress {
  uint32_t gathered;
  uint32_t bound;        // lowest bin that was gathered
  uint32_t count;        // candidates in order
  uint32_t is_complete;  // nothing is left below the bound
  // What the first block of `keep` asks all of its blocks to do: count or collect the pairs that are still in the
  // running, with keys from low to high.
  uint32_t round;  // a new number: there is work; kFinished: there will be none
  uint32_t next_tile, tiles_done;
  uint32_t is_counting, shift;
  uint64_t low, high;
};

// One image's part of the workspace.
struct Workspace {
  Progress *progress;
  uint32_t *histogram;   // [kBins]
  uint64_t *is_visible;  // [kMaxChunks], a bit for each candidate
  uint32_t *grades;      // [N], ordered(best score); 0: no candidate
  uint64_t *gathered;    // [kMaxGathered], order keys in no order
  uint64_t *keys;        // [kMaxCandidates], in the final order
  uint64_t *mask;        // [kMaxChunks, kMaxChunks, kChunk], see suppression.cuh
  int32_t *group_first;  // [groups]; these four only serve what is left below the bound
  uint32_t *group_size;  // [groups]
  int32_t *kept_next;    // [max_kept]
  Box *kept_boxes;       // [max_kept]
};

struct Call {
  odtrt_postprocess_params params;
  odtrt_heads heads;
  odtrt_detections out;
  char *workspace;
  size_t image_size;  // of the workspace
  int32_t num_groups, max_kept, cap;
  int32_t counts_pairs;  // the histogram is of all candidates; else of each anchor's best
};

// Returns the bytes that an image takes.
ODTRT_HD size_t lay_out(const Call &call, char *memory, Workspace *space) {
  char *next = memory;
  space->progress = reinterpret_cast<Progress *>(take(next, sizeof(Progress)));
  space->histogram = reinterpret_cast<uint32_t *>(take(next, sizeof(uint32_t) * kBins));
  space->is_visible = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxChunks));
  space->grades = reinterpret_cast<uint32_t *>(take(next, sizeof(uint32_t) * call.params.num_anchors));
  space->gathered = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxGathered));
  space->keys = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxCandidates));
  space->mask = reinterpret_cast<uint64_t *>(take(next, sizeof(uint64_t) * kMaxCandidates * kMaxChunks));
  space->group_first = reinterpret_cast<int32_t *>(take(next, sizeof(int32_t) * call.num_groups));
  space->group_size = reinterpret_cast<uint32_t *>(take(next, sizeof(uint32_t) * call.num_groups));
  space->kept_next = reinterpret_cast<int32_t *>(take(next, sizeof(int32_t) * call.max_kept));
  space->kept_boxes = reinterpret_cast<Box *>(take(next, sizeof(Box) * call.max_kept));
  return static_cast<size_t>(next - memory);
}

__device__ __forceinline__ Workspace space_of(const Call &call, int image) {
  Workspace space;
  lay_out(call, call.workspace + call.image_size * image, &space);
  return space;
}

// ---- scores and places -------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// 64 bins an octave, up to score 1; a higher score never has a lower bin.
__device__ __forceinline__ int bin_of(float score) {
  if (!(score > 0.0f)) return 0;
  const int bin = static_cast<int>(bits_of(score) >> 17) - (127 - kBins / 64) * 64;
  return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}

// The least score in a bin above 0.
__device__ __forceinline__ float lowest_of_bin(int bin) {
  return float_of(static_cast<uint32_t>(bin + (127 - kBins / 64) * 64) << 17);
}

__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1)
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
#endif
}

__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <int kConverter>
__device__ __forceinline__ float score_of_logit(float scaled) {
  return kConverter == ODTRT_SIGMOID ? sigmoid(scaled) : add(scaled, 0.0f);
}

struct Softmax {
  float maximum, sum;  // of a whole row; the maximum is NaN if any score would be
};

// Called by a whole warp.
template <typename T>
__device__ __forceinline__ Softmax softmax_of(const T *row, const odtrt_postprocess_params &params) {
  uint32_t best = 0;
  bool is_number = true;
  for (int c = lane_id(); c < params.num_columns; c += 32) {
    const float x = mul(to_float(row[c]), params.logit_factor);
    is_number &= x == x;
    best = max(best, ordered(x));
  }
  const float maximum = unordered(warp_max(best));
  if (!__all_sync(0xffffffffu, is_number) || isinf(maximum)) return {float_of(0x7fc00000u), 1.0f};
  uint64_t units = 0;
  for (int c = lane_id(); c < params.num_columns; c += 32) {
    units += softmax_units(exponential(sub(mul(to_float(row[c]), params.logit_factor), maximum)));
  }
  return {maximum, softmax_sum(warp_sum(units))};
}

__device__ __forceinline__ float score_of_logit(const Softmax &softmax, float scaled) {
  return divide(exponential(sub(scaled, softmax.maximum)), softmax.sum);
}

// Where a pair stands among equal scores. Class by class; class-agnostic: anchor by anchor.
struct Pair {
  int32_t anchor, label;
};

__device__ __forceinline__ uint32_t place_of_pair(const odtrt_postprocess_params &params, Pair pair) {
  const uint32_t classes = static_cast<uint32_t>(params.num_columns - params.background_column);
  return params.class_agnostic
             ? static_cast<uint32_t>(pair.anchor) * classes + static_cast<uint32_t>(pair.label)
             : static_cast<uint32_t>(pair.label) * static_cast<uint32_t>(params.num_anchors) +
                   static_cast<uint32_t>(pair.anchor);
}

__device__ __forceinline__ Pair pair_of(const odtrt_postprocess_params &params, uint64_t key) {
  const uint32_t place = place_of(key);
  const uint32_t classes = static_cast<uint32_t>(params.num_columns - params.background_column);
  const uint32_t anchors = static_cast<uint32_t>(params.num_anchors);
  return params.class_agnostic
             ? Pair{static_cast<int32_t>(place / classes), static_cast<int32_t>(place % classes)}
             : Pair{static_cast<int32_t>(place % anchors), static_cast<int32_t>(place / anchors)};
}

__device__ __forceinline__ int32_t group_of(const odtrt_postprocess_params &params, Pair pair) {
  return params.class_agnostic ? 0 : pair.label;
}

// A scaled logit that is less has a score that is less than `score`: by a margin, so that it may be rough.
template <int kConverter>
__device__ __forceinline__ float cautious_logit(float score) {
  if (kConverter == ODTRT_IDENTITY) return score;
  if (kConverter == ODTRT_SOFTMAX || !(score > 0.0f)) return float_of(0xff800000u);
  const float logit = __logf(score / fmaxf(1.0f - score, 1e-7f));
  return fminf(logit, 15.0f) - 0.01f - 0.001f * fabsf(logit);
}

// The pairs of an anchor that may have a score of `least` or more, and others. Called by a whole warp, as
// visit(is_candidate, key) is, for 32 columns at a time. Class-agnostic: one lane has the anchor's best class.
template <typename T, int kConverter, typename Visit>
__device__ __forceinline__ void visit_pairs(const odtrt_postprocess_params &params, const T *__restrict__ row,
                                            int anchor, float least, Visit visit) {
  const float least_logit = cautious_logit<kConverter>(least);
  constexpr int kUnrolled = 4;
  Softmax softmax{};
  if (kConverter == ODTRT_SOFTMAX) softmax = softmax_of(row, params);
  uint64_t best = 0;  // class-agnostic
  bool is_number = true;
  for (int start = 0; start < params.num_columns; start += 32 * kUnrolled) {
    float logits[kUnrolled];
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) {
      const int column = start + 32 * k + lane_id();
      logits[k] = column < params.num_columns ? to_float(row[column]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) {
      if (start + 32 * k >= params.num_columns) break;
      const int column = start + 32 * k + lane_id();
      const int label = column - params.background_column;
      const float scaled = mul(logits[k], params.logit_factor);
      const bool is_class = label >= 0 && column < params.num_columns;
      if (kConverter != ODTRT_SOFTMAX && !params.class_agnostic &&
          !__any_sync(0xffffffffu, is_class && scaled >= least_logit)) {
        continue;
      }
      const float score =
          kConverter == ODTRT_SOFTMAX ? score_of_logit(softmax, scaled) : score_of_logit<kConverter>(scaled);
      const bool passes = is_class && score > params.score_threshold;
      const uint64_t key = order_key(score, place_of_pair(params, {anchor, label}));
      if (params.class_agnostic) {
        is_number &= !is_class || score == score;
        if (passes && key > best) best = key;
      } else {
        visit(passes, key);
      }
    }
  }
  if (params.class_agnostic) {
    best = warp_max(best);
    visit(__all_sync(0xffffffffu, is_number) && best != 0 && lane_id() == 0, best);
  }
}

template <typename T>
__device__ __forceinline__ Box box_of(const Call &call, int image, int anchor) {
  const size_t row = static_cast<size_t>(image) * call.params.num_anchors + anchor;
  float encoding[4], prior[4];
  if (sizeof(T) == 4) {
    const float4 values = __ldg(reinterpret_cast<const float4 *>(call.heads.box_encodings) + row);
    encoding[0] = values.x, encoding[1] = values.y, encoding[2] = values.z, encoding[3] = values.w;
  } else {
    const uint2 values = __ldg(reinterpret_cast<const uint2 *>(call.heads.box_encodings) + row);
    const auto halves = reinterpret_cast<const __half *>(&values);
#pragma unroll
    for (int k = 0; k < 4; ++k) encoding[k] = __half2float(halves[k]);
  }
  const float4 values = __ldg(reinterpret_cast<const float4 *>(call.heads.anchors) + anchor);
  prior[0] = values.x, prior[1] = values.y, prior[2] = values.z, prior[3] = values.w;
  return decode(encoding, prior, call.params.box_scales);
}

__device__ __forceinline__ Box window_of(const Call &call, int image) {
  if (call.heads.clip_windows == nullptr) return {0.0f, 0.0f, 1.0f, 1.0f};
  const float *window = call.heads.clip_windows + 4 * static_cast<size_t>(image);
  return {window[0], window[1], window[2], window[3]};
}

__device__ __forceinline__ bool is_visible(const Box &box, const Box &window, float score) {
  return signed_area(clip(box, window)) > 0.0f && score >= 0.0f;
}

__device__ void write_detection(const Call &call, int image, int m, const Box &box, const Box &window,
                                uint64_t key) {
  const size_t at = static_cast<size_t>(image) * call.params.max_total_detections + m;
  const Box clipped = clip(box, window);
  const Box found = call.params.change_coordinate_frame ? in_frame_of(window, clipped) : clipped;
  const Pair pair = pair_of(call.params, key);
  reinterpret_cast<float4 *>(call.out.boxes)[at] = make_float4(found.ymin, found.xmin, found.ymax, found.xmax);
  call.out.scores[at] = score_of(key);
  call.out.classes[at] = pair.label;
  if (call.out.anchors != nullptr) call.out.anchors[at] = pair.anchor;
}

// ---- clear, grade -------------------------------------------------------------------------------------------------

__global__ __launch_bounds__(256) void clear(ODTRT_PARAMETER Call call) {
  let_next_kernel_start();
  const Workspace space = space_of(call, static_cast<int>(blockIdx.x));
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += 256) space.histogram[i] = 0;
  if (threadIdx.x < kMaxChunks) space.is_visible[threadIdx.x] = 0;
  if (threadIdx.x == 0) *space.progress = {};
}

// The best score of an anchor with a softmax; NaN: no candidate. Called by a whole warp.
template <typename T>
__device__ __forceinline__ float best_of_softmax(const odtrt_postprocess_params &params,
                                                 const T *__restrict__ row) {
  const Softmax softmax = softmax_of(row, params);
  uint32_t best = 0;
  for (int c = lane_id() + params.background_column; c < params.num_columns; c += 32) {
    best = max(best, ordered(to_float(row[c])));
  }
  return score_of_logit(softmax, mul(unordered(warp_max(best)), params.logit_factor));
}

// Each lane keeps the best of one anchor until there are 32: a score costs more than a comparison.
template <typename T, int kConverter>
__global__ __launch_bounds__(kGradeThreads, 5) void grade(ODTRT_PARAMETER Call call) {
  __shared__ uint32_t histogram[kBins];
  let_next_kernel_start();
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int n = params.num_anchors, columns = params.num_columns;
  const Workspace space = space_of(call, image);
  const T *__restrict__ logits =
      static_cast<const T *>(call.heads.class_logits) + static_cast<size_t>(image) * n * columns;
  const float none = float_of(0x7fc00000u);
  for (int i = thread; i < kBins / 4; i += kGradeThreads) reinterpret_cast<uint4 *>(histogram)[i] = {};
  __syncthreads();

  const int warps = static_cast<int>(gridDim.x) * (kGradeThreads / 32);
  const int first_warp = static_cast<int>(blockIdx.x) * (kGradeThreads / 32) + warp_id();
  auto put = [&](int anchor, float score) {
    const bool is_candidate = score > params.score_threshold;
    space.grades[anchor] = is_candidate ? ordered(score) : 0;
    if (is_candidate) atomicAdd(&histogram[bin_of(score)], 1u);
  };
  if (call.counts_pairs) {
    for (int anchor = first_warp; anchor < n; anchor += warps) {
      uint32_t best = 0;
      visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(anchor) * columns, anchor,
                                 params.score_threshold, [&](bool is_candidate, uint64_t key) {
                                   if (!is_candidate) return;
                                   atomicAdd(&histogram[bin_of(score_of(key))], 1u);
                                   best = max(best, static_cast<uint32_t>(key >> 32));
                                 });
      best = warp_max(best);
      if (lane == 0) space.grades[anchor] = best;
    }
  } else if (kConverter == ODTRT_SOFTMAX) {
    for (int anchor = first_warp; anchor < n; anchor += warps) {
      const float best = best_of_softmax(params, logits + static_cast<size_t>(anchor) * columns);
      if (lane == 0) put(anchor, best);
    }
  } else {
    constexpr int kEach = kColumnsAtOnce / 32;
    const float lowest = float_of(0xff800000u);
    bool is_class[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      is_class[k] = 32 * k + lane >= params.background_column && 32 * k + lane < columns;
    float own = none;  // lane l has the best of the l-th anchor that was not put yet
    int filled = 0, own_anchor = n;
    for (int first = first_warp * kRowsAtOnce; first < n; first += warps * kRowsAtOnce) {
      const T *row = logits + static_cast<size_t>(first) * columns + lane;
      float values[kRowsAtOnce][kEach];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int k = 0; k < kEach; ++k) values[r][k] = is_class[k] ? to_float(row[32 * k]) : lowest;
        if (first + r + 1 < n) row += columns;  // the last anchor again, instead of none
      }
      float best[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        best[r] = lowest;  // fmaxf leaves NaN out
#pragma unroll
        for (int k = 0; k < kEach; ++k) best[r] = fmaxf(best[r], values[r][k]);
      }
      if (columns > kColumnsAtOnce) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const T *rest = logits + static_cast<size_t>(min(first + r, n - 1)) * columns;
          for (int c = kColumnsAtOnce + lane; c < columns; c += 32) best[r] = fmaxf(best[r], to_float(rest[c]));
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const float of_row = unordered(warp_max(ordered(best[r])));
        if (lane == filled + r) own = of_row, own_anchor = first + r;
      }
      filled += kRowsAtOnce;
      if (filled == 32 || first + warps * kRowsAtOnce >= n) {  // a score costs more than a comparison
        if (lane < filled && own_anchor < n) {
          put(own_anchor, score_of_logit<kConverter>(mul(own, params.logit_factor)));
        }
        filled = 0;
      }
    }
  }
  __syncthreads();
  wait_for_previous_kernel();  // clear
  for (int i = thread; i < kBins; i += kGradeThreads) {
    if (histogram[i] != 0) atomicAdd(&space.histogram[i], histogram[i]);
  }
}

// ---- gather -------------------------------------------------------------------------------------------------------

// The sum of `value` over all threads of a lower number, and over all. Called by all kThreads threads.
template <int kThreads>
__device__ __forceinline__ uint32_t sum_before(uint32_t value, uint32_t *warp_totals, uint32_t *total) {
  auto sum_up = [](uint32_t own) {
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, own, offset);
      if (lane_id() >= offset) own += other;
    }
    return own;
  };
  const uint32_t sum = sum_up(value);
  __syncthreads();
  if (lane_id() == 31) warp_totals[warp_id()] = sum;
  __syncthreads();
  if (warp_id() == 0) {
    const uint32_t all = sum_up(lane_id() < kThreads / 32 ? warp_totals[lane_id()] : 0);
    warp_totals[lane_id()] = all;
  }
  __syncthreads();
  *total = warp_totals[31];
  return sum - value + (warp_id() == 0 ? 0 : warp_totals[warp_id() - 1]);
}

struct Bound {
  uint32_t warp_totals[32];
  int32_t bin;
  uint32_t with_it;
};

// The highest bin such that it and those above hold at least `enough`, or 0 where all together do not hold more;
// with_it: how many they hold. Called by all threads; count(bin) is asked once for each bin.
template <int kThreads, typename Count>
__device__ __forceinline__ void find_bound(uint32_t enough, Bound &shared, Count count) {
  constexpr int kEach = kBins / kThreads;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  uint32_t counts[kEach], own = 0, total = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) own += counts[k] = count(top - k);
  uint32_t sum = sum_before<kThreads>(own, shared.warp_totals, &total);
  if (threadIdx.x == 0) {
    shared.bin = 0;
    shared.with_it = total;
  }
  __syncthreads();
  if (total > enough && sum < enough && sum + own >= enough) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (sum < enough && sum + counts[k] >= enough) {
        shared.bin = top - k;
        shared.with_it = sum + counts[k];
      }
      sum += counts[k];
    }
  }
  __syncthreads();
}

constexpr int kMaxStaged = 2048;

struct Gathering {
  uint64_t keys[kMaxStaged];
  int32_t rows[kGatherThreads];
  Bound bound;
  uint32_t base;
  int32_t size, num_rows;
};

template <typename T, int kConverter>
__global__ __launch_bounds__(kGatherThreads, 2) void gather(ODTRT_PARAMETER Call call) {
  __shared__ Gathering shared;
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const Workspace space = space_of(call, image);
  const T *logits = static_cast<const T *>(call.heads.class_logits) +
                    static_cast<size_t>(image) * params.num_anchors * params.num_columns;
  // Neighbouring anchors score alike: groups of 32 go round the blocks, so that no block gets a whole object.
  const int groups = (params.num_anchors + 31) / 32, blocks = static_cast<int>(gridDim.x);
  auto grade_of = [&](int anchor) { return anchor < params.num_anchors ? __ldcg(space.grades + anchor) : 0; };
  int group = static_cast<int>(blockIdx.x) + warp_id() * blocks;
  wait_for_previous_kernel();
  let_next_kernel_start();
  uint32_t grade = grade_of(group * 32 + lane_id());
  find_bound<kGatherThreads>(kEnough, shared.bound, [&](int bin) { return __ldcg(space.histogram + bin); });
  const int bound = shared.bound.bin;
  const float least = bound == 0 ? params.score_threshold : fmaxf(params.score_threshold, lowest_of_bin(bound));
  if (thread == 0) {
    shared.size = 0;
    if (blockIdx.x == 0) space.progress->bound = static_cast<uint32_t>(bound);
  }
  for (int start = static_cast<int>(blockIdx.x); start < groups; start += blocks * (kGatherThreads / 32)) {
    if (thread == 0) shared.num_rows = 0;
    __syncthreads();
    if (grade != 0 && bin_of(unordered(grade)) >= bound) {
      shared.rows[atomicAdd(&shared.num_rows, 1)] = group * 32 + lane_id();
    }
    group += blocks * (kGatherThreads / 32);
    grade = grade_of(group * 32 + lane_id());
    __syncthreads();
    const int rows = shared.num_rows;
    for (int r = warp_id(); r < rows; r += kGatherThreads / 32) {
      const int row = shared.rows[r];
      visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(row) * params.num_columns, row, least,
                                 [&](bool is_candidate, uint64_t key) {
                                   const bool is_in = is_candidate && bin_of(score_of(key)) >= bound;
                                   const unsigned vote = __ballot_sync(0xffffffffu, is_in);
                                   if (vote == 0) return;
                                   int at = 0;
                                   if (lane_id() == 0) at = atomicAdd(&shared.size, __popc(vote));
                                   at =
                                       __shfl_sync(0xffffffffu, at, 0) + __popc(vote & ((1u << lane_id()) - 1));
                                   if (!is_in) return;
                                   if (at < kMaxStaged) {
                                     shared.keys[at] = key;
                                   } else {
                                     const uint32_t place = atomicAdd(&space.progress->gathered, 1u);
                                     if (place < kMaxGathered) space.gathered[place] = key;
                                   }
                                 });
    }
    __syncthreads();
  }
  const int staged = min(shared.size, kMaxStaged);
  if (thread == 0 && staged > 0)
    shared.base = atomicAdd(&space.progress->gathered, static_cast<uint32_t>(staged));
  __syncthreads();
  for (int i = thread; i < staged; i += kGatherThreads) {
    if (shared.base + i < kMaxGathered) space.gathered[shared.base + i] = shared.keys[i];
  }
}

// ---- mark ---------------------------------------------------------------------------------------------------------

struct Ordering {
  uint64_t keys[kMaxCandidates];
  uint32_t counts[kBins];
  Bound bound;
  int32_t size;
  bool is_complete;
};

// The best of the gathered pairs in the final order, in shared.keys, and how many there are. Called by all
// kOrderThreads threads. A bucket for each narrow range of scores, then each key counts the greater ones of its
// bucket.
template <int kConverter>
__device__ __forceinline__ int put_in_order(const Workspace &space, Ordering &shared, float score_threshold) {
  constexpr int kEach = (kMaxCandidates + kOrderThreads - 1) / kOrderThreads;
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t gathered = __ldcg(&space.progress->gathered);
  int lowest_bin = static_cast<int>(__ldcg(&space.progress->bound));
  bool is_complete = lowest_bin == 0;
  if (thread == 0) {
    shared.is_complete = gathered == 0 && is_complete;
    shared.size = 0;
  }
  if (gathered == 0 || gathered > kMaxGathered) return 0;
  const auto gathered_keys = reinterpret_cast<const unsigned long long *>(space.gathered);
  uint64_t own[kEach];
  auto fetch = [&](uint32_t start) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const uint32_t i = start + thread + k * kOrderThreads;
      own[k] = i < gathered && start + k * kOrderThreads < gathered ? __ldcg(gathered_keys + i) : 0;
    }
  };
  for (int i = thread; i < kBins; i += kOrderThreads) shared.counts[i] = 0;
  int size = static_cast<int>(gathered);
  if (gathered <= kMaxCandidates) {
    fetch(0);
    __syncthreads();
  } else {
    __syncthreads();
    for (uint32_t start = 0; start < gathered; start += kEach * kOrderThreads) {
      fetch(start);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        if (own[k] != 0) atomicAdd(&shared.counts[bin_of(score_of(own[k]))], 1u);
      }
    }
    __syncthreads();
    find_bound<kOrderThreads>(kEnough, shared.bound, [&](int bin) { return shared.counts[bin]; });
    lowest_bin = shared.bound.bin + (shared.bound.with_it > kMaxCandidates ? 1 : 0);
    is_complete = false;
    for (int i = thread; i < kBins; i += kOrderThreads) shared.counts[i] = 0;
    for (uint32_t start = 0; start < gathered; start += kEach * kOrderThreads) {
      fetch(start);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const bool is_in = own[k] != 0 && bin_of(score_of(own[k])) >= lowest_bin;
        const unsigned vote = __ballot_sync(0xffffffffu, is_in);
        if (vote == 0) continue;
        int at = 0;
        if (lane_id() == 0) at = atomicAdd(&shared.size, __popc(vote));
        at = __shfl_sync(0xffffffffu, at, 0) + __popc(vote & ((1u << lane_id()) - 1));
        if (is_in) shared.keys[at] = own[k];
      }
    }
    __syncthreads();
    size = shared.size;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = thread + k * kOrderThreads;
      own[k] = i < size ? shared.keys[i] : 0;
    }
    __syncthreads();
  }
  // A higher score never has a higher bucket: every step rounds monotonically.
  const uint32_t top = ordered(kConverter == ODTRT_IDENTITY ? float_of(0x7f800000u) : 1.0f);
  const float lowest = lowest_bin > 0 ? fmaxf(lowest_of_bin(lowest_bin), score_threshold) : score_threshold;
  const float buckets_per_unit =
      static_cast<float>(kBins - 1) / static_cast<float>(top - min(top, ordered(lowest)) + 1);
  auto bucket_of = [&](uint64_t key) {
    const uint32_t below_top = top - min(top, static_cast<uint32_t>(key >> 32));
    return min(kBins - 1, static_cast<int>(static_cast<float>(below_top) * buckets_per_unit));
  };
  int buckets[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    buckets[k] = bucket_of(own[k]);
    if (own[k] != 0) atomicAdd(&shared.counts[buckets[k]], 1u);
  }
  __syncthreads();
  constexpr int kBucketsEach = kBins / kOrderThreads;
  uint32_t counts[kBucketsEach], sum = 0, total = 0;
#pragma unroll
  for (int k = 0; k < kBucketsEach; ++k) sum += counts[k] = shared.counts[thread * kBucketsEach + k];
  sum = sum_before<kOrderThreads>(sum, shared.bound.warp_totals, &total);
#pragma unroll
  for (int k = 0; k < kBucketsEach; ++k) {
    shared.counts[thread * kBucketsEach + k] = sum;
    sum += counts[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (own[k] != 0) shared.keys[atomicAdd(&shared.counts[buckets[k]], 1u)] = own[k];
  }
  __syncthreads();  // counts[b] is now where bucket b ends
  int ranks[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (own[k] == 0) continue;
    const int end = static_cast<int>(shared.counts[buckets[k]]);
    const int start = buckets[k] == 0 ? 0 : static_cast<int>(shared.counts[buckets[k] - 1]);
    ranks[k] = start;
    for (int j = start; j < end; ++j) ranks[k] += shared.keys[j] > own[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (own[k] != 0) shared.keys[ranks[k]] = own[k];
  }
  if (thread == 0) shared.is_complete = is_complete;
  __syncthreads();
  return size;
}

template <typename T, int kConverter>
__global__ __launch_bounds__(kOrderThreads, 1) void mark(ODTRT_PARAMETER Call call) {
  __shared__ Ordering shared;
  __shared__ Tile tiles[kOrderThreads / kMarkThreads];
  const int image = static_cast<int>(blockIdx.y);
  const Workspace space = space_of(call, image);
  const Box window = window_of(call, image);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int count = put_in_order<kConverter>(space, shared, call.params.score_threshold);
  if (blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kOrderThreads) space.keys[i] = shared.keys[i];
    if (threadIdx.x == 0) {
      space.progress->count = static_cast<uint32_t>(count);
      space.progress->is_complete = shared.is_complete;
    }
  }
  auto load = [&](int i) {
    const Pair pair = pair_of(call.params, shared.keys[i]);
    return Candidate{with_ordered_corners(box_of<T>(call, image, pair.anchor)), group_of(call.params, pair)};
  };
  auto on_row = [&](int i) {
    const uint64_t key = shared.keys[i];
    const Box box = box_of<T>(call, image, pair_of(call.params, key).anchor);
    if (is_visible(box, window, score_of(key))) {
      atomicOr(reinterpret_cast<unsigned long long *>(space.is_visible) + i / kChunk, 1ull << (i % kChunk));
    }
  };
  mark_overlaps(count, call.params.iou_threshold, space.mask, tiles, load, on_row);
}

// ---- keep ---------------------------------------------------------------------------------------------------------

struct Rest {
  Workspace space;
  uint64_t keys[kBatchOfRest];
  float4 boxes[kBatchOfRest];  // corners ordered
  uint32_t counts[kBins];
  uint64_t low, high, cursor;
  uint32_t tile, is_counting, shift, size;
  int32_t first, num_kept, num_found, group_is_full;
  Box box;
  int32_t group;
};

static_assert(sizeof(Rest) <= kRingBytes, "they take turns in the same shared memory");

// Is this pair below the bound still in the running: not suppressed, its group not full? What was kept is read from
// the level 2 cache, since another block writes it.
template <typename T>
__device__ bool is_alive(const Call &call, const Workspace &space, int image, uint64_t key) {
  const Pair pair = pair_of(call.params, key);
  const int group = group_of(call.params, pair);
  if (__ldcg(space.group_size + group) >= static_cast<uint32_t>(call.cap)) return false;
  int at = __ldcg(space.group_first + group);
  if (at < 0) return true;
  const Box box = with_ordered_corners(box_of<T>(call, image, pair.anchor));
  const float area = signed_area(box);
  for (; at >= 0; at = __ldcg(space.kept_next + at)) {
    const float4 corners = __ldcg(reinterpret_cast<const float4 *>(space.kept_boxes) + at);
    const Box kept{corners.x, corners.y, corners.z, corners.w};
    if (suppresses(kept, signed_area(kept), box, area, call.params.iou_threshold)) return false;
  }
  return true;
}

// Takes tiles of anchors while there are any, and counts or collects their pairs as the first block asks. Called by
// all threads of a block of `keep`; rest.space is set, rest.counts is zero before and after.
template <typename T, int kConverter>
__device__ __noinline__ void work_through_tiles(const Call &call, int image, Rest &rest) {
  const odtrt_postprocess_params &params = call.params;
  const Workspace &space = rest.space;
  const T *logits = static_cast<const T *>(call.heads.class_logits) +
                    static_cast<size_t>(image) * params.num_anchors * params.num_columns;
  for (;;) {
    __syncthreads();
    if (threadIdx.x == 0) {
      rest.tile = atomicAdd(&space.progress->next_tile, 1u);
      __threadfence();  // what is asked was written before next_tile was
      rest.low = __ldcg(reinterpret_cast<const unsigned long long *>(&space.progress->low));
      rest.high = __ldcg(reinterpret_cast<const unsigned long long *>(&space.progress->high));
      rest.is_counting = __ldcg(&space.progress->is_counting);
      rest.shift = __ldcg(&space.progress->shift);
    }
    __syncthreads();
    const int64_t start = static_cast<int64_t>(rest.tile) * kRowsOfTile;
    if (start >= params.num_anchors) return;
    const int end = min(params.num_anchors, static_cast<int>(start) + kRowsOfTile);
    for (int anchor = static_cast<int>(start) + warp_id(); anchor < end; anchor += kKeepThreads / 32) {
      if (space.grades[anchor] == 0 || space.grades[anchor] < rest.low >> 32) continue;
      visit_pairs<T, kConverter>(params, logits + static_cast<size_t>(anchor) * params.num_columns, anchor,
                                 score_of(rest.low), [&](bool is_candidate, uint64_t key) {
                                   if (!is_candidate || key < rest.low || key > rest.high) return;
                                   if (!is_alive<T>(call, space, image, key)) return;
                                   if (rest.is_counting) {
                                     atomicAdd(&rest.counts[(key - rest.low) >> rest.shift], 1u);
                                   } else {
                                     space.gathered[atomicAdd(&space.progress->gathered, 1u)] = key;
                                   }
                                 });
    }
    __syncthreads();
    if (rest.is_counting) {
      for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kKeepThreads) {
        if (rest.counts[i] != 0) atomicAdd(&space.histogram[i], rest.counts[i]);
        rest.counts[i] = 0;
      }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(&space.progress->tiles_done, 1u);
  }
}

// The other blocks of `keep`: wait until there is work, or none.
template <typename T, int kConverter>
__device__ __noinline__ void help(const Call &call, int image, Rest &rest) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) rest.space = space_of(call, image);
  for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = 0;
  uint32_t known = 0;
  for (;;) {
    __syncthreads();
    if (thread == 0) {
      const volatile uint32_t *round = &rest.space.progress->round;
      while (*round == known) __nanosleep(100);
      rest.first = static_cast<int32_t>(*round);
      __threadfence();
    }
    __syncthreads();
    known = static_cast<uint32_t>(rest.first);
    if (known == kFinished) return;
    work_through_tiles<T, kConverter>(call, image, rest);
  }
}

// The first block: has all blocks count or collect the pairs from `low` to `high`, and waits for the tiles, not for
// the blocks.
template <typename T, int kConverter>
__device__ __noinline__ void ask_all(const Call &call, int image, Rest &rest, bool is_counting, uint64_t low,
                                     uint64_t high, int shift) {
  const int thread = static_cast<int>(threadIdx.x);
  Progress &progress = *rest.space.progress;
  if (is_counting) {
    for (int i = thread; i < kBins; i += kKeepThreads) rest.space.histogram[i] = 0;
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    progress.low = low;
    progress.high = high;
    progress.shift = static_cast<uint32_t>(shift);
    progress.is_counting = is_counting;
    progress.gathered = 0;
    progress.tiles_done = 0;
    __threadfence();
    atomicExch(&progress.next_tile, 0u);
    __threadfence();
    atomicAdd(&progress.round, 1u);
  }
  work_through_tiles<T, kConverter>(call, image, rest);
  if (thread == 0) {
    const uint32_t tiles = static_cast<uint32_t>((call.params.num_anchors + kRowsOfTile - 1) / kRowsOfTile);
    const volatile uint32_t *tiles_done = &progress.tiles_done;
    while (*tiles_done < tiles) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

// Puts the batch in order, keeps the best that is still in the running, and again, until none is. Called by all
// threads of the first block.
template <typename T>
__device__ __noinline__ void settle_batch(const Call &call, int image, Rest &rest, int size) {
  const odtrt_postprocess_params &params = call.params;
  const Workspace &space = rest.space;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kBatchOfRest; i += kKeepThreads) {
    rest.keys[i] = i < size ? __ldcg(reinterpret_cast<const unsigned long long *>(space.gathered) + i) : 0;
  }
  __syncthreads();
  for (int width = 2; width <= kBatchOfRest; width <<= 1) {  // bitonic, descending
    for (int stride = width >> 1; stride > 0; stride >>= 1) {
      for (int i = thread; i < kBatchOfRest / 2; i += kKeepThreads) {
        const int a = 2 * i - (i & (stride - 1)), b = a + stride;
        const uint64_t first = rest.keys[a], second = rest.keys[b];
        if ((first < second) == ((a & width) == 0)) rest.keys[a] = second, rest.keys[b] = first;
      }
      __syncthreads();
    }
  }
  constexpr int kEach = (kBatchOfRest + kKeepThreads - 1) / kKeepThreads;
  int32_t groups[kEach];
  bool runs[kEach], visible[kEach];
  const Box window = window_of(call, image);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = thread + k * kKeepThreads;
    runs[k] = i < size;
    if (!runs[k]) continue;
    const uint64_t key = rest.keys[i];
    const Pair pair = pair_of(params, key);
    const Box box = box_of<T>(call, image, pair.anchor), ordered_box = with_ordered_corners(box);
    groups[k] = group_of(params, pair);
    visible[k] = is_visible(box, window, score_of(key));
    rest.boxes[i] = make_float4(ordered_box.ymin, ordered_box.xmin, ordered_box.ymax, ordered_box.xmax);
  }
  const int found_before = rest.num_found;
  for (;;) {
    const bool is_enough = rest.num_found >= params.max_total_detections;
    if (thread == 0) rest.first = kBatchOfRest;
    __syncthreads();
    int first = kBatchOfRest;
#pragma unroll
    for (int k = kEach - 1; k >= 0; --k) first = runs[k] ? thread + k * kKeepThreads : first;
    first = static_cast<int>(~warp_max(~static_cast<uint32_t>(first)));
    if (lane_id() == 0 && first < kBatchOfRest) atomicMin(&rest.first, first);
    __syncthreads();
    const int best = rest.first;
    if (best == kBatchOfRest || is_enough) break;
    const float4 corners = rest.boxes[best];
    const Box kept{corners.x, corners.y, corners.z, corners.w};
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (thread + k * kKeepThreads != best) continue;
      runs[k] = false;
      const uint32_t held = space.group_size[groups[k]];
      rest.group = groups[k];
      rest.group_is_full = held >= static_cast<uint32_t>(call.cap);
      if (!rest.group_is_full) {
        space.kept_boxes[rest.num_kept] = kept;
        space.kept_next[rest.num_kept] = space.group_first[groups[k]];
        space.group_first[groups[k]] = rest.num_kept++;
        space.group_size[groups[k]] = held + 1;
        if (visible[k]) rest.counts[rest.num_found++ - found_before] = static_cast<uint32_t>(best);
      }
    }
    __syncthreads();
    const float kept_area = signed_area(kept);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!runs[k] || groups[k] != rest.group) continue;
      const float4 other = rest.boxes[thread + k * kKeepThreads];
      const Box box{other.x, other.y, other.z, other.w};
      runs[k] =
          !rest.group_is_full && !suppresses(kept, kept_area, box, signed_area(box), params.iou_threshold);
    }
  }
  for (int m = found_before + thread; m < rest.num_found; m += kKeepThreads) {
    const uint64_t key = rest.keys[rest.counts[m - found_before]];
    write_detection(call, image, m, box_of<T>(call, image, pair_of(params, key).anchor), window, key);
  }
  __syncthreads();
  for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = 0;
  __syncthreads();
}

// What the head of the order did not decide, in batches of pairs that are still in the running. Called by all
// threads of the first block; returns the number of detections.
template <typename T, int kConverter>
__device__ __noinline__ int keep_among_rest(const Call &call, int image, const Survivors &survivors,
                                            Rest &rest) {
  const odtrt_postprocess_params &params = call.params;
  const Workspace &space = rest.space;
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (thread == 0) rest.space = space_of(call, image);
  for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = 0;
  __syncthreads();
  for (int i = thread; i < call.num_groups; i += kKeepThreads) {
    space.group_first[i] = -1;
    space.group_size[i] = 0;
  }
  const int count = static_cast<int>(space.progress->count);
  if (thread == 0) {
    rest.num_kept = 0;
    rest.num_found = survivors.num_found;
    const uint64_t above_all = kConverter == ODTRT_IDENTITY ? ~0ull : (ordered(1.0f) + 1ull) << 32;
    rest.cursor = count > 0 ? space.keys[count - 1] : above_all;
  }
  __syncthreads();
  for (int i = thread; i < count; i += kKeepThreads) {
    if (!(survivors.kept[i / kChunk] >> (i % kChunk) & 1)) continue;
    const Pair pair = pair_of(params, space.keys[i]);
    const int at = atomicAdd(&rest.num_kept, 1);
    space.kept_boxes[at] = with_ordered_corners(box_of<T>(call, image, pair.anchor));
    space.kept_next[at] = atomicExch(&space.group_first[group_of(params, pair)], at);
    atomicAdd(&space.group_size[group_of(params, pair)], 1u);
  }
  __syncthreads();

  const uint64_t least = static_cast<uint64_t>(ordered(params.score_threshold)) << 32;
  int octaves = 2;  // how far down to look at once
  for (;;) {
    const uint64_t cursor = rest.cursor;  // what comes before it is decided
    const int found = rest.num_found;
    __syncthreads();
    if (found >= params.max_total_detections || cursor <= least) break;
    const uint64_t reach = static_cast<uint64_t>(octaves) << (23 + 32);
    const uint64_t lowest = cursor - least > reach ? cursor - reach : least;
    uint64_t low = lowest, high = cursor - 1;
    for (;;) {  // narrow low to high down until the pairs from low to the cursor are a batch
      const int shift = max(0, 64 - __clzll(static_cast<long long>(high - low)) - 11);
      ask_all<T, kConverter>(call, image, rest, true, low, high, shift);
      for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = __ldcg(space.histogram + i);
      __syncthreads();
      if (thread == 0) {
        uint32_t sum = 0;
        int bin = kBins - 1;
        while (bin >= 0 && sum + rest.counts[bin] <= kBatchOfRest) sum += rest.counts[bin--];
        rest.size = sum;
        rest.first = bin;
      }
      __syncthreads();
      const int bin = rest.first;
      const bool is_narrow = bin < 0 || rest.size > 0;
      __syncthreads();
      for (int i = thread; i < kBins; i += kKeepThreads) rest.counts[i] = 0;
      if (is_narrow) {
        low += bin < 0 ? 0 : static_cast<uint64_t>(bin + 1) << shift;
        break;
      }
      low += static_cast<uint64_t>(bin) << shift;
      high = low + ((1ull << shift) - 1);
    }
    const int size = static_cast<int>(rest.size);
    if (size > 0) {
      ask_all<T, kConverter>(call, image, rest, false, low, cursor - 1, 0);
      settle_batch<T>(call, image, rest, size);
    } else {
      octaves *= 4;
    }
    if (thread == 0) rest.cursor = low;
    __syncthreads();
  }
  return rest.num_found;
}

template <typename T, int kConverter>
__global__ __launch_bounds__(kKeepThreads, 1) void keep(ODTRT_PARAMETER Call call) {
  extern __shared__ uint4 ring_or_rest[];
  __shared__ Survivors survivors;
  __shared__ uint64_t visible[kMaxChunks];
  Rest &rest = *reinterpret_cast<Rest *>(ring_or_rest);
  const odtrt_postprocess_params &params = call.params;
  const int image = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const Workspace space = space_of(call, image);
  const Box window = window_of(call, image);
  wait_for_previous_kernel();
  if (blockIdx.x > 0) {
    help<T, kConverter>(call, image, rest);
    return;
  }
  const int count = static_cast<int>(space.progress->count);
  if (thread < kMaxChunks) visible[thread] = space.is_visible[thread];
  __syncthreads();
  int num_kept = 0, counted_chunks = 0;
  // A group may hold max_detections_per_class; that cannot matter before so many are kept in all.
  auto within_cap = [&](int chunk, uint64_t bits) -> uint64_t {
    num_kept += __popcll(bits);
    if (num_kept <= call.cap) return bits;
    if (counted_chunks == 0) {
      for (int i = lane; i < call.num_groups; i += 32) space.group_size[i] = 0;
      __syncwarp();
    }
    uint64_t within = 0;
    for (; counted_chunks <= chunk; ++counted_chunks) {
      const uint64_t kept = survivors.kept[counted_chunks];
      within = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int b = lane + 32 * half;
        const bool is_kept = kept >> b & 1;
        const Pair pair = is_kept ? pair_of(params, space.keys[counted_chunks * kChunk + b]) : Pair{0, 0};
        const int group = is_kept ? group_of(params, pair) : -1;
        const unsigned peers = __match_any_sync(0xffffffffu, group);
        const uint32_t before = is_kept ? space.group_size[group] : 0;
        __syncwarp();
        const bool fits =
            is_kept && before + __popc(peers & ((1u << lane) - 1)) < static_cast<uint32_t>(call.cap);
        if (is_kept && (peers & ((1u << lane) - 1)) == 0) space.group_size[group] = before + __popc(peers);
        __syncwarp();
        within |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, fits)) << (32 * half);
      }
    }
    return within;
  };
  keep_survivors(count, space.mask, nullptr, params.max_total_detections,
                 reinterpret_cast<uint64_t *>(ring_or_rest), survivors,
                 [&](int chunk, uint64_t bits) { return within_cap(chunk, bits) & visible[chunk]; });
  int num_found = survivors.num_found;
  const bool is_decided = num_found == params.max_total_detections || space.progress->is_complete;
  if (thread == 0 && is_decided) atomicExch(&space.progress->round, kFinished);
  visit_found(survivors, reinterpret_cast<uint16_t *>(ring_or_rest), [&](int place, int candidate) {
    const uint64_t key = space.keys[candidate];
    write_detection(call, image, place, box_of<T>(call, image, pair_of(params, key).anchor), window, key);
  });
  if (!is_decided) {
    num_found = keep_among_rest<T, kConverter>(call, image, survivors, rest);
    if (thread == 0) atomicExch(&space.progress->round, kFinished);
  }
  for (int m = num_found + thread; m < params.max_total_detections; m += kKeepThreads) {
    const size_t at = static_cast<size_t>(image) * params.max_total_detections + m;
    reinterpret_cast<float4 *>(call.out.boxes)[at] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    call.out.scores[at] = 0.0f;
    call.out.classes[at] = 0;
    if (call.out.anchors != nullptr) call.out.anchors[at] = 0;
  }
  if (thread == 0) call.out.num_detections[image] = num_found;
}

// ---- the call -----------------------------------------------------------------------------------------------------

Call new_call(const odtrt_postprocess_params &params) {
  Call call{};
  call.params = params;
  call.num_groups = params.class_agnostic ? 1 : params.num_columns - params.background_column;
  call.cap = params.class_agnostic ? params.max_total_detections : params.max_detections_per_class;
  const int64_t pairs = static_cast<int64_t>(params.num_anchors) * call.num_groups;
  const int64_t capped =
      static_cast<int64_t>(call.num_groups) * (call.cap < params.num_anchors ? call.cap : params.num_anchors);
  call.max_kept = static_cast<int32_t>((capped < pairs ? capped : pairs) + kMaxCandidates);
  call.counts_pairs = params.class_agnostic || pairs <= kFewPairs;
  Workspace ignored;
  call.image_size = lay_out(call, nullptr, &ignored);
  return call;
}

template <typename T, int kConverter>
cudaError_t enqueue(const Call &call, int batch, const Device &device, cudaStream_t stream) {
  const int n = call.params.num_anchors, images = batch;
  const bool overlapped = device.overlaps_launches;
  const auto blocks = [&](int work, int each, int at_most) {
    const int wanted = (work + each - 1) / each, fair = max(1, at_most / images);
    return dim3(static_cast<unsigned>(min(wanted, fair)), static_cast<unsigned>(images));
  };
  cudaError_t error = launch(clear, dim3(static_cast<unsigned>(images)), 256, 0, stream, false, call);
  if (error == cudaSuccess) {
    const int each = kGradeThreads / 32 * (call.counts_pairs || kConverter == ODTRT_SOFTMAX ? 1 : kRowsAtOnce);
    error = launch(grade<T, kConverter>, blocks(n, each, device.multiprocessors * 5), kGradeThreads, 0, stream,
                   overlapped, call);
  }
  if (error == cudaSuccess) {
    error = launch(gather<T, kConverter>, blocks(n, 32, device.multiprocessors * 2), kGatherThreads, 0, stream,
                   overlapped, call);
  }
  if (error == cudaSuccess) {
    constexpr int kTiles = kMaxChunks * (kMaxChunks + 1) / 2;
    error = launch(mark<T, kConverter>, blocks(kTiles, kOrderThreads / kMarkThreads, device.multiprocessors),
                   kOrderThreads, 0, stream, overlapped, call);
  }
  if (error == cudaSuccess) {
    error = launch(keep<T, kConverter>, blocks(n, kRowsOfTile, device.multiprocessors), kKeepThreads,
                   kRingBytes, stream, overlapped, call);
  }
  return error;
}

template <typename T>
cudaError_t enqueue(const Call &call, int batch, const Device &device, cudaStream_t stream) {
  switch (call.params.score_converter) {
    case ODTRT_SIGMOID:
      return enqueue<T, ODTRT_SIGMOID>(call, batch, device, stream);
    case ODTRT_SOFTMAX:
      return enqueue<T, ODTRT_SOFTMAX>(call, batch, device, stream);
    default:
      return enqueue<T, ODTRT_IDENTITY>(call, batch, device, stream);
  }
}

}  // namespace
}  // namespace odtrt

using namespace odtrt;

size_t odtrt_postprocess_workspace(const odtrt_postprocess_params *params, int32_t batch) {
  return is_valid(params, batch) ? new_call(*params).image_size * static_cast<size_t>(batch) : 0;
}

odtrt_status odtrt_postprocess_cuda(const odtrt_postprocess_params *params, int32_t batch,
                                    const odtrt_heads *heads, const odtrt_detections *out, void *workspace,
                                    size_t workspace_size, void *stream) {
  if (!is_valid(params, batch) || !is_valid(heads, out) || workspace == nullptr) return ODTRT_INVALID_ARGUMENT;
  Call call = new_call(*params);
  if (workspace_size < call.image_size * static_cast<size_t>(batch)) return ODTRT_WORKSPACE_TOO_SMALL;
  call.heads = *heads;
  call.out = *out;
  call.workspace = static_cast<char *>(workspace);
  Device device{};
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return static_cast<odtrt_status>(error);
  const auto on = static_cast<cudaStream_t>(stream);
  error = heads->dtype == ODTRT_FLOAT32 ? enqueue<float>(call, batch, device, on)
                                        : enqueue<__half>(call, batch, device, on);
  return static_cast<odtrt_status>(error);
}
