// One thread works on the pictures in order: preprocessing, the caller's network, post-processing.
#include <condition_variable>
#include <deque>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "backend.h"
#include "failure.h"

namespace odtrt {
namespace {

class CpuBackend final : public Backend {
 public:
  CpuBackend(const Model &model, odtrt_network network, void *context, int num_slots)
      : model_(model),
        network_(network),
        context_(context),
        slots_(static_cast<size_t>(num_slots)),
        input_(size_t{3} * static_cast<size_t>(model.input.height) * static_cast<size_t>(model.input.width)),
        encodings_(4 * anchors()),
        logits_(anchors() * static_cast<size_t>(model.postprocess.num_columns)) {
    const auto most = static_cast<size_t>(model.postprocess.max_total_detections);
    for (Slot &slot : slots_) {
      slot.boxes.resize(4 * most);
      slot.scores.resize(most);
      slot.classes.resize(most);
    }
    worker_ = std::thread([this] { work(); });
  }

  ~CpuBackend() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_closing_ = true;
    }
    changed_.notify_all();
    worker_.join();
  }

  uint8_t *picture(int slot, size_t size) override {
    std::vector<uint8_t> &memory = at(slot).picture;
    if (memory.size() < size) std::vector<uint8_t>(size).swap(memory);
    return memory.data();
  }

  void start(int slot, const Picture &picture) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      waiting_.push_back(slot);
      at(slot).is_done = false;
      at(slot).given = picture;
    }
    changed_.notify_all();
  }

  bool wait(int slot, Deadline deadline) override {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto is_done = [&] { return at(slot).is_done; };
    if (deadline) return changed_.wait_until(lock, *deadline, is_done);
    changed_.wait(lock, is_done);
    return true;
  }

  Found found(int slot) override {
    const Slot &done = at(slot);
    if (done.failure.status != ODTRT_OK) throw done.failure;
    return {done.count, done.boxes.data(), done.scores.data(), done.classes.data()};
  }

  std::string description() override { return "the caller's network, on the CPU"; }

 private:
  struct Slot {
    std::vector<uint8_t> picture;
    Picture given{};
    bool is_done = false;
    Failure failure{ODTRT_OK, ""};
    int32_t count = 0;
    std::vector<float> boxes, scores;
    std::vector<int32_t> classes;
  };

  Slot &at(int slot) { return slots_[static_cast<size_t>(slot)]; }
  size_t anchors() const { return static_cast<size_t>(model_.postprocess.num_anchors); }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return is_closing_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      Slot &slot = at(waiting_.front());
      waiting_.pop_front();
      lock.unlock();
      Failure failure{ODTRT_OK, ""};
      try {
        detect(slot);
      } catch (const Failure &thrown) {
        failure = thrown;
      } catch (const std::bad_alloc &) {
        failure.status = ODTRT_OUT_OF_MEMORY;
      } catch (...) {
        failure.status = ODTRT_NETWORK_FAILED;
      }
      lock.lock();
      slot.failure = std::move(failure);
      slot.is_done = true;
      changed_.notify_all();
    }
  }

  void detect(Slot &slot) {
    const Picture &given = slot.given;
    const odtrt_preprocess_params params = preprocess_params(model_.input, given.frame, given.pitch, given.is_bgr);
    require_ok(odtrt_preprocess_cpu(&params, slot.picture.data(), input_.data(), 0), "preprocessing");
    char said[400] = "";
    const int32_t status = network_(context_, input_.data(), encodings_.data(), logits_.data(), said, sizeof said - 1);
    if (status != 0) {
      const std::string reason = said[0] == '\0' ? "it returned " + std::to_string(status) : one_line(said);
      fail(ODTRT_NETWORK_FAILED, "the caller's network failed: " + reason);
    }
    const Frame &frame = given.frame;
    const float window[4] = {0, 0,
                             static_cast<float>(static_cast<double>(frame.true_height) / model_.input.height),
                             static_cast<float>(static_cast<double>(frame.true_width) / model_.input.width)};
    const odtrt_heads heads = {encodings_.data(), logits_.data(), ODTRT_FLOAT32, model_.anchors.data(), window};
    const odtrt_detections out = {&slot.count, slot.boxes.data(), slot.scores.data(), slot.classes.data(), nullptr};
    require_ok(odtrt_postprocess_cpu(&model_.postprocess, 1, &heads, &out, 0), "post-processing");
  }

  const Model &model_;
  const odtrt_network network_;
  void *const context_;
  std::vector<Slot> slots_;
  std::vector<float> input_, encodings_, logits_;

  std::mutex mutex_;  // of waiting_, is_closing_, and each slot's is_done, given and failure
  std::condition_variable changed_;
  std::deque<int> waiting_;
  bool is_closing_ = false;
  std::thread worker_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const Model &model, odtrt_network network, void *context, int num_slots) {
  return std::make_unique<CpuBackend>(model, network, context, num_slots);
}

#ifndef ODTRT_WITH_CUDA
std::unique_ptr<Backend> make_cuda_backend(const Model &, const std::string &, const std::string &, int) {
  fail(ODTRT_NO_CUDA, "this library was built without CUDA, so it runs no plan: build where nvcc is installed, or give "
                      "options.network");
}
#endif

}  // namespace odtrt
