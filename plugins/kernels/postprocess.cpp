// odtrt_postprocess_cpu sorts only as much of the final order (its head) as the detections need.
//
// 1. It finds the best logit of every anchor in one pass over the logits. Only this work grows with anchors x classes.
// 2. It takes the pairs (anchor, class) of the head from some thousand of the best anchors. Scores never fall as logits
//    rise, so logits decide which pairs are in the head. No pair outside has a score as high as one inside.
// 3. It sorts the head and walks through it, one pair at a time. If the head ends too early, the next, larger one
//    follows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "greedy.h"
#include "half.h"
#include "parallel.h"
#include "semantics.h"

namespace odtrt {
namespace {

constexpr size_t kFirstHead = 2048, kHeadGrowth = 4;
constexpr size_t kLogitsOfATask = 1 << 16, kLogitsOfAThread = 1 << 18;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

float as_float(float value) { return value; }
float as_float(uint16_t half) { return float_of_half(half); }

// The greatest of count >= 1 numbers, ignoring NaN; -infinity if all are NaN.
float greatest(const float *values, size_t count) {
  constexpr size_t kLanes = 16;
  float best = -kInfinity;
  if (count >= kLanes) {
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, -kInfinity);
    for (size_t start = 0; start < count; start += kLanes) {  // the last sixteen may overlap those before
      const float *next = values + std::min(start, count - kLanes);
      for (size_t i = 0; i < kLanes; ++i) lanes[i] = next[i] > lanes[i] ? next[i] : lanes[i];
    }
    for (const float lane : lanes) best = lane > best ? lane : best;
  } else {
    for (size_t i = 0; i < count; ++i) best = values[i] > best ? values[i] : best;
  }
  return best;
}

float greatest(const uint16_t *halves, size_t count) {
  int16_t best = ordered_half(0xfc00u);
  for (size_t i = 0; i < count; ++i) best = std::max(best, ordered_half(halves[i]));
  return float_of_half(unordered_half(best));
}

template <typename Number>
bool has_nan(const Number *values, size_t count) {
  int found = 0;
  for (size_t i = 0; i < count; ++i) found |= as_float(values[i]) != as_float(values[i]);
  return found != 0;
}

// The images of one call, and for every anchor of each what the first pass computes.
template <typename Number>
struct Batch {
  const odtrt_postprocess_params &params;
  const Number *encodings, *logits;
  const float *anchors, *clip_windows;
  const odtrt_detections &out;
  size_t num_anchors, num_columns, first_column;
  // [batch, N]: the best logit except the background's; with softmax the best score. NaN: the anchor has no candidate.
  std::unique_ptr<float[]> best;
  // [batch, N], with softmax only: the greatest logit times logit_factor, and the sum of exp(x - greatest).
  std::unique_ptr<float[]> row_max, row_sum;
};

// The score of a logit, with sigmoid and identity. It never falls as the logit rises. A score that is -0 or subnormal
// becomes 0.
float score_of_logit(const odtrt_postprocess_params &params, float logit) {
  const float value = mul(logit, params.logit_factor);
  return params.score_converter == ODTRT_SIGMOID ? sigmoid(value) : flushed(value);
}

float exp_below_max(float logit, float logit_factor, float row_max) {
  return exponential(sub(mul(logit, logit_factor), row_max));
}

template <typename Number>
void fill_with_exps(const Number *logits, size_t count, float logit_factor, float row_max, float *exps) {
  for (size_t i = 0; i < count; ++i) exps[i] = exp_below_max(as_float(logits[i]), logit_factor, row_max);
}

// The lowest logit for which predicate(logit) holds, by bisection; NaN if it holds for none. If it holds for a logit,
// it must hold for all higher ones.
template <typename Predicate>
float min_logit_where(const Predicate &predicate) {
  if (!predicate(kInfinity)) return kNan;
  uint32_t low = ordered(-kInfinity), high = ordered(kInfinity);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (predicate(unordered(middle))) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return unordered(high);
}

template <typename Number>
void find_best_logits(const Batch<Number> &batch, size_t first_row, size_t last_row) {
  const size_t count = batch.num_columns - batch.first_column;
  for (size_t row = first_row; row < last_row; ++row) {
    const Number *logits = batch.logits + row * batch.num_columns + batch.first_column;
    batch.best[row] = greatest(logits, count);
    if (batch.params.class_agnostic && has_nan(logits, count)) batch.best[row] = kNan;
  }
}

template <typename Number>
void find_best_softmax(const Batch<Number> &batch, size_t first_row, size_t last_row) {
  const odtrt_postprocess_params &params = batch.params;
  std::vector<float> exps(batch.num_columns);
  for (size_t row = first_row; row < last_row; ++row) {
    const Number *logits = batch.logits + row * batch.num_columns;
    const float row_max = mul(greatest(logits, batch.num_columns), params.logit_factor);
    batch.best[row] = kNan;
    if (!std::isfinite(row_max) || has_nan(logits, batch.num_columns)) continue;
    const float best_logit = greatest(logits + batch.first_column, batch.num_columns - batch.first_column);
    const float best_exp = exp_below_max(best_logit, params.logit_factor, row_max);
    if (!(best_exp > params.score_threshold))
      continue;  // the sum is at least 1, so the score is not above best_exp
    fill_with_exps(logits, batch.num_columns, params.logit_factor, row_max, exps.data());
    uint64_t units = 0;
    for (const float value : exps) units += softmax_units(value);
    batch.row_max[row] = row_max;
    batch.row_sum[row] = softmax_sum(units);
    batch.best[row] = normal_or_zero(divide(best_exp, batch.row_sum[row]));
  }
}

// A measure is what Batch::best holds: a logit, or with softmax a score. A range reaches from `lower` to below
// `upper`; an upper of NaN is no limit.
struct Range {
  float lower, upper;

  bool contains(float value) const { return value >= lower && !(value >= upper); }
};

// Walks over one image's candidates, from the best score down.
template <typename Number>
class Image {
 public:
  Image(const Batch<Number> &batch, size_t index)
      : batch_(batch),
        params_(batch.params),
        index_(index),
        first_row_(index * batch.num_anchors),
        is_softmax_(params_.score_converter == ODTRT_SOFTMAX),
        max_per_group_(static_cast<size_t>(params_.class_agnostic ? params_.max_total_detections
                                                                  : params_.max_detections_per_class)),
        groups_(params_.class_agnostic ? 1 : batch.num_columns - batch.first_column) {
    if (batch.clip_windows != nullptr) {
      const float *window = batch.clip_windows + 4 * index;
      window_ = {window[0], window[1], window[2], window[3]};
    }
  }

  // min_measure: the lowest measure that a candidate can have.
  void detect(float min_measure) {
    const float *best = batch_.best.get() + first_row_;
    std::vector<float> passing;
    for (size_t i = 0; i < batch_.num_anchors; ++i) {
      if (best[i] >= min_measure) passing.push_back(best[i]);
    }
    std::vector<uint64_t> keys;
    Range range{min_measure, kNan};
    for (size_t head = kFirstHead;; head *= kHeadGrowth) {
      range.lower = passing.size() > head ? cut_at(passing, head) : min_measure;
      keys.clear();
      collect(range, keys);
      const bool wants_more = visit_descending(keys, [this](uint64_t key) { return consider(key); });
      if (!wants_more || !(range.lower > min_measure)) break;
      range.upper = range.lower;
    }
    pad();
  }

 private:
  // A measure that at least `count` anchors reach. Pairs whose scores are equal to its score reach it too.
  float cut_at(std::vector<float> &passing, size_t count) const {
    const auto nth = passing.begin() + static_cast<std::ptrdiff_t>(count - 1);
    std::nth_element(passing.begin(), nth, passing.end(), [](float a, float b) { return a > b; });
    if (is_softmax_) return *nth;
    const float score = score_of_logit(params_, *nth);
    return min_logit_where([&](float logit) { return score_of_logit(params_, logit) >= score; });
  }

  void collect(const Range &range, std::vector<uint64_t> &keys) const {
    const size_t num_anchors = batch_.num_anchors;
    const float *best = batch_.best.get() + first_row_;
    for (size_t anchor = 0; anchor < num_anchors; ++anchor) {
      if (!(best[anchor] >= range.lower)) continue;
      if (params_.class_agnostic) {
        if (range.contains(best[anchor])) {
          const float score = is_softmax_ ? best[anchor] : score_of_logit(params_, best[anchor]);
          keys.push_back(order_key(score, static_cast<uint32_t>(anchor)));
        }
        continue;
      }
      for (size_t c = 0; c < groups_.size(); ++c) {
        const float logit = logit_of(anchor, c);
        const float measure = is_softmax_ ? score_of(anchor, c) : logit;
        if (range.contains(measure)) {
          const float score = is_softmax_ ? measure : score_of_logit(params_, logit);
          keys.push_back(order_key(score, static_cast<uint32_t>(c * num_anchors + anchor)));
        }
      }
    }
  }

  float logit_of(size_t anchor, size_t c) const {
    return as_float(batch_.logits[(first_row_ + anchor) * batch_.num_columns + batch_.first_column + c]);
  }

  float score_of(size_t anchor, size_t c) const {
    const float logit = logit_of(anchor, c);
    if (!is_softmax_) return score_of_logit(params_, logit);
    const size_t row = first_row_ + anchor;
    const float exp = exp_below_max(logit, params_.logit_factor, batch_.row_max[row]);
    return normal_or_zero(divide(exp, batch_.row_sum[row]));
  }

  // Keeps or drops the pair with this key. Returns false if no later pair can become a detection.
  bool consider(uint64_t key) {
    const size_t place = place_of(key), anchor = place % batch_.num_anchors, group = place / batch_.num_anchors;
    KeptBoxes &rivals = groups_[group];
    if (rivals.size() >= max_per_group_) return true;
    const Box box = decoded(anchor), corners = with_ordered_corners(box);
    const float area = signed_area(corners);
    if (rivals.suppress(corners, area, params_.iou_threshold)) return true;
    rivals.keep(corners, area);
    full_groups_ += rivals.size() >= max_per_group_;
    const Box clipped = clip(box, window_);
    const float score = odtrt::score_of(key);
    if (signed_area(clipped) > 0.0f && score >= 0.0f) {
      write(clipped, score, params_.class_agnostic ? best_class(anchor, score) : group, anchor);
    }
    return count_ < static_cast<size_t>(params_.max_total_detections) && full_groups_ < groups_.size();
  }

  Box decoded(size_t anchor) const {
    float encoding[4];
    for (size_t i = 0; i < 4; ++i) encoding[i] = as_float(batch_.encodings[(first_row_ + anchor) * 4 + i]);
    return decode(encoding, batch_.anchors + anchor * 4, params_.box_scales);
  }

  size_t best_class(size_t anchor, float score) const {
    const size_t last = batch_.num_columns - batch_.first_column - 1;
    size_t c = 0;
    while (c < last && score_of(anchor, c) != score) ++c;
    return c;
  }

  void write(const Box &clipped, float score, size_t c, size_t anchor) {
    const Box box = params_.change_coordinate_frame ? in_frame_of(window_, clipped) : clipped;
    const size_t place = index_ * static_cast<size_t>(params_.max_total_detections) + count_++;
    float *own = batch_.out.boxes + place * 4;
    own[0] = box.ymin;
    own[1] = box.xmin;
    own[2] = box.ymax;
    own[3] = box.xmax;
    batch_.out.scores[place] = score;
    batch_.out.classes[place] = static_cast<int32_t>(c);
    if (batch_.out.anchors != nullptr) batch_.out.anchors[place] = static_cast<int32_t>(anchor);
  }

  void pad() const {
    const size_t max_detections = static_cast<size_t>(params_.max_total_detections);
    const size_t first = index_ * max_detections + count_, last = (index_ + 1) * max_detections;
    std::fill(batch_.out.boxes + first * 4, batch_.out.boxes + last * 4, 0.0f);
    std::fill(batch_.out.scores + first, batch_.out.scores + last, 0.0f);
    std::fill(batch_.out.classes + first, batch_.out.classes + last, 0);
    if (batch_.out.anchors != nullptr) std::fill(batch_.out.anchors + first, batch_.out.anchors + last, 0);
    batch_.out.num_detections[index_] = static_cast<int32_t>(count_);
  }

  const Batch<Number> &batch_;
  const odtrt_postprocess_params &params_;
  const size_t index_, first_row_;
  const bool is_softmax_;
  const size_t max_per_group_;
  std::vector<KeptBoxes> groups_;
  Box window_{0.0f, 0.0f, 1.0f, 1.0f};
  size_t full_groups_ = 0, count_ = 0;
};

template <typename Number>
void postprocess(const odtrt_postprocess_params &params, size_t num_images, const odtrt_heads &heads,
                 const odtrt_detections &out, int32_t num_threads) {
  const bool is_softmax = params.score_converter == ODTRT_SOFTMAX;
  const size_t num_anchors = static_cast<size_t>(params.num_anchors), rows = num_images * num_anchors;
  const auto floats_if = [](bool wanted, size_t count) {
    return std::unique_ptr<float[]>(wanted ? new float[count] : nullptr);
  };
  const Batch<Number> batch{params,
                            static_cast<const Number *>(heads.box_encodings),
                            static_cast<const Number *>(heads.class_logits),
                            heads.anchors,
                            heads.clip_windows,
                            out,
                            num_anchors,
                            static_cast<size_t>(params.num_columns),
                            static_cast<size_t>(params.background_column),
                            floats_if(true, rows),
                            floats_if(is_softmax, rows),
                            floats_if(is_softmax, rows)};
  const int threads = threads_for(rows * batch.num_columns, kLogitsOfAThread, num_threads);
  const size_t rows_of_a_task = std::max<size_t>(1, kLogitsOfATask / batch.num_columns);
  for_each_index((rows + rows_of_a_task - 1) / rows_of_a_task, threads, [&](size_t task) {
    const size_t first = task * rows_of_a_task, last = std::min(rows, first + rows_of_a_task);
    if (is_softmax) {
      find_best_softmax(batch, first, last);
    } else {
      find_best_logits(batch, first, last);
    }
  });
  const float min_measure =
      is_softmax ? std::nextafter(params.score_threshold, kInfinity) : min_logit_where([&](float logit) {
        return score_of_logit(params, logit) > params.score_threshold;
      });
  for_each_index(num_images, threads, [&](size_t index) { Image<Number>(batch, index).detect(min_measure); });
}

}  // namespace
}  // namespace odtrt

odtrt_status odtrt_postprocess_cpu(const odtrt_postprocess_params *params, int32_t batch,
                                   const odtrt_heads *heads, const odtrt_detections *out, int32_t num_threads) {
  if (!odtrt::is_valid(params, batch) || !odtrt::is_valid(heads, out) || !odtrt::are_aligned(*heads, *out) ||
      num_threads < 0) {
    return ODTRT_INVALID_ARGUMENT;
  }
  return odtrt::status_of([&] {
    const size_t num_images = static_cast<size_t>(batch);
    if (heads->dtype == ODTRT_FLOAT16) {
      odtrt::postprocess<uint16_t>(*params, num_images, *heads, *out, num_threads);
    } else {
      odtrt::postprocess<float>(*params, num_images, *heads, *out, num_threads);
    }
  });
}
