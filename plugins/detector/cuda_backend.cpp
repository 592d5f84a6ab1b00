// A plan of TensorRT with preprocessing before and post-processing behind it, on one stream. The first picture of a
// size in a slot runs call by call. Then the calls are recorded as a CUDA graph, which is kept if its first launch
// gives the same bits; later pictures of that size are one launch.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "backend.h"
#include "engine.h"
#include "failure.h"
#include "plan.h"

namespace odtrt {
namespace {

constexpr size_t kAlignment = 256, kMaxGraphsOfASlot = 4;
constexpr std::chrono::milliseconds kSpinning(5);  // after that a wait leaves the processor to others
constexpr std::chrono::microseconds kNap(100);
constexpr int kMajors[] = {11, 10, 8};

void require(cudaError_t status, const char *call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next call of another library reports it once more
  odtrt_status found = ODTRT_NETWORK_FAILED;
  if (status == cudaErrorMemoryAllocation) found = ODTRT_OUT_OF_MEMORY;
  fail(found, std::string(call) + ": CUDA error " + std::to_string(static_cast<int>(status)) + ", " +
                  cudaGetErrorString(status));
}

// Memory of the GPU, or page-locked memory of the host that kernels reach too.
class Memory {
 public:
  enum class Kind { kDevice, kHost };

  Memory() = default;
  Memory(Kind kind, size_t size) : Memory() {  // so that the destructor runs if a call below fails
    kind_ = kind;
    size_ = size;
    if (kind == Kind::kDevice) {
      require(cudaMalloc(&device_, size), "cudaMalloc");
      return;
    }
    require(cudaHostAlloc(&host_, size, cudaHostAllocPortable | cudaHostAllocMapped), "cudaHostAlloc");
    std::memset(host_, 0, size);
    require(cudaHostGetDevicePointer(&device_, host_, 0), "cudaHostGetDevicePointer");
  }
  Memory(Memory &&other) noexcept { *this = std::move(other); }
  Memory &operator=(Memory &&other) noexcept {
    std::swap(kind_, other.kind_);
    std::swap(size_, other.size_);
    std::swap(device_, other.device_);
    std::swap(host_, other.host_);
    return *this;
  }
  ~Memory() {
    if (kind_ == Kind::kDevice && device_ != nullptr) cudaFree(device_);
    if (host_ != nullptr) cudaFreeHost(host_);
  }

  size_t size() const { return size_; }
  template <typename Value>
  Value *host(size_t offset = 0) const {
    return reinterpret_cast<Value *>(static_cast<char *>(host_) + offset);
  }
  template <typename Value>
  Value *device(size_t offset = 0) const {
    return reinterpret_cast<Value *>(static_cast<char *>(device_) + offset);
  }

 private:
  Kind kind_ = Kind::kDevice;
  size_t size_ = 0;
  void *device_ = nullptr, *host_ = nullptr;
};

// The TensorRT of this process: its library, and the functions that were compiled for its major version.
struct TensorRt {
  void *library = nullptr;
  std::string version;
  const odtrt_engine_function_table *functions = nullptr;
};

std::string own_folder() {
  Dl_info here{};
  if (dladdr(reinterpret_cast<const void *>(&odtrt_detector_open), &here) == 0 || here.dli_fname == nullptr) return ".";
  const std::string path = here.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// "10.3.0"; "" if the library is of another major version than its name says.
std::string version_of(void *library, int major) {
  const auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
  const int number = version == nullptr ? 0 : version();
  const int of_major = major < 10 ? 1000 : 10000;
  if (number / of_major != major) return "";
  return std::to_string(major) + "." + std::to_string(number % of_major / 100) + "." + std::to_string(number % 100);
}

const odtrt_engine_function_table *functions_for(int major) {
  const std::string path = own_folder() + "/libodtrt_engine" + std::to_string(major) + ".so";
  void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  const auto get = reinterpret_cast<const odtrt_engine_function_table *(*)()>(dlsym(library, "odtrt_engine_functions"));
  const odtrt_engine_function_table *functions = get == nullptr ? nullptr : get();
  const bool fits = functions != nullptr && functions->abi_version == ODTRT_ENGINE_ABI_VERSION &&
                    functions->tensorrt_major == major;
  return fits ? functions : nullptr;
}

// The TensorRT that is loaded already, as by Python; otherwise the newest that is installed and was compiled for. It is
// never unloaded: static objects of it outlive the detector.
TensorRt find_tensorrt() {
  std::string reasons;
  for (const bool is_loaded : {true, false}) {
    for (const int major : kMajors) {
      const std::string name = "libnvinfer.so." + std::to_string(major);
      TensorRt found;
      found.library = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
      if (found.library == nullptr && is_loaded) continue;
      found.functions = functions_for(major);
      if (found.functions == nullptr && found.library == nullptr) continue;
      if (found.functions == nullptr) {
        fail(ODTRT_NO_PLAN, name + " is loaded in this process, and there is no libodtrt_engine" +
                                std::to_string(major) + ".so in " + own_folder() +
                                ": run `make plugin` with TENSORRT_INCLUDE_DIR naming its headers");
      }
      if (found.library == nullptr) found.library = dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL);
      if (found.library == nullptr) {
        reasons += std::string(reasons.empty() ? "" : "; ") + one_line(dlerror());
        continue;
      }
      found.version = version_of(found.library, major);
      if (!found.version.empty()) return found;
      reasons += (reasons.empty() ? "" : "; ") + name + " says that it is of another version";
    }
  }
  if (reasons.empty()) {
    reasons = "there is no libodtrt_engine8.so, 10 or 11 in " + own_folder() +
              "; run `make plugin` with TENSORRT_INCLUDE_DIR naming the headers of this TensorRT";
  }
  fail(ODTRT_NO_PLAN, "no TensorRT that can be used: " + reasons);
}

// GPU 0, as CUDA_VISIBLE_DEVICES shows it. Before TensorRT is asked for anything: without a GPU it may crash.
Machine machine_with_gpu() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    cudaGetLastError();
    fail(ODTRT_NO_CUDA, std::string("no GPU that CUDA can use (") + cudaGetErrorString(status) +
                            "): give options.network, which runs on the CPU, or run `odtrt doctor`");
  }
  cudaDeviceProp properties{};
  require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  Machine machine = this_machine();
  machine.gpu = properties.name;
  machine.compute_capability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
  machine.sm_count = properties.multiProcessorCount;
  machine.gpu_memory_mb = static_cast<int64_t>(properties.totalGlobalMem >> 20);
  return machine;
}

bool is_integrated() {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, cudaDevAttrIntegrated, 0), "cudaDeviceGetAttribute");
  return value != 0;
}

// The network in TensorRT.
class Engine {
 public:
  Engine(const TensorRt &trt, const std::string &who, const Passport &passport, const std::string &plugin,
         const std::string &plan)
      : functions_(*trt.functions), who_(who) {
    const char *library = passport.is_fused() ? plugin.c_str() : nullptr;
    engine_ = functions_.load(trt.library, library, plan.data(), plan.size(), passport.version_compatible, said_,
                              sizeof said_);
    if (engine_ == nullptr) refuse("cannot load it");
  }
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;
  ~Engine() { functions_.close(engine_); }

  // The batch to run: the plan's own, or the smallest that it takes.
  int64_t batch(const std::string &input) {
    const odtrt_engine_tensor found = named(input);
    const bool is_dynamic = found.dimensions[0] == -1;
    const int64_t batch = is_dynamic ? functions_.min_batch(engine_, input.c_str()) : found.dimensions[0];
    if (batch < 1 || batch > 1 << 16) refuse("has no batch that can be used");
    return batch;
  }

  void require_count(size_t count) {
    if (functions_.num_tensors(engine_) != static_cast<int32_t>(count)) refuse("has other tensors than spec.json says");
  }

  void set_shape(const std::string &input, const std::vector<int64_t> &shape) {
    check(named(input), input, true, ODTRT_ENGINE_FLOAT32);
    if (!functions_.set_shape(engine_, input.c_str(), static_cast<int32_t>(shape.size()), shape.data(), said_,
                              sizeof said_)) {
      refuse("does not take the shape of `" + input + "`");
    }
  }

  // Once the shapes of all inputs are set.
  void check_output(const std::string &output, const std::vector<int64_t> &shape, int32_t dtype) {
    check(named(output), output, false, dtype);
    odtrt_engine_tensor found{};
    functions_.shape(engine_, output.c_str(), &found);
    const bool is_same = found.num_dimensions == static_cast<int32_t>(shape.size()) &&
                         std::equal(shape.begin(), shape.end(), found.dimensions);
    if (!is_same) refuse("has `" + output + "` in another shape than spec.json says");
  }

  void set_address(const std::string &name, void *address) {
    if (!functions_.set_address(engine_, name.c_str(), address, said_, sizeof said_)) {
      refuse("does not take the address of `" + name + "`");
    }
  }

  void enqueue(cudaStream_t stream) {
    if (!functions_.enqueue(engine_, stream, said_, sizeof said_)) refuse("cannot run it");
  }

 private:
  odtrt_engine_tensor named(const std::string &name) {
    for (int32_t i = 0; i < functions_.num_tensors(engine_); ++i) {
      odtrt_engine_tensor found{};
      functions_.tensor(engine_, i, &found);
      if (name == found.name) return found;
    }
    refuse("has no tensor `" + name + "`");
  }

  void check(const odtrt_engine_tensor &found, const std::string &name, bool is_input, int32_t dtype) {
    if ((found.is_input != 0) != is_input || found.dtype != dtype || found.num_dimensions < 1) {
      refuse("has `" + name + "` as another kind of tensor than spec.json says");
    }
  }

  [[noreturn]] void refuse(const std::string &what) {
    const std::string reason = said_[0] == '\0' ? "" : ": " + one_line(said_);
    said_[0] = '\0';
    fail(ODTRT_NETWORK_FAILED, who_ + " " + what + reason + "; run `odtrt doctor`, or `odtrt build` again");
  }

  const odtrt_engine_function_table &functions_;
  const std::string who_;
  odtrt_engine *engine_ = nullptr;
  char said_[800] = "";
};

// Where the four arrays of detections are in a block of memory.
struct Layout {
  size_t batch, most;
  size_t count = 0, boxes, scores, classes, size;

  Layout(size_t pictures, size_t detections) : batch(pictures), most(detections) {
    boxes = after(count, 4 * batch);
    scores = after(boxes, 16 * batch * most);
    classes = after(scores, 4 * batch * most);
    size = after(classes, 4 * batch * most);
  }

  // The arrays without the gaps between them.
  std::string content(const char *block) const {
    return std::string(block + count, 4 * batch) + std::string(block + boxes, 16 * batch * most) +
           std::string(block + scores, 4 * batch * most) + std::string(block + classes, 4 * batch * most);
  }

 private:
  static size_t after(size_t start, size_t bytes) {
    return (start + bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
};

struct Stream {
  cudaStream_t handle = nullptr;
  Stream() { require(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() { cudaStreamDestroy(handle); }
};

struct Graph {
  int32_t height, width;
  int64_t pitch;
  bool is_bgr;
  cudaGraphExec_t executable;

  bool is_of(const Picture &picture) const {
    return height == picture.frame.image_height && width == picture.frame.image_width && pitch == picture.pitch &&
           is_bgr == picture.is_bgr;
  }
};

// What belongs to one picture at a time. On a discrete GPU the picture is copied to `frame`; on a Jetson, whose GPU has
// the host's memory, the kernel reads it where it is.
struct Slot {
  Memory picture, frame, windows, results;
  cudaEvent_t done = nullptr;
  std::list<Graph> graphs;  // the most recently used first

  Slot(const Layout &layout, size_t batch)
      : windows(Memory::Kind::kHost, 16 * batch), results(Memory::Kind::kHost, layout.size) {
    require(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  }
  Slot(Slot &&other) noexcept
      : picture(std::move(other.picture)),
        frame(std::move(other.frame)),
        windows(std::move(other.windows)),
        results(std::move(other.results)),
        done(std::exchange(other.done, nullptr)),
        graphs(std::move(other.graphs)) {}
  Slot &operator=(Slot &&) = delete;
  ~Slot() {
    forget_graphs();
    if (done != nullptr) cudaEventDestroy(done);
  }

  void forget_graphs() {
    for (const Graph &graph : graphs) cudaGraphExecDestroy(graph.executable);
    graphs.clear();
  }
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(const Model &model, const TensorRt &trt, const Passport &passport, const std::string &plugin,
              int num_slots)
      : model_(model),
        is_fused_(passport.is_fused()),
        is_integrated_(is_integrated()),
        who_("TensorRT " + trt.version + ", plan " + passport.fingerprint + ", " + passport.precision),
        engine_(trt, model.folder + "/plans/" + passport.plan + ": TensorRT " + trt.version, passport, plugin,
                read_plan(model.folder, passport)),
        batch_(static_cast<size_t>(engine_.batch(model.input.name))),
        layout_(batch_, static_cast<size_t>(model.postprocess.max_total_detections)) {
    try {
      bind();
      for (int i = 0; i < num_slots; ++i) slots_.emplace_back(layout_, batch_);
      run_once();
    } catch (...) {
      cudaStreamSynchronize(stream_.handle);  // the network may be running
      throw;
    }
  }

  ~CudaBackend() override { cudaStreamSynchronize(stream_.handle); }

  uint8_t *picture(int index, size_t size) override {
    Slot &slot = at(index);
    if (slot.picture.size() < size) {
      slot.forget_graphs();
      slot.picture = Memory();
      slot.frame = Memory();
      slot.picture = Memory(Memory::Kind::kHost, size);
      if (!is_integrated_) slot.frame = Memory(Memory::Kind::kDevice, size);
    }
    return slot.picture.host<uint8_t>();
  }

  void start(int index, const Picture &picture) override {
    try {
      launch(at(index), picture);
    } catch (...) {
      cudaStreamSynchronize(stream_.handle);  // what was enqueued before reads the slot
      throw;
    }
  }

  bool wait(int index, Deadline deadline) override {
    const auto started = std::chrono::steady_clock::now();
    while (true) {
      const cudaError_t status = cudaEventQuery(at(index).done);
      if (status != cudaErrorNotReady) return true;  // an error too: `found` reports it
      cudaGetLastError();  // it was no error
      const auto now = std::chrono::steady_clock::now();
      if (deadline && now >= *deadline) return false;
      if (now - started > kSpinning) std::this_thread::sleep_for(kNap);
    }
  }

  Found found(int index) override {
    const Slot &slot = at(index);
    require(cudaEventQuery(slot.done), "a picture's work");
    const Memory &results = slot.results;
    return {*results.host<int32_t>(layout_.count), results.host<float>(layout_.boxes),
            results.host<float>(layout_.scores), results.host<int32_t>(layout_.classes)};
  }

  std::string description() override {
    return who_ + (is_fused_ ? ", post-processing inside the plan, " : ", post-processing on the GPU, ") +
           (why_no_graph_.empty() ? "a CUDA graph for each size of pictures"
                                  : "without a CUDA graph, because " + why_no_graph_);
  }

 private:
  Slot &at(int slot) { return slots_[static_cast<size_t>(slot)]; }
  size_t input_bytes() const {
    return size_t{12} * static_cast<size_t>(model_.input.height) * static_cast<size_t>(model_.input.width);
  }
  bool takes_windows() const { return model_.input.is_padded; }

  void launch(Slot &slot, const Picture &picture) {
    write_windows(slot, picture.frame);
    const auto found = std::find_if(slot.graphs.begin(), slot.graphs.end(),
                                    [&](const Graph &graph) { return graph.is_of(picture); });
    if (found != slot.graphs.end()) {
      slot.graphs.splice(slot.graphs.begin(), slot.graphs, found);
      require(cudaGraphLaunch(found->executable, stream_.handle), "cudaGraphLaunch");
    } else {
      enqueue(slot, picture);
      if (why_no_graph_.empty()) record(slot, picture);
    }
    require(cudaEventRecord(slot.done, stream_.handle), "cudaEventRecord");
  }

  // Allocates what all pictures share and gives TensorRT the addresses, which stay: a graph of the network holds them.
  void bind() {
    const odtrt_postprocess_params &params = model_.postprocess;
    const auto batch = static_cast<int64_t>(batch_);
    const int64_t n = params.num_anchors, columns = params.num_columns, most = params.max_total_detections;
    const bool has_windows = is_fused_ && takes_windows();
    engine_.require_count(1 + (has_windows ? 1 : 0) + (is_fused_ ? 4 : 2));
    input_ = Memory(Memory::Kind::kDevice, batch_ * input_bytes());
    engine_.set_shape(model_.input.name, {batch, 3, model_.input.height, model_.input.width});
    engine_.set_address(model_.input.name, input_.device<void>());
    if (has_windows) {
      windows_ = Memory(Memory::Kind::kDevice, 16 * batch_);
      engine_.set_shape("clip_windows", {batch, 4});
      engine_.set_address("clip_windows", windows_.device<void>());
    }
    if (is_fused_) {
      detections_ = Memory(Memory::Kind::kDevice, layout_.size);
      output("num_detections", {batch}, ODTRT_ENGINE_INT32, detections_, layout_.count);
      output("boxes", {batch, most, 4}, ODTRT_ENGINE_FLOAT32, detections_, layout_.boxes);
      output("scores", {batch, most}, ODTRT_ENGINE_FLOAT32, detections_, layout_.scores);
      output("classes", {batch, most}, ODTRT_ENGINE_INT32, detections_, layout_.classes);
      return;
    }
    encodings_ = Memory(Memory::Kind::kDevice, batch_ * static_cast<size_t>(16 * n));
    logits_ = Memory(Memory::Kind::kDevice, batch_ * static_cast<size_t>(4 * n * columns));
    output(model_.box_encodings, {batch, n, 4}, ODTRT_ENGINE_FLOAT32, encodings_, 0);
    output(model_.class_logits, {batch, n, columns}, ODTRT_ENGINE_FLOAT32, logits_, 0);
    workspace_ = Memory(Memory::Kind::kDevice, std::max<size_t>(16, workspace_bytes()));
    anchors_ = Memory(Memory::Kind::kDevice, 4 * model_.anchors.size());
    require(cudaMemcpyAsync(anchors_.device<void>(), model_.anchors.data(), 4 * model_.anchors.size(),
                            cudaMemcpyHostToDevice, stream_.handle),
            "cudaMemcpyAsync");
    require(cudaStreamSynchronize(stream_.handle), "cudaStreamSynchronize");
  }

  size_t workspace_bytes() const {
    return odtrt_postprocess_workspace(&model_.postprocess, static_cast<int32_t>(batch_));
  }

  void output(const std::string &name, const std::vector<int64_t> &shape, int32_t dtype, const Memory &memory,
              size_t offset) {
    engine_.check_output(name, shape, dtype);
    engine_.set_address(name, memory.device<void>(offset));
  }

  // A black picture through every step: TensorRT and the kernels load now what they would load at the first picture.
  void run_once() {
    const Frame frame{model_.input.height, model_.input.width, model_.input.height, model_.input.width};
    const int64_t pitch = int64_t{3} * frame.image_width;
    picture(0, static_cast<size_t>(pitch) * static_cast<size_t>(frame.image_height));
    write_windows(at(0), frame);
    enqueue(at(0), {frame, pitch, false});
    require(cudaStreamSynchronize(stream_.handle), "the plan's first run");
  }

  void write_windows(Slot &slot, const Frame &frame) {
    const float window[4] = {0, 0,
                             static_cast<float>(static_cast<double>(frame.true_height) / model_.input.height),
                             static_cast<float>(static_cast<double>(frame.true_width) / model_.input.width)};
    for (size_t i = 0; i < batch_; ++i) std::memcpy(slot.windows.host<float>() + 4 * i, window, sizeof window);
  }

  // All steps of one picture, as a graph records them.
  void enqueue(Slot &slot, const Picture &picture) {
    const uint8_t *source = slot.picture.device<uint8_t>();
    if (!is_integrated_) {
      const auto size = static_cast<size_t>((int64_t{picture.frame.image_height} - 1) * picture.pitch +
                                            int64_t{3} * picture.frame.image_width);
      copy(slot.frame.device<void>(), slot.picture.host<void>(), size, cudaMemcpyHostToDevice);
      source = slot.frame.device<uint8_t>();
    }
    const odtrt_preprocess_params params =
        preprocess_params(model_.input, picture.frame, picture.pitch, picture.is_bgr);
    for (size_t i = 0; i < batch_; ++i) {
      require_ok(odtrt_preprocess_cuda(&params, source, input_.device<void>(i * input_bytes()), stream_.handle),
                 "preprocessing");
    }
    if (windows_.size() != 0) {
      copy(windows_.device<void>(), slot.windows.host<void>(), slot.windows.size(), cudaMemcpyHostToDevice);
    }
    engine_.enqueue(stream_.handle);
    if (is_fused_)
      copy(slot.results.host<void>(), detections_.device<void>(), layout_.size, cudaMemcpyDeviceToHost);
    else
      enqueue_postprocess(slot);
  }

  void enqueue_postprocess(Slot &slot) {
    const odtrt_heads heads = {encodings_.device<void>(), logits_.device<void>(), ODTRT_FLOAT32,
                               anchors_.device<float>(),
                               takes_windows() ? slot.windows.device<float>() : nullptr};
    const odtrt_detections out = {slot.results.device<int32_t>(layout_.count),
                                  slot.results.device<float>(layout_.boxes),
                                  slot.results.device<float>(layout_.scores),
                                  slot.results.device<int32_t>(layout_.classes), nullptr};
    require_ok(odtrt_postprocess_cuda(&model_.postprocess, static_cast<int32_t>(batch_), &heads, &out,
                                      workspace_.device<void>(), workspace_.size(), stream_.handle),
               "post-processing");
  }

  void copy(void *target, const void *source, size_t size, cudaMemcpyKind kind) {
    require(cudaMemcpyAsync(target, source, size, kind, stream_.handle), "cudaMemcpyAsync");
  }

  // Records the picture that has just been enqueued, and keeps the graph if a launch gives the same bits.
  //
  // A step that refuses to be recorded would be missing, and the graph would give an earlier picture's results for
  // ever. So all that the steps write is overwritten before this launch.
  void record(Slot &slot, const Picture &picture) {
    require(cudaStreamSynchronize(stream_.handle), "a picture's work");
    const std::string expected = layout_.content(slot.results.host<char>());
    cudaGraphExec_t executable = nullptr;
    try {
      executable = captured(slot, picture);
      for (const Memory *written : {&input_, &windows_, &encodings_, &logits_, &detections_}) {
        if (written->size() == 0) continue;
        require(cudaMemsetAsync(written->device<void>(), 0xFF, written->size(), stream_.handle), "cudaMemsetAsync");
      }
      std::memset(slot.results.host<void>(), 0xFF, slot.results.size());
      require(cudaGraphLaunch(executable, stream_.handle), "cudaGraphLaunch");
      require(cudaStreamSynchronize(stream_.handle), "a CUDA graph");
      if (layout_.content(slot.results.host<char>()) != expected) {
        fail(ODTRT_NETWORK_FAILED, "a CUDA graph finds something else than its steps");
      }
    } catch (const Failure &failure) {
      if (executable != nullptr) cudaGraphExecDestroy(executable);
      why_no_graph_ = one_line(failure.text);
      enqueue(slot, picture);
      return;
    }
    slot.graphs.push_front({picture.frame.image_height, picture.frame.image_width, picture.pitch, picture.is_bgr,
                            executable});
    if (slot.graphs.size() > kMaxGraphsOfASlot) {
      cudaGraphExecDestroy(slot.graphs.back().executable);
      slot.graphs.pop_back();
    }
  }

  cudaGraphExec_t captured(Slot &slot, const Picture &picture) {
    require(cudaStreamBeginCapture(stream_.handle, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    cudaGraph_t recorded = nullptr;
    try {
      enqueue(slot, picture);
    } catch (...) {  // the capture must be ended all the same, or the stream stays useless
      cudaStreamEndCapture(stream_.handle, &recorded);
      cudaGetLastError();
      if (recorded != nullptr) cudaGraphDestroy(recorded);
      throw;
    }
    const cudaError_t ended = cudaStreamEndCapture(stream_.handle, &recorded);
    cudaGraphExec_t executable = nullptr;
    const cudaError_t made =
        ended == cudaSuccess ? cudaGraphInstantiateWithFlags(&executable, recorded, 0) : cudaSuccess;
    if (recorded != nullptr) cudaGraphDestroy(recorded);
    require(ended, "cudaStreamEndCapture");
    require(made, "cudaGraphInstantiateWithFlags");
    if (cudaGraphUpload(executable, stream_.handle) != cudaSuccess) cudaGetLastError();  // it only saves time later
    return executable;
  }

  const Model &model_;
  const bool is_fused_, is_integrated_;
  const std::string who_;
  std::string why_no_graph_;
  Stream stream_;
  Memory input_, windows_, encodings_, logits_, detections_, anchors_, workspace_;  // outlive the engine's context
  Engine engine_;
  const size_t batch_;  // pictures a run; if more than one, all are the same
  const Layout layout_;
  std::vector<Slot> slots_;  // their graphs are destroyed before the engine
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const Model &model, const std::string &plugin, const std::string &plan,
                                           int num_slots) {
  Environment here{machine_with_gpu(), "", std::nullopt};
  const TensorRt trt = find_tensorrt();
  here.version = trt.version;
  if (!plugin.empty()) here.plugin = identify_plugin(plugin);
  Survey present = survey(model.folder);
  std::vector<std::string> reasons = present.damaged;
  if (here.plugin) {
    std::stable_sort(present.passports.begin(), present.passports.end(),
                     [](const Passport &one, const Passport &other) { return one.is_fused() > other.is_fused(); });
  }
  for (const Passport &passport : present.passports) {
    if (!plan.empty() && passport.fingerprint != plan) continue;
    const std::vector<std::string> found = misfits(model, passport, here);
    for (const std::string &reason : found) reasons.push_back("plan " + passport.fingerprint + ": " + reason);
    if (!found.empty()) continue;
    try {
      return std::make_unique<CudaBackend>(model, trt, passport, plugin, num_slots);
    } catch (const Failure &failure) {
      reasons.push_back(failure.text);
    }
  }
  std::string text = model.folder + ": no plan that TensorRT " + trt.version + " can use here";
  if (reasons.empty()) text += plan.empty() ? ": there is none; run `odtrt build`" : ": there is no plan " + plan;
  for (size_t i = 0; i < reasons.size(); ++i) text += (i == 0 ? ": " : "; ") + reasons[i];
  fail(ODTRT_NO_PLAN, text);
}

}  // namespace odtrt
