// What runs the network, with the steps before and behind it: on the CPU cpu_backend.cpp, on the GPU cuda_backend.cpp.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "model.h"
#include "odtrt_detector.h"

namespace odtrt {

// No value: without limit.
using Deadline = std::optional<std::chrono::steady_clock::time_point>;

// A picture in the memory of a slot.
struct Picture {
  Frame frame;
  int64_t pitch;
  bool is_bgr;
};

// As post-processing leaves them: boxes normalised, classes from 0.
struct Found {
  int32_t count;
  const float *boxes, *scores;
  const int32_t *classes;
};

// The detector calls `picture` and `start` from one thread at a time, and `wait` and `found` from any, for different
// slots at the same time.
class Backend {
 public:
  virtual ~Backend() = default;  // waits for running work

  // Memory of at least `size` bytes for the slot's picture. A larger size than before moves it.
  virtual uint8_t *picture(int slot, size_t size) = 0;

  // Begins work on the picture in the slot. Throws Failure if it cannot.
  virtual void start(int slot, const Picture &picture) = 0;

  // Whether the work that was started for the slot is done, or has failed, by the deadline.
  virtual bool wait(int slot, Deadline deadline) = 0;

  // The result of work that is done, until the slot's next start. Throws Failure if it failed.
  virtual Found found(int slot) = 0;

  virtual std::string description() = 0;
};

std::unique_ptr<Backend> make_cpu_backend(const Model &model, odtrt_network network, void *context, int num_slots);

// plugin, plan: of odtrt_detector_options, "" if not given.
std::unique_ptr<Backend> make_cuda_backend(const Model &model, const std::string &plugin, const std::string &plan,
                                           int num_slots);

}  // namespace odtrt
