// Greedy suppression on the CPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "semantics.h"

namespace odtrt {

// The boxes of one class that were kept so far. They are stored in blocks of eight, so that the compiler can compare a
// weaker box with eight of them at a time.
class KeptBoxes {
 public:
  size_t size() const { return size_; }

  // Whether a kept box suppresses this one. box: with ordered corners; area: its signed_area.
  bool suppress(const Box &box, float area, float iou_threshold) const {
    return is_usual(box, area, iou_threshold) ? any_suppresses<true>(box, area, iou_threshold)
                                              : any_suppresses<false>(box, area, iou_threshold);
  }

  void keep(const Box &box, float area) {
    int first = static_cast<int>(size_ % kLanes), last = first;
    if (first == 0) {  // unused lanes repeat a kept box, which changes no result
      blocks_.emplace_back();
      last = kLanes - 1;
    }
    Block &block = blocks_.back();
    for (int i = first; i <= last; ++i) {
      block.ymin[i] = box.ymin;
      block.xmin[i] = box.xmin;
      block.ymax[i] = box.ymax;
      block.xmax[i] = box.xmax;
      block.area[i] = area;
    }
    ++size_;
  }

 private:
  template <bool kIsUsual>
  bool any_suppresses(const Box &box, float area, float iou_threshold) const {
    for (const Block &block : blocks_) {
      int hits = 0;
      for (int i = 0; i < kLanes; ++i) {
        const Box kept{block.ymin[i], block.xmin[i], block.ymax[i], block.xmax[i]};
        hits |= suppresses<kIsUsual>(kept, block.area[i], box, area, iou_threshold);
      }
      if (hits) return true;
    }
    return false;
  }

  static constexpr int kLanes = 8;
  struct Block {
    float ymin[kLanes], xmin[kLanes], ymax[kLanes], xmax[kLanes], area[kLanes];
  };
  std::vector<Block> blocks_;
  size_t size_ = 0;
};

// Calls visit(key) for the keys in descending order until visit returns false. Returns whether it went through all
// keys. Sorts the keys in growing portions, because most walks end early.
template <typename Visit>
bool visit_descending(std::vector<uint64_t> &keys, const Visit &visit) {
  const auto descending = [](uint64_t a, uint64_t b) { return a > b; };
  size_t portion = 2048;
  for (size_t start = 0; start < keys.size(); start += portion, portion *= 4) {
    const auto first = keys.begin() + static_cast<std::ptrdiff_t>(start);
    auto last = keys.end();
    if (keys.size() - start > portion + portion / 2) {
      last = first + static_cast<std::ptrdiff_t>(portion);
      std::nth_element(first, last, keys.end(), descending);
    } else {
      portion = keys.size() - start;
    }
    std::sort(first, last, descending);
    for (auto key = first; key != last; ++key) {
      if (!visit(*key)) return false;
    }
  }
  return true;
}

}  // namespace odtrt
