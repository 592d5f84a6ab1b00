// odtrt_nms_cpu: greedy suppression, one box at a time in the order of the scores.
#include <algorithm>
#include <unordered_map>
#include <vector>

#include "check.h"
#include "greedy.h"
#include "semantics.h"

namespace odtrt {
namespace {

std::vector<uint64_t> keys_of(const odtrt_nms_params &params, const float *scores) {
  std::vector<uint64_t> keys;
  for (int32_t i = 0; i < params.num_boxes; ++i) {
    const float score = add(scores[i], 0.0f);  // -0 is 0
    if (score > params.score_threshold) keys.push_back(order_key(score, static_cast<uint32_t>(i)));
  }
  return keys;
}

void suppress(const odtrt_nms_params &params, const float *boxes, const float *scores, const int32_t *classes,
              int32_t *kept, int32_t *num_kept) {
  std::vector<uint64_t> keys = keys_of(params, scores);
  std::unordered_map<int32_t, KeptBoxes> kept_of_class;
  int32_t count = 0;
  visit_descending(keys, [&](uint64_t key) {
    const uint32_t i = place_of(key);
    const float *own = boxes + size_t{4} * i;
    const Box box = with_ordered_corners({own[0], own[1], own[2], own[3]});
    const float area = signed_area(box);
    KeptBoxes &rivals = kept_of_class[classes == nullptr ? 0 : classes[i]];
    if (!rivals.suppress(box, area, params.iou_threshold)) {
      rivals.keep(box, area);
      kept[count++] = static_cast<int32_t>(i);
    }
    return count < params.max_kept;
  });
  std::fill(kept + count, kept + params.max_kept, -1);
  *num_kept = count;
}

}  // namespace
}  // namespace odtrt

odtrt_status odtrt_nms_cpu(const odtrt_nms_params *params, const float *boxes, const float *scores,
                           const int32_t *classes, int32_t *kept, int32_t *num_kept) {
  using odtrt::is_aligned;
  if (!odtrt::is_valid(params) || !odtrt::is_valid_nms_data(*params, boxes, scores, kept, num_kept) ||
      !is_aligned(boxes) || !is_aligned(scores) || !is_aligned(classes) || !is_aligned(kept) ||
      !is_aligned(num_kept)) {
    return ODTRT_INVALID_ARGUMENT;
  }
  return odtrt::status_of([&] { odtrt::suppress(*params, boxes, scores, classes, kept, num_kept); });
}
