// A TensorRT whose plans hold raw heads. Its network adds the first number of the input to box_encodings, and the one
// in the middle to class_logits. A plan is a Header, the anchors, box_encodings and class_logits of one picture.
#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

#include "NvInferRuntime.h"
#include "odtrt.h"

using namespace nvinfer1;

namespace {

struct Header {
  char tensorrt[28];
  int32_t is_fused, is_padded, batch, min_batch, height, width;  // batch: 0: dynamic
  odtrt_postprocess_params params;
};

struct Plan {
  Header header;
  std::vector<float> anchors, encodings, logits;
};

struct Tensor {
  std::string name;
  bool is_input;
  DataType type;
  std::vector<int64_t> shape;  // behind the batch
};

IErrorRecorder *recorder = nullptr;
bool is_plugin_loaded = false;

bool report(const char *text) {
  if (recorder != nullptr) recorder->reportError(ErrorCode::kUNSPECIFIED_ERROR, text);
  return false;
}

bool is_set(const char *name) { return stand_in_setting(name)[0] != '\0'; }

std::vector<Tensor> tensors_of(const Header &header) {
  const int64_t n = header.params.num_anchors, most = header.params.max_total_detections;
  std::vector<Tensor> all = {{"image", true, DataType::kFLOAT, {3, header.height, header.width}}};
  if (!header.is_fused) {
    all.push_back({"box_encodings", false, DataType::kFLOAT, {n, 4}});
    all.push_back({"class_logits", false, is_set("STAND_IN_HALF_HEADS") ? DataType::kHALF : DataType::kFLOAT,
                   {n, header.params.num_columns}});
    return all;
  }
  if (header.is_padded) all.push_back({"clip_windows", true, DataType::kFLOAT, {4}});
  all.push_back({"num_detections", false, DataType::kINT32, {}});
  all.push_back({"boxes", false, DataType::kFLOAT, {most, 4}});
  all.push_back({"scores", false, DataType::kFLOAT, {most}});
  all.push_back({"classes", false, DataType::kINT32, {most}});
  return all;
}

class Context final : public IExecutionContext {
 public:
  explicit Context(const Plan &plan) : plan_(plan), tensors_(tensors_of(plan.header)) {
    addresses_.resize(tensors_.size());
  }
  void setErrorRecorder(IErrorRecorder *given) noexcept override { recorder = given; }
  bool setInputShape(const char *name, const Dims &shape) noexcept override {
    if (plan_.header.batch != 0 && shape.d[0] != plan_.header.batch) return report("no such batch");
    batch_ = static_cast<size_t>(shape.d[0]);
    const Tensor &tensor = tensors_[place(name)];
    for (size_t i = 0; i < tensor.shape.size(); ++i) {
      if (shape.d[i + 1] != tensor.shape[i]) return report("no such shape");
    }
    return true;
  }
  Dims getTensorShape(const char *name) const noexcept override {
    return dims(tensors_[place(name)], static_cast<int64_t>(batch_));
  }
  bool setTensorAddress(const char *name, void *address) noexcept override {
    addresses_[place(name)] = address;
    return true;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    if (is_set("STAND_IN_RUN_FAILS")) return report("CUDA initialization failure");
    if (stand_in_is_capturing(stream) && is_set("STAND_IN_REFUSES_CAPTURE")) return report("not while capturing");
    if (stand_in_is_capturing(stream) && is_set("STAND_IN_RECORDS_NOTHING")) return true;
    stand_in_enqueue(stream, [this] { run(); });
    return true;
  }

  static Dims dims(const Tensor &tensor, int64_t batch) {
    Dims found{};
    found.nbDims = static_cast<int32_t>(tensor.shape.size()) + 1;
    using Size = std::remove_reference_t<decltype(found.d[0])>;
    found.d[0] = static_cast<Size>(batch);
    for (size_t i = 0; i < tensor.shape.size(); ++i) found.d[i + 1] = static_cast<Size>(tensor.shape[i]);
    return found;
  }

 private:
  size_t place(const char *name) const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i].name == name) return i;
    }
    std::abort();
  }

  template <typename Value>
  Value *reach(const char *name) {
    const Tensor &tensor = tensors_[place(name)];
    size_t count = batch_;
    for (const int64_t size : tensor.shape) count *= static_cast<size_t>(size);
    return static_cast<Value *>(stand_in_reach(addresses_[place(name)], 4 * count));
  }

  void run() {
    const Header &header = plan_.header;
    const float *image = reach<float>("image");
    const size_t image_size = size_t{3} * static_cast<size_t>(header.height) * static_cast<size_t>(header.width);
    std::vector<float> encodings, logits;
    for (size_t i = 0; i < batch_; ++i) {
      for (const float value : plan_.encodings) encodings.push_back(value + image[i * image_size]);
      for (const float value : plan_.logits) logits.push_back(value + image[i * image_size + image_size / 2]);
    }
    if (!header.is_fused) {
      std::memcpy(reach<float>("box_encodings"), encodings.data(), 4 * encodings.size());
      std::memcpy(reach<float>("class_logits"), logits.data(), 4 * logits.size());
      return;
    }
    const odtrt_heads heads = {encodings.data(), logits.data(), ODTRT_FLOAT32, plan_.anchors.data(),
                               header.is_padded ? reach<float>("clip_windows") : nullptr};
    const odtrt_detections out = {reach<int32_t>("num_detections"), reach<float>("boxes"), reach<float>("scores"),
                                  reach<int32_t>("classes"), nullptr};
    odtrt_postprocess_cpu(&header.params, static_cast<int32_t>(batch_), &heads, &out, 1);
  }

  const Plan &plan_;
  const std::vector<Tensor> tensors_;
  std::vector<void *> addresses_;
  size_t batch_ = 0;
};

class Engine final : public ICudaEngine {
 public:
  explicit Engine(Plan plan) : plan_(std::move(plan)), tensors_(tensors_of(plan_.header)) {}
  IExecutionContext *createExecutionContext() noexcept override { return new Context(plan_); }
  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(tensors_.size()); }
  const char *getIOTensorName(int32_t i) const noexcept override {
    return tensors_[static_cast<size_t>(i)].name.c_str();
  }
  TensorIOMode getTensorIOMode(const char *name) const noexcept override {
    return named(name).is_input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(const char *name) const noexcept override { return named(name).type; }
  Dims getTensorShape(const char *name) const noexcept override {
    return Context::dims(named(name), plan_.header.batch == 0 ? -1 : plan_.header.batch);
  }
  Dims getProfileShape(const char *name, int32_t, OptProfileSelector select) const noexcept override {
    return Context::dims(named(name), select == OptProfileSelector::kMIN ? plan_.header.min_batch : 16);
  }

 private:
  const Tensor &named(const std::string &name) const {
    for (const Tensor &tensor : tensors_) {
      if (tensor.name == name) return tensor;
    }
    std::abort();
  }

  const Plan plan_;
  const std::vector<Tensor> tensors_;
};

#if STAND_IN_TENSORRT >= 806
class Registry final : public IPluginRegistry {
 public:
  PluginLibraryHandle loadLibrary(const char *path) noexcept override {
    is_plugin_loaded = true;
    return const_cast<char *>(path);
  }
};
#endif

class Runtime final : public IRuntime {
 public:
  ~Runtime() override { is_plugin_loaded = false; }
  ICudaEngine *deserializeCudaEngine(const void *blob, size_t size) noexcept override {
    Plan plan;
    if (size < sizeof plan.header) {
      report("the plan is cut off");
      return nullptr;
    }
    std::memcpy(&plan.header, blob, sizeof plan.header);
#if STAND_IN_TENSORRT >= 806
    if (plan.header.is_fused && !is_plugin_loaded) {
      report("plugin not found");
      return nullptr;
    }
#endif
    const auto n = static_cast<size_t>(plan.header.params.num_anchors);
    const auto *floats = reinterpret_cast<const float *>(static_cast<const char *>(blob) + sizeof plan.header);
    plan.anchors.assign(floats, floats + 4 * n);
    plan.encodings.assign(floats + 4 * n, floats + 8 * n);
    plan.logits.assign(floats + 8 * n, floats + (8 + static_cast<size_t>(plan.header.params.num_columns)) * n);
    return new Engine(plan);
  }
  void setErrorRecorder(IErrorRecorder *given) noexcept override { recorder = given; }
#if STAND_IN_TENSORRT >= 806
  IPluginRegistry &getPluginRegistry() noexcept override { return registry_; }
  void setEngineHostCodeAllowed(bool) noexcept override {}

 private:
  Registry registry_;
#endif
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void *createInferRuntime_INTERNAL(void *, int32_t version) {
  return version == NV_TENSORRT_VERSION ? new Runtime : nullptr;
}
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() { return NV_TENSORRT_VERSION; }
