// OdtrtDetect: the OD API's post-processing as a TensorRT plugin, from raw heads to detections.
//
// namespace "odtrt", version "1"
//   inputs   box_encodings  float32 or float16 [B, N, 4]
//            class_logits   the same type      [B, N, columns]
//            anchors        float32            [N, 4]
//            clip_windows   float32            [B, 4]; left out: 0, 0, 1, 1 for every image
//   outputs  num_detections int32 [B], boxes float32 [B, M, 4], scores float32 [B, M], classes int32 [B, M]
// All linear. Attributes: kAttributes below, the fields of odtrt_postprocess_params that no shape gives.
// What each means, and every arithmetic step, is in ../kernels/odtrt.h and semantics.h.
//
// One source, two faces, chosen by the headers:
//   TensorRT 10 and newer  IPluginV3. Its binary interface is the same from 10.0 to 11: one build serves all.
//   TensorRT 8.5 to 9      IPluginV2DynamicExt. One build for each version of TensorRT.
// The library is not linked to libnvinfer. A plugin registry loads it and calls its exported functions; only
// 8.5's cannot load libraries, so with those headers the plugin registers itself.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "../kernels/odtrt.h"

#define ODTRT_PLUGIN_V3 (NV_TENSORRT_MAJOR >= 10)
#define ODTRT_REGISTRY_LOADS_LIBRARIES (NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 806)

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr char kName[] = "OdtrtDetect";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "odtrt";

enum Input { kBoxEncodings, kClassLogits, kAnchors, kClipWindows };
enum Output { kNumDetections, kBoxes, kScores, kClasses, kNumOutputs };
constexpr int32_t kMinInputs = kClipWindows, kMaxInputs = kClipWindows + 1;

// ---- Messages -------------------------------------------------------------------------------------------

std::atomic<void *> logger_finder{nullptr};

// The index of ILoggerFinder::findLogger, and of ILogger::log, in their tables of virtual functions. TensorRT 11 put
// four entries in front of them. So a binary for 10 and 11 must look up the version of the library that `finder`
// belongs to, and call by index. -1: the library is not known.
int32_t place_of_own_function(void *finder) {
#if !ODTRT_PLUGIN_V3
  (void)finder;
  return 0;
#else
  Dl_info owner;
  if (dladdr(*static_cast<void **>(finder), &owner) == 0 || owner.dli_fname == nullptr) return -1;
  void *library = dlopen(owner.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return -1;
  const auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
  const int32_t number = version == nullptr ? 0 : version();  // major * 10000 + minor * 100 + patch
  dlclose(library);
  const bool is_rtx = std::strstr(owner.dli_fname, "tensorrt_rtx") != nullptr;
  if (is_rtx) return number >= 10700 ? 4 : -1;
  return number >= 110000 ? 4 : number >= 100000 ? 0 : -1;
#endif
}

template <typename Function>
Function virtual_function(void *object, int32_t place) {
  return reinterpret_cast<Function>((*static_cast<void ***>(object))[place]);
}

// Writes to the log of the TensorRT that called the plugin, or to stderr if there is none.
void log_error(const char *message) noexcept {
  constexpr int32_t kError = 1;
  void *finder = logger_finder.load();
  const int32_t place = finder == nullptr ? -1 : place_of_own_function(finder);
  void *logger = nullptr;
  try {
    if (place >= 0) logger = virtual_function<void *(*)(void *)>(finder, place)(finder);
  } catch (...) {
  }
  if (logger == nullptr)
    std::fprintf(stderr, "%s\n", message);
  else
    virtual_function<void (*)(void *, int32_t, const char *)>(logger, place)(logger, kError, message);
}

__attribute__((format(printf, 1, 2))) bool refuse(const char *format, ...) noexcept {
  char message[512];
  const int start = std::snprintf(message, sizeof message, "%s: ", kName);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + start, sizeof message - start, format, arguments);
  va_end(arguments);
  log_error(message);
  return false;
}

// ---- Attributes -----------------------------------------------------------------------------------------

struct Attribute {
  const char *name;
  PluginFieldType type;
  int32_t length;
  size_t offset;  // in odtrt_postprocess_params
  int32_t lowest, highest;
};

constexpr Attribute kAttributes[] = {
#define ODTRT_INT(name, lowest, highest) \
  {#name, PluginFieldType::kINT32, 1, offsetof(odtrt_postprocess_params, name), lowest, highest}
#define ODTRT_FLOAT(name, length) \
  {#name, PluginFieldType::kFLOAT32, length, offsetof(odtrt_postprocess_params, name), 0, 0}
    ODTRT_INT(background_column, 0, 1),
    ODTRT_INT(score_converter, ODTRT_SIGMOID, ODTRT_IDENTITY),
    ODTRT_FLOAT(logit_factor, 1),
    ODTRT_FLOAT(box_scales, 4),
    ODTRT_FLOAT(score_threshold, 1),
    ODTRT_FLOAT(iou_threshold, 1),
    ODTRT_INT(max_detections_per_class, 1, INT32_MAX),
    ODTRT_INT(max_total_detections, 1, 4096),
    ODTRT_INT(class_agnostic, 0, 1),
    ODTRT_INT(change_coordinate_frame, 0, 1),
#undef ODTRT_INT
#undef ODTRT_FLOAT
};

// The attributes with their values in `params`; if that is nullptr, only their names and types.
std::vector<PluginField> fields_of(const odtrt_postprocess_params *params) {
  std::vector<PluginField> fields;
  for (const Attribute &attribute : kAttributes) {
    const void *value =
        params == nullptr ? nullptr : reinterpret_cast<const char *>(params) + attribute.offset;
    fields.emplace_back(attribute.name, value, attribute.type, attribute.length);
  }
  return fields;
}

PluginFieldCollection collection_of(const std::vector<PluginField> &fields) {
  PluginFieldCollection collection{};
  collection.nbFields = static_cast<int32_t>(fields.size());
  collection.fields = fields.data();
  return collection;
}

const PluginFieldCollection *field_names() {
  static const std::vector<PluginField> fields = fields_of(nullptr);
  static const PluginFieldCollection collection = collection_of(fields);
  return &collection;
}

bool read_attribute(const Attribute &attribute, const PluginField &field, odtrt_postprocess_params *params) {
  if (field.type != attribute.type || field.length != attribute.length || field.data == nullptr)
    return refuse("attribute %s has field type %d and length %d, expected type %d (%s) and length %d",
                  attribute.name, static_cast<int>(field.type), field.length,
                  static_cast<int>(attribute.type),
                  attribute.type == PluginFieldType::kINT32 ? "int32" : "float32", attribute.length);
  std::memcpy(reinterpret_cast<char *>(params) + attribute.offset, field.data, 4u * attribute.length);
  if (attribute.type != PluginFieldType::kINT32) return true;
  int32_t value;
  std::memcpy(&value, field.data, sizeof value);
  if (value < attribute.lowest || value > attribute.highest)
    return refuse("attribute %s is %d, expected %d to %d", attribute.name, value, attribute.lowest,
                  attribute.highest);
  return true;
}

bool read_attributes(const PluginFieldCollection *given, odtrt_postprocess_params *params) {
  *params = {};
  for (const Attribute &attribute : kAttributes) {
    const PluginField *found = nullptr;
    for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i)
      if (given->fields[i].name != nullptr && std::strcmp(given->fields[i].name, attribute.name) == 0)
        found = &given->fields[i];
    if (found == nullptr)
      return refuse("attribute %s is missing; make the model again with odtrt_lib.fuse", attribute.name);
    if (!read_attribute(attribute, *found, params)) return false;
  }
  return true;
}

// ---- What both faces share ------------------------------------------------------------------------------

std::string text_of(const Dims &shape) {
  std::string text = "[";
  for (int32_t i = 0; i < shape.nbDims; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape.d[i]);
  }
  return text + "]";
}

struct Postprocess {
  odtrt_postprocess_params params{};  // num_anchors and num_columns: 0 until shapes are known
  int32_t num_inputs = 0;

  // Reads num_inputs, num_anchors and num_columns from the input shapes. A size of -1 is not known yet.
  bool read_shapes(const Dims *shapes, int32_t count) {
    static const char *const kNames[kMaxInputs] = {"box_encodings", "class_logits", "anchors",
                                                    "clip_windows"};
    if (count < kMinInputs || count > kMaxInputs)
      return refuse("%d inputs, expected box_encodings, class_logits, anchors and, optionally, clip_windows",
                    count);
    const Dims &boxes = shapes[kBoxEncodings], &logits = shapes[kClassLogits];
    const int64_t batch = boxes.nbDims == 3 ? boxes.d[0] : -1, anchors = boxes.nbDims == 3 ? boxes.d[1] : -1;
    const int64_t columns = logits.nbDims == 3 ? logits.d[2] : -1;
    const int64_t expected[kMaxInputs][3] = {
        {batch, anchors, 4}, {batch, anchors, columns}, {anchors, 4, 0}, {batch, 4, 0}};
    for (int32_t i = 0; i < count; ++i) {
      const int32_t rank = i <= kClassLogits ? 3 : 2;
      bool agrees = shapes[i].nbDims == rank;
      for (int32_t axis = 0; agrees && axis < rank; ++axis)
        agrees = shapes[i].d[axis] == expected[i][axis] || shapes[i].d[axis] == -1 || expected[i][axis] == -1;
      if (agrees) continue;
      static const char *const kExpected[kMaxInputs] = {"[B, N, 4]", "[B, N, columns]", "[N, 4]", "[B, 4]"};
      return refuse("input %s has shape %s, expected %s (box_encodings is %s)", kNames[i],
                    text_of(shapes[i]).c_str(), kExpected[i], text_of(boxes).c_str());
    }
    if (anchors > INT32_MAX || columns > INT32_MAX)
      return refuse("box_encodings %s and class_logits %s are too large", text_of(boxes).c_str(),
                    text_of(logits).c_str());
    num_inputs = count;
    params.num_anchors = static_cast<int32_t>(anchors);
    params.num_columns = static_cast<int32_t>(columns);
    return true;
  }

  // As read_shapes, for shapes that are all known, with the largest batch.
  bool read_largest_shapes(const Dims *shapes, int32_t count) {
    if (!read_shapes(shapes, count)) return false;
    if (workspace(shapes[kBoxEncodings].d[0]) > 0) return true;
    return refuse("shapes %s and %s with these attributes are out of range (%s)",
                  text_of(shapes[kBoxEncodings]).c_str(), text_of(shapes[kClassLogits]).c_str(),
                  odtrt_error_string(ODTRT_INVALID_ARGUMENT));
  }

  // The workspace of a call with these shapes, whatever shapes were read before.
  size_t workspace_of(const Dims *shapes, int32_t count) const {
    Postprocess asked = *this;
    return asked.read_shapes(shapes, count) ? asked.workspace(shapes[kBoxEncodings].d[0]) : 0;
  }

  size_t workspace(int64_t batch) const {
    return batch < 1 || batch > INT32_MAX ? 0
                                          : odtrt_postprocess_workspace(&params, static_cast<int32_t>(batch));
  }

  int32_t run(const PluginTensorDesc *shapes, const void *const *inputs, void *const *outputs, void *memory,
              cudaStream_t stream) const {
    const int64_t batch = shapes[kBoxEncodings].dims.d[0];
    odtrt_heads heads{};
    heads.box_encodings = inputs[kBoxEncodings];
    heads.class_logits = inputs[kClassLogits];
    heads.dtype = shapes[kBoxEncodings].type == DataType::kHALF ? ODTRT_FLOAT16 : ODTRT_FLOAT32;
    heads.anchors = static_cast<const float *>(inputs[kAnchors]);
    heads.clip_windows =
        num_inputs > kClipWindows ? static_cast<const float *>(inputs[kClipWindows]) : nullptr;
    odtrt_detections detections{};
    detections.num_detections = static_cast<int32_t *>(outputs[kNumDetections]);
    detections.boxes = static_cast<float *>(outputs[kBoxes]);
    detections.scores = static_cast<float *>(outputs[kScores]);
    detections.classes = static_cast<int32_t *>(outputs[kClasses]);
    const odtrt_status status = odtrt_postprocess_cuda(&params, static_cast<int32_t>(batch), &heads,
                                                       &detections, memory, workspace(batch), stream);
    if (status != ODTRT_OK)
      refuse("%s (status %d) on box_encodings %s", odtrt_error_string(status), status,
             text_of(shapes[kBoxEncodings].dims).c_str());
    return status;
  }
};

DataType output_type(int32_t index) {
  return index == kNumDetections || index == kClasses ? DataType::kINT32 : DataType::kFLOAT;
}

bool is_supported(const PluginTensorDesc &tensor, int32_t position, int32_t num_inputs, DataType heads) {
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position >= num_inputs) return tensor.type == output_type(position - num_inputs);
  if (position == kBoxEncodings) return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF;
  return tensor.type == (position == kClassLogits ? heads : DataType::kFLOAT);
}

DimsExprs output_shape(int32_t index, const DimsExprs *inputs, int32_t max_detections, IExprBuilder &expressions) {
  DimsExprs shape{};
  shape.nbDims = index == kNumDetections ? 1 : index == kBoxes ? 3 : 2;
  shape.d[0] = inputs[kBoxEncodings].d[0];
  shape.d[1] = expressions.constant(max_detections);
  shape.d[2] = expressions.constant(4);
  return shape;
}

// The sizes in `expressions`; -1 for those that are not constant.
std::vector<Dims> known_shapes(const DimsExprs *expressions, int32_t count) {
  std::vector<Dims> shapes(count);
  for (int32_t i = 0; i < count; ++i) {
    shapes[i].nbDims = expressions[i].nbDims;
    for (int32_t axis = 0; axis < expressions[i].nbDims; ++axis) {
      const IDimensionExpr *size = expressions[i].d[axis];
      shapes[i].d[axis] = size->isConstant() ? size->getConstantValue() : -1;
    }
  }
  return shapes;
}

std::vector<Dims> largest_shapes(const DynamicPluginTensorDesc *inputs, int32_t count) {
  std::vector<Dims> shapes(count);
  for (int32_t i = 0; i < count; ++i) shapes[i] = inputs[i].max;
  return shapes;
}

std::vector<Dims> current_shapes(const PluginTensorDesc *inputs, int32_t count) {
  std::vector<Dims> shapes(count);
  for (int32_t i = 0; i < count; ++i) shapes[i] = inputs[i].dims;
  return shapes;
}

#if ODTRT_PLUGIN_V3

// ---- TensorRT 10 and newer ------------------------------------------------------------------------------

class Detect final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Detect(const Postprocess &postprocess) : postprocess_(postprocess) {}

  nvinfer1::IPluginCapability *getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore *>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild *>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime *>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3 *clone() noexcept override { return new (std::nothrow) Detect(postprocess_); }

  const char *getPluginName() const noexcept override { return kName; }
  const char *getPluginVersion() const noexcept override { return kVersion; }
  const char *getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return kNumOutputs; }

  int32_t getOutputDataTypes(DataType *types, int32_t num_outputs, const DataType *,
                             int32_t) const noexcept override {
    for (int32_t i = 0; i < num_outputs; ++i) types[i] = output_type(i);
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs *inputs, int32_t num_inputs, const DimsExprs *, int32_t,
                          DimsExprs *outputs, int32_t num_outputs,
                          IExprBuilder &expressions) noexcept override {
    if (!postprocess_.read_shapes(known_shapes(inputs, num_inputs).data(), num_inputs)) return -1;
    for (int32_t i = 0; i < num_outputs; ++i)
      outputs[i] = output_shape(i, inputs, postprocess_.params.max_total_detections, expressions);
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc *tensors, int32_t num_inputs,
                                 int32_t) noexcept override {
    return is_supported(tensors[position].desc, position, num_inputs, tensors[kBoxEncodings].desc.type);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                          const DynamicPluginTensorDesc *, int32_t) noexcept override {
    return postprocess_.read_largest_shapes(largest_shapes(inputs, num_inputs).data(), num_inputs) ? 0 : -1;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                          const DynamicPluginTensorDesc *, int32_t) const noexcept override {
    return postprocess_.workspace_of(largest_shapes(inputs, num_inputs).data(), num_inputs);
  }

  int32_t onShapeChange(const PluginTensorDesc *inputs, int32_t num_inputs, const PluginTensorDesc *,
                        int32_t) noexcept override {
    return postprocess_.read_largest_shapes(current_shapes(inputs, num_inputs).data(), num_inputs) ? 0 : -1;
  }

  int32_t enqueue(const PluginTensorDesc *input_shapes, const PluginTensorDesc *, const void *const *inputs,
                  void *const *outputs, void *workspace, cudaStream_t stream) noexcept override {
    return postprocess_.run(input_shapes, inputs, outputs, workspace, stream);
  }

  nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *) noexcept override {
    return clone();
  }

  const PluginFieldCollection *getFieldsToSerialize() noexcept override {
    fields_ = fields_of(&postprocess_.params);
    collection_ = collection_of(fields_);
    return &collection_;
  }

 private:
  Postprocess postprocess_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

class DetectCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  const char *getPluginName() const noexcept override { return kName; }
  const char *getPluginVersion() const noexcept override { return kVersion; }
  const char *getPluginNamespace() const noexcept override { return kNamespace; }
  const PluginFieldCollection *getFieldNames() noexcept override { return field_names(); }

  nvinfer1::IPluginV3 *createPlugin(const char *, const PluginFieldCollection *fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    Postprocess postprocess;
    if (!read_attributes(fields, &postprocess.params)) return nullptr;
    return new (std::nothrow) Detect(postprocess);
  }
};

#else

// ---- TensorRT 8.5 to 9 ----------------------------------------------------------------------------------

#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // IPluginV2 by its name

class Detect final : public nvinfer1::IPluginV2DynamicExt {
 public:
  explicit Detect(const Postprocess &postprocess) : postprocess_(postprocess) {}

  const char *getPluginType() const noexcept override { return kName; }
  const char *getPluginVersion() const noexcept override { return kVersion; }
  const char *getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  void setPluginNamespace(const char *name) noexcept override { namespace_ = name; }
  int32_t getNbOutputs() const noexcept override { return kNumOutputs; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }

  nvinfer1::IPluginV2DynamicExt *clone() const noexcept override {
    auto *copy = new (std::nothrow) Detect(postprocess_);
    if (copy != nullptr) copy->namespace_ = namespace_;
    return copy;
  }

  DataType getOutputDataType(int32_t index, const DataType *, int32_t) const noexcept override {
    return output_type(index);
  }

  DimsExprs getOutputDimensions(int32_t index, const DimsExprs *inputs, int32_t num_inputs,
                                IExprBuilder &expressions) noexcept override {
    if (!postprocess_.read_shapes(known_shapes(inputs, num_inputs).data(), num_inputs)) {
      DimsExprs none{};
      none.nbDims = -1;
      return none;
    }
    return output_shape(index, inputs, postprocess_.params.max_total_detections, expressions);
  }

  bool supportsFormatCombination(int32_t position, const PluginTensorDesc *tensors, int32_t num_inputs,
                                 int32_t) noexcept override {
    return is_supported(tensors[position], position, num_inputs, tensors[kBoxEncodings].type);
  }

  void configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                       const DynamicPluginTensorDesc *, int32_t) noexcept override {
    is_configured_ = postprocess_.read_largest_shapes(largest_shapes(inputs, num_inputs).data(), num_inputs);
  }

  size_t getWorkspaceSize(const PluginTensorDesc *inputs, int32_t num_inputs, const PluginTensorDesc *,
                          int32_t) const noexcept override {
    return postprocess_.workspace_of(current_shapes(inputs, num_inputs).data(), num_inputs);
  }

  int32_t enqueue(const PluginTensorDesc *input_shapes, const PluginTensorDesc *, const void *const *inputs,
                  void *const *outputs, void *workspace, cudaStream_t stream) noexcept override {
    if (!is_configured_) return ODTRT_INVALID_ARGUMENT;  // configurePlugin has said why
    return postprocess_.run(input_shapes, inputs, outputs, workspace, stream);
  }

  // A plan holds params and num_inputs as they lie in memory; it belongs to one TensorRT version anyway.
  size_t getSerializationSize() const noexcept override { return sizeof(Postprocess); }
  void serialize(void *buffer) const noexcept override {
    std::memcpy(buffer, &postprocess_, sizeof postprocess_);
  }

 private:
  Postprocess postprocess_;
  std::string namespace_ = kNamespace;
  bool is_configured_ = true;  // what a plan holds was configured when it was built
};

class DetectCreator final : public nvinfer1::IPluginCreator {
 public:
  const char *getPluginName() const noexcept override { return kName; }
  const char *getPluginVersion() const noexcept override { return kVersion; }
  const char *getPluginNamespace() const noexcept override { return kNamespace; }
  void setPluginNamespace(const char *) noexcept override {}
  const PluginFieldCollection *getFieldNames() noexcept override { return field_names(); }

  nvinfer1::IPluginV2 *createPlugin(const char *, const PluginFieldCollection *fields) noexcept override {
    Postprocess postprocess;
    if (!read_attributes(fields, &postprocess.params)) return nullptr;
    return new (std::nothrow) Detect(postprocess);
  }

  nvinfer1::IPluginV2 *deserializePlugin(const char *, const void *data, size_t size) noexcept override {
    Postprocess postprocess;
    if (size != sizeof postprocess) {
      refuse("the plan holds %zu bytes for this plugin, expected %zu; build it again", size,
             sizeof postprocess);
      return nullptr;
    }
    std::memcpy(&postprocess, data, size);
    return new (std::nothrow) Detect(postprocess);
  }
};

#if !ODTRT_REGISTRY_LOADS_LIBRARIES
// 8.5's registry cannot load libraries; there, to dlopen this one registers the plugin. libnvinfer is asked
// for by name, because Python loads it without making its symbols visible.
struct Registration {
  DetectCreator creator;
  Registration() {
    void *library = dlopen("libnvinfer.so.8", RTLD_LAZY);
    const auto registry = reinterpret_cast<nvinfer1::IPluginRegistry *(*)()>(
        library == nullptr ? nullptr : dlsym(library, "getPluginRegistry"));
    if (registry == nullptr || !registry()->registerCreator(creator, kNamespace))
      refuse("not registered: %s", registry == nullptr ? "libnvinfer.so.8 cannot be loaded"
                                                       : "libnvinfer.so.8 has such a plugin already");
  }
} registration;
#endif

#endif

}  // namespace

// ---- What a plugin registry looks for -------------------------------------------------------------------

#if ODTRT_REGISTRY_LOADS_LIBRARIES

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder *finder) {
  logger_finder.store(finder);
}

#if ODTRT_PLUGIN_V3
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface *const *getCreators(
    int32_t &count) {
  static DetectCreator creator;
  static nvinfer1::IPluginCreatorInterface *const creators[] = {&creator};
  count = 1;
  return creators;
}
#else
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreator *const *getPluginCreators(
    int32_t &count) {
  static DetectCreator creator;
  static nvinfer1::IPluginCreator *const creators[] = {&creator};
  count = 1;
  return creators;
}
#endif

#endif
