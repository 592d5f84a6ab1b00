// A plan in TensorRT, 8.5 to 11, behind the plain functions of engine.h. libnvinfer is not linked: the caller loads it.
// Only calls that all of these versions have are used; the one difference is how a plugin's library is loaded.
#include "engine.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>

#define ODTRT_TENSORRT_SINCE(major, minor) (NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= (major) * 100 + (minor))

namespace {

// TensorRT's errors. It logs none while it has an error recorder, so this is both.
class Messages final : public nvinfer1::ILogger, public nvinfer1::IErrorRecorder {
 public:
  void log(Severity severity, const char *text) noexcept override {
    if (severity <= Severity::kERROR) add(text);
  }
  int32_t getNbErrors() const noexcept override { return count_.load() == 0 ? 0 : 1; }
  nvinfer1::ErrorCode getErrorCode(int32_t) const noexcept override {
    return nvinfer1::ErrorCode::kUNSPECIFIED_ERROR;
  }
  ErrorDesc getErrorDesc(int32_t) const noexcept override { return "see the detector's error"; }
  bool hasOverflowed() const noexcept override { return false; }
  void clear() noexcept override { take(); }
  bool reportError(nvinfer1::ErrorCode, ErrorDesc text) noexcept override {
    add(text);
    return true;
  }
  RefCount incRefCount() noexcept override { return ++references_; }
  RefCount decRefCount() noexcept override { return --references_; }

  // What was said since the last call, on one line.
  std::string take() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string said;
    said.swap(text_);
    count_ = 0;
    return said;
  }

 private:
  void add(const char *text) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      if (text != nullptr && text_.size() < 600) text_ += (text_.empty() ? "" : "; ") + std::string(text);
      ++count_;
    } catch (...) {
    }
  }

  std::mutex mutex_;
  std::string text_;
  std::atomic<int32_t> count_{0};
  std::atomic<RefCount> references_{0};
};

// TensorRT uses it until its last object is gone, whichever thread destroys that; so it is never destroyed.
Messages &messages() {
  static Messages *const kept = new Messages;
  return *kept;
}

int32_t failed(char *error, size_t error_size) {
  std::string said = messages().take();
  if (said.empty()) said = "TensorRT gives no reason";
  if (error != nullptr && error_size != 0) {
    const size_t length = said.size() < error_size ? said.size() : error_size - 1;
    std::memcpy(error, said.data(), length);
    error[length] = '\0';
  }
  return 0;
}

odtrt_engine_dtype dtype_of(nvinfer1::DataType type) {
  if (type == nvinfer1::DataType::kFLOAT) return ODTRT_ENGINE_FLOAT32;
  return type == nvinfer1::DataType::kINT32 ? ODTRT_ENGINE_INT32 : ODTRT_ENGINE_OTHER;
}

void describe(const nvinfer1::Dims &shape, odtrt_engine_tensor *tensor) {
  const bool fits = shape.nbDims >= 0 && shape.nbDims <= ODTRT_ENGINE_MAX_DIMENSIONS;
  tensor->num_dimensions = fits ? shape.nbDims : -1;
  for (int32_t i = 0; i < tensor->num_dimensions; ++i) tensor->dimensions[i] = shape.d[i];
}

}  // namespace

struct odtrt_engine {
  // Destroyed from the last to the first, as TensorRT wants it.
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::unique_ptr<nvinfer1::IExecutionContext> context;
};

namespace {

bool load_plugin(nvinfer1::IRuntime &runtime, const char *plugin) {
#if ODTRT_TENSORRT_SINCE(8, 6)
  // Into the runtime's own registry, which unloads it with the runtime. It refuses a plugin that the process has loaded
  // already, so only the plan's deserialisation tells whether it is there.
  runtime.getPluginRegistry().loadLibrary(plugin);
  return true;
#else
  (void)runtime;
  return dlopen(plugin, RTLD_NOW | RTLD_GLOBAL) != nullptr;  // it registers itself
#endif
}

odtrt_engine *load(void *nvinfer, const char *plugin, const void *plan, size_t plan_size,
                   int32_t is_version_compatible, char *error, size_t error_size) {
  messages().take();
  const auto make = reinterpret_cast<void *(*)(void *, int32_t)>(dlsym(nvinfer, "createInferRuntime_INTERNAL"));
  auto made = std::make_unique<odtrt_engine>();
  if (make != nullptr) {
    made->runtime.reset(static_cast<nvinfer1::IRuntime *>(
        make(static_cast<nvinfer1::ILogger *>(&messages()), NV_TENSORRT_VERSION)));
  }
  if (!made->runtime) {
    failed(error, error_size);
    return nullptr;
  }
  made->runtime->setErrorRecorder(&messages());
#if ODTRT_TENSORRT_SINCE(8, 6)
  if (is_version_compatible) made->runtime->setEngineHostCodeAllowed(true);  // the lean runtime inside the plan
#else
  (void)is_version_compatible;
#endif
  const bool has_plugin = plugin == nullptr || load_plugin(*made->runtime, plugin);
  if (has_plugin) made->engine.reset(made->runtime->deserializeCudaEngine(plan, plan_size));
  if (made->engine) made->context.reset(made->engine->createExecutionContext());
  if (!made->context) {
    failed(error, error_size);
    return nullptr;
  }
  made->context->setErrorRecorder(&messages());
  return made.release();
}

int32_t num_tensors(const odtrt_engine *engine) { return engine->engine->getNbIOTensors(); }

void tensor(const odtrt_engine *engine, int32_t i, odtrt_engine_tensor *tensor) {
  tensor->name = engine->engine->getIOTensorName(i);
  tensor->is_input = engine->engine->getTensorIOMode(tensor->name) == nvinfer1::TensorIOMode::kINPUT;
  tensor->dtype = dtype_of(engine->engine->getTensorDataType(tensor->name));
  describe(engine->engine->getTensorShape(tensor->name), tensor);
}

int64_t min_batch(const odtrt_engine *engine, const char *input) {
  const nvinfer1::Dims shape = engine->engine->getProfileShape(input, 0, nvinfer1::OptProfileSelector::kMIN);
  return shape.nbDims < 1 ? 0 : shape.d[0];
}

int32_t set_shape(odtrt_engine *engine, const char *input, int32_t num_dimensions, const int64_t *dimensions,
                  char *error, size_t error_size) {
  nvinfer1::Dims shape{};
  shape.nbDims = num_dimensions;
  for (int32_t i = 0; i < num_dimensions; ++i) {
    shape.d[i] = static_cast<std::remove_reference_t<decltype(shape.d[0])>>(dimensions[i]);  // 32 bits before 10
  }
  return engine->context->setInputShape(input, shape) ? 1 : failed(error, error_size);
}

void shape(odtrt_engine *engine, const char *name, odtrt_engine_tensor *tensor) {
  describe(engine->context->getTensorShape(name), tensor);
}

int32_t set_address(odtrt_engine *engine, const char *name, void *address, char *error, size_t error_size) {
  return engine->context->setTensorAddress(name, address) ? 1 : failed(error, error_size);
}

int32_t enqueue(odtrt_engine *engine, void *stream, char *error, size_t error_size) {
  return engine->context->enqueueV3(static_cast<cudaStream_t>(stream)) ? 1 : failed(error, error_size);
}

void close_engine(odtrt_engine *engine) { delete engine; }

// Nothing that TensorRT or the library throws may leave a function of the table.
template <auto function>
struct Guarded;

template <typename Result, typename... Arguments, Result (*function)(Arguments...)>
struct Guarded<function> {
  static Result call(Arguments... arguments) noexcept {
    try {
      return function(arguments...);
    } catch (...) {
      return Result();
    }
  }
};

}  // namespace

const odtrt_engine_function_table *odtrt_engine_functions(void) {
  static constexpr odtrt_engine_function_table kTable = {
      ODTRT_ENGINE_ABI_VERSION,
      NV_TENSORRT_MAJOR,
      Guarded<load>::call,
      Guarded<num_tensors>::call,
      Guarded<tensor>::call,
      Guarded<min_batch>::call,
      Guarded<set_shape>::call,
      Guarded<shape>::call,
      Guarded<set_address>::call,
      Guarded<enqueue>::call,
      Guarded<close_engine>::call,
  };
  return &kTable;
}
