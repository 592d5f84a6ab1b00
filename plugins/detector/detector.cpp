// The C ABI: slots, tickets and results around a backend.
#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string_view>

#include "backend.h"
#include "failure.h"

using odtrt::Backend;
using odtrt::Deadline;
using odtrt::fail;
using odtrt::Failure;
using odtrt::Found;
using odtrt::Frame;
using odtrt::Model;
using odtrt::Picture;

namespace {

constexpr int32_t kMaxSlots = 16, kUsualSlots = 2;
constexpr size_t kLargestStruct = 4096;
constexpr int64_t kLongestTimeout = int64_t{1} << 50;  // 35 years; a longer one is none

// kFilling: a picture is being copied into it.
enum class State { kFree, kLent, kFilling, kBusy, kDone };

struct Slot {
  State state = State::kFree;
  uint64_t ticket = 0;      // of a busy or done picture
  bool is_awaited = false;  // its call of odtrt_detector_infer has not returned yet
  uint8_t *data = nullptr;
  size_t size = 0;
  Frame frame{};
  Failure failure{ODTRT_OK, ""};
  std::vector<odtrt_detection> detections;
};

void write_text(std::string_view text, char *to, size_t size) {
  if (to == nullptr || size == 0) return;
  const size_t length = std::min(text.size(), size - 1);
  std::memcpy(to, text.data(), length);
  to[length] = '\0';
}

// Runs work(), which returns a status; turns what it throws into a status and a line.
template <typename Work>
odtrt_status guarded(char *error, size_t error_size, const Work &work) noexcept {
  try {
    write_text("", error, error_size);
    return work();
  } catch (const Failure &failure) {
    write_text(failure.text, error, error_size);
    return failure.status;
  } catch (...) {  // no memory, or the system refuses a thread
    write_text("the machine has no memory left", error, error_size);
    return ODTRT_OUT_OF_MEMORY;
  }
}

template <typename Struct>
bool is_aligned(const Struct *pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Struct) == 0;
}

// The caller's struct. What a newer header added to it must be 0, because it is not known here.
template <typename Struct>
Struct given(const Struct *from, const char *name) {
  const size_t size = from == nullptr || !is_aligned(from) ? 0 : from->struct_size;
  if (size < sizeof(Struct) || size > kLargestStruct) {
    fail(ODTRT_INVALID_ARGUMENT, std::string(name) + ": null, misaligned, or struct_size is not its sizeof");
  }
  const auto *bytes = reinterpret_cast<const unsigned char *>(from);
  if (std::any_of(bytes + sizeof(Struct), bytes + size, [](unsigned char byte) { return byte != 0; })) {
    fail(ODTRT_INVALID_ARGUMENT, std::string(name) + ": a field that only a newer library knows is set");
  }
  Struct copy;
  std::memcpy(&copy, from, sizeof copy);
  return copy;
}

template <typename Struct>
void require_room(const Struct *out, const char *name) {
  if (out == nullptr || !is_aligned(out) || out->struct_size < sizeof(Struct)) {
    fail(ODTRT_INVALID_ARGUMENT, std::string(name) + ": null, misaligned, or struct_size is not its sizeof");
  }
}

template <typename Struct>
void give(Struct value, Struct *out) {
  value.struct_size = out->struct_size;
  std::memcpy(out, &value, sizeof value);
}

void require(const odtrt_detector *detector) {
  if (detector == nullptr) fail(ODTRT_INVALID_ARGUMENT, "detector: null, expected an open detector");
}

std::string text_or_empty(const char *text) { return text == nullptr ? "" : text; }

}  // namespace

struct odtrt_detector {
  Model model;
  std::unique_ptr<Backend> backend;  // uses the model, so it is destroyed first
  std::vector<Slot> slots;
  std::mutex mutex;  // of slots and last_ticket, and of the backend's picture and start
  std::condition_variable changed;  // a slot is no longer being filled or awaited
  uint64_t last_ticket = 0;

  int index_of(const Slot &slot) const { return static_cast<int>(&slot - slots.data()); }

  // The slot to use next, free or with the oldest result; nullptr if all are lent or busy.
  Slot *next_slot() {
    Slot *oldest = nullptr;
    for (Slot &slot : slots) {
      if (slot.state == State::kFree) return &slot;
      if (slot.state == State::kBusy && backend->wait(index_of(slot), std::chrono::steady_clock::now())) finish(slot);
      if (slot.state != State::kDone || slot.is_awaited) continue;
      if (oldest == nullptr || slot.ticket < oldest->ticket) oldest = &slot;
    }
    return oldest;
  }

  // Takes over the result of a busy slot whose work is done.
  void finish(Slot &slot) {
    slot.failure = {ODTRT_OK, ""};
    slot.detections.clear();
    try {
      const Found found = backend->found(index_of(slot));
      if (found.count < 0 || found.count > model.postprocess.max_total_detections) {
        fail(ODTRT_NETWORK_FAILED, "the post-processing counted " + std::to_string(found.count) + " detections");
      }
      slot.detections.resize(static_cast<size_t>(found.count));
      for (size_t i = 0; i < slot.detections.size(); ++i) {
        odtrt_detection &one = slot.detections[i];
        box_to_pixels(model, slot.frame, found.boxes + 4 * i, one.box);
        one.score = found.scores[i];
        one.class_id = found.classes[i] + 1;
      }
    } catch (const Failure &failure) {
      slot.failure = failure;
    }
    slot.state = State::kDone;
  }

  void make_room(Slot &slot, size_t size, State state) {
    slot.state = State::kFree;
    if (slot.size < size) {
      slot.size = 0;
      slot.data = backend->picture(index_of(slot), size);
      slot.size = size;
    }
    slot.state = state;
  }

  Slot *lent_with(const uint8_t *data) {
    for (Slot &slot : slots) {
      if (slot.state == State::kLent && slot.data == data) return &slot;
    }
    return nullptr;
  }

  // is_awaited: waits for a slot, and keeps the result until result() was called.
  uint64_t submit(const odtrt_image *pointer, bool is_awaited) {
    odtrt_image image = given(pointer, "image");
    if (image.pitch == 0) image.pitch = int64_t{3} * image.width;
    check(image);
    const Frame frame = frame_of(model.input, image.height, image.width);
    std::unique_lock<std::mutex> lock(mutex);
    Slot *slot = lent_with(image.data);
    const bool is_lent = slot != nullptr;
    if (is_lent) {
      check_slot(image, *slot);
    } else {
      slot = free_slot(lock, is_awaited);
      make_room(*slot, size_t{3} * static_cast<size_t>(image.width) * static_cast<size_t>(image.height),
                State::kFilling);
      lock.unlock();
      copy(image, slot->data);
      image.pitch = int64_t{3} * image.width;
      lock.lock();
    }
    slot->frame = frame;
    try {
      backend->start(index_of(*slot), {frame, image.pitch, image.format == ODTRT_BGR8});
    } catch (...) {
      if (!is_lent) slot->state = State::kFree;
      changed.notify_all();
      throw;
    }
    slot->ticket = ++last_ticket;
    slot->is_awaited = is_awaited;
    slot->state = State::kBusy;
    changed.notify_all();
    return slot->ticket;
  }

  odtrt_status result(uint64_t ticket, Deadline deadline, odtrt_result *out) {
    std::unique_lock<std::mutex> lock(mutex);
    Slot *slot = with(ticket);
    if (slot->state == State::kBusy) {
      const int index = index_of(*slot);
      lock.unlock();
      const bool is_done = backend->wait(index, deadline);
      lock.lock();
      slot = with(ticket);  // another thread may have taken it over, and the slot may have been used again
      if (slot->state == State::kBusy) {
        if (!is_done) return ODTRT_TIMEOUT;
        finish(*slot);
      }
    }
    if (slot->is_awaited) {
      slot->is_awaited = false;
      changed.notify_all();
    }
    if (slot->failure.status != ODTRT_OK) throw slot->failure;
    std::copy(slot->detections.begin(), slot->detections.end(), out->detections);
    out->num_detections = static_cast<int32_t>(slot->detections.size());
    out->ticket = ticket;
    return ODTRT_OK;
  }

  void require_room(const odtrt_result *out) const {
    ::require_room(out, "result");
    const int32_t needed = model.postprocess.max_total_detections;
    if (out->detections == nullptr || !is_aligned(out->detections) || out->capacity < needed) {
      fail(ODTRT_INVALID_ARGUMENT, "result: detections is null or misaligned, or capacity is " +
                                       std::to_string(out->capacity) + ", expected at least " + std::to_string(needed));
    }
  }

  odtrt_status lend(int32_t height, int32_t width, odtrt_image *out) {
    odtrt_image image{};
    image.data = reinterpret_cast<uint8_t *>(this);  // any address: the real one follows
    image.height = height;
    image.width = width;
    image.pitch = int64_t{3} * width;
    check(image);
    frame_of(model.input, height, width);
    std::unique_lock<std::mutex> lock(mutex);
    Slot *slot = free_slot(lock, false);
    make_room(*slot, size_t{3} * static_cast<size_t>(width) * static_cast<size_t>(height), State::kLent);
    image.data = slot->data;
    give(image, out);
    return ODTRT_OK;
  }

  odtrt_status release(const odtrt_image *pointer) {
    const odtrt_image image = given(pointer, "image");
    const std::lock_guard<std::mutex> lock(mutex);
    Slot *slot = lent_with(image.data);
    if (slot == nullptr) fail(ODTRT_INVALID_ARGUMENT, "image: not in a slot that is lent");
    slot->state = State::kFree;
    return ODTRT_OK;
  }

 private:
  static void check(const odtrt_image &image) {
    const auto is_side = [](int32_t pixels) { return pixels >= 1 && pixels < 1 << 24; };
    if (image.data == nullptr || !is_side(image.height) || !is_side(image.width)) {
      fail(ODTRT_INVALID_ARGUMENT, "image: no data, or " + std::to_string(image.height) + "x" +
                                       std::to_string(image.width) + " pixels, expected 1 to 2^24 - 1 a side");
    }
    if (image.pitch < int64_t{3} * image.width || image.pitch > int64_t{1} << 32) {
      fail(ODTRT_INVALID_ARGUMENT, "image: pitch " + std::to_string(image.pitch) + ", expected at least 3 * width");
    }
    if (image.format != ODTRT_RGB8 && image.format != ODTRT_BGR8) {
      fail(ODTRT_INVALID_ARGUMENT, "image: format " + std::to_string(image.format) + ", expected RGB8 or BGR8");
    }
  }

  static void check_slot(const odtrt_image &image, const Slot &slot) {
    const int64_t end = (int64_t{image.height} - 1) * image.pitch + int64_t{3} * image.width;
    if (static_cast<uint64_t>(end) > slot.size) {
      fail(ODTRT_INVALID_ARGUMENT, "image: larger than the slot that it is in; ask for one of its size");
    }
  }

  static void copy(const odtrt_image &image, uint8_t *target) {
    const size_t row = size_t{3} * static_cast<size_t>(image.width);
    for (int64_t y = 0; y < image.height; ++y) {
      std::memmove(target + static_cast<size_t>(y) * row, image.data + y * image.pitch, row);
    }
  }

  // Waits, if `waits`, until one is free. Throws ODTRT_BUSY.
  Slot *free_slot(std::unique_lock<std::mutex> &lock, bool waits) {
    while (true) {
      Slot *slot = next_slot();
      if (slot != nullptr) return slot;
      const Slot *busy = nullptr;
      for (const Slot &one : slots) {
        if (one.state == State::kBusy && (busy == nullptr || one.ticket < busy->ticket)) busy = &one;
      }
      const auto passes = [](const Slot &one) { return one.state == State::kFilling || one.is_awaited; };
      if (waits && busy == nullptr && std::any_of(slots.begin(), slots.end(), passes)) {
        changed.wait(lock);
        continue;
      }
      if (!waits || busy == nullptr) {
        fail(ODTRT_BUSY, "all " + std::to_string(slots.size()) +
                             " slots are lent or busy: fetch a result, release a slot, or drop this picture");
      }
      const int index = index_of(*busy);
      lock.unlock();
      backend->wait(index, std::nullopt);
      lock.lock();
    }
  }

  Slot *with(uint64_t ticket) {
    for (Slot &slot : slots) {
      if ((slot.state == State::kBusy || slot.state == State::kDone) && slot.ticket == ticket) return &slot;
    }
    fail(ODTRT_UNKNOWN_TICKET, "ticket " + std::to_string(ticket) + ": no such picture, or its slot was used again");
  }
};

odtrt_status odtrt_detector_open(const odtrt_detector_options *options, odtrt_detector **detector, char *error,
                                 size_t error_size) {
  return guarded(error, error_size, [&]() -> odtrt_status {
    if (detector == nullptr) fail(ODTRT_INVALID_ARGUMENT, "detector: null, expected a place for the detector");
    *detector = nullptr;
    const odtrt_detector_options wanted = given(options, "options");
    if (wanted.folder == nullptr) fail(ODTRT_INVALID_ARGUMENT, "options.folder: null, expected a model folder");
    if (wanted.num_slots < 0 || wanted.num_slots > kMaxSlots) {
      fail(ODTRT_INVALID_ARGUMENT, "options.num_slots: " + std::to_string(wanted.num_slots) + ", expected 1 to 16");
    }
    const int32_t num_slots = wanted.num_slots == 0 ? kUsualSlots : wanted.num_slots;
    auto made = std::make_unique<odtrt_detector>();
    made->model = odtrt::read_model(wanted.folder);
    made->slots.resize(static_cast<size_t>(num_slots));
    made->backend =
        wanted.network != nullptr
            ? odtrt::make_cpu_backend(made->model, wanted.network, wanted.network_context, num_slots)
            : odtrt::make_cuda_backend(made->model, text_or_empty(wanted.plugin), text_or_empty(wanted.plan),
                                       num_slots);
    *detector = made.release();
    return ODTRT_OK;
  });
}

odtrt_status odtrt_detector_infer(odtrt_detector *detector, const odtrt_image *image, odtrt_result *result, char *error,
                                  size_t error_size) {
  return guarded(error, error_size, [&] {
    require(detector);
    detector->require_room(result);
    return detector->result(detector->submit(image, true), std::nullopt, result);
  });
}

odtrt_status odtrt_detector_infer_async(odtrt_detector *detector, const odtrt_image *image, uint64_t *ticket,
                                        char *error, size_t error_size) {
  return guarded(error, error_size, [&]() -> odtrt_status {
    require(detector);
    if (ticket == nullptr) fail(ODTRT_INVALID_ARGUMENT, "ticket: null, expected a place for the ticket");
    *ticket = detector->submit(image, false);
    return ODTRT_OK;
  });
}

odtrt_status odtrt_detector_result(odtrt_detector *detector, uint64_t ticket, int64_t timeout_us, odtrt_result *result,
                                   char *error, size_t error_size) {
  return guarded(error, error_size, [&] {
    require(detector);
    detector->require_room(result);
    Deadline deadline;
    if (timeout_us >= 0 && timeout_us <= kLongestTimeout) {
      deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(timeout_us);
    }
    const odtrt_status status = detector->result(ticket, deadline, result);
    if (status == ODTRT_TIMEOUT) write_text("the result is not there yet; ask again", error, error_size);
    return status;
  });
}

odtrt_status odtrt_detector_slot(odtrt_detector *detector, int32_t height, int32_t width, odtrt_image *image,
                                 char *error, size_t error_size) {
  return guarded(error, error_size, [&] {
    require(detector);
    require_room(image, "image");
    return detector->lend(height, width, image);
  });
}

odtrt_status odtrt_detector_release(odtrt_detector *detector, const odtrt_image *image, char *error,
                                    size_t error_size) {
  return guarded(error, error_size, [&] {
    require(detector);
    return detector->release(image);
  });
}

odtrt_status odtrt_detector_get_shape(const odtrt_detector *detector, odtrt_detector_shape *shape) {
  return guarded(nullptr, 0, [&]() -> odtrt_status {
    require(detector);
    require_room(shape, "shape");
    const Model &model = detector->model;
    const odtrt_postprocess_params &heads = model.postprocess;
    give(odtrt_detector_shape{0, model.input.batch, model.input.height, model.input.width, heads.num_anchors,
                              heads.num_columns, static_cast<int32_t>(model.class_names.size()),
                              heads.max_total_detections},
         shape);
    return ODTRT_OK;
  });
}

const char *odtrt_detector_class_name(const odtrt_detector *detector, int32_t class_id) {
  if (detector == nullptr || class_id < 1) return nullptr;
  const std::vector<std::string> &names = detector->model.class_names;
  return static_cast<size_t>(class_id) <= names.size() ? names[static_cast<size_t>(class_id) - 1].c_str() : nullptr;
}

void odtrt_detector_describe(odtrt_detector *detector, char *text, size_t text_size) {
  guarded(text, text_size, [&]() -> odtrt_status {
    require(detector);
    const std::lock_guard<std::mutex> lock(detector->mutex);
    write_text(detector->backend->description(), text, text_size);
    return ODTRT_OK;
  });
}

void odtrt_detector_close(odtrt_detector *detector) { delete detector; }

int32_t odtrt_detector_abi_version(void) { return ODTRT_DETECTOR_ABI_VERSION; }
