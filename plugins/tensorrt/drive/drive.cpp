// Drives the plugin OdtrtDetect through its own interface, as TensorRT 10 and newer does, without TensorRT:
// library -> creator -> plugin -> configure -> fields of the plan -> plugin at run time -> enqueue, then the
// same enqueue captured in a CUDA graph, which is replayed with new inputs.
//
//   drive LIBRARY CASE          every step, on a GPU
//   drive LIBRARY CASE --host   the steps that need no GPU
//
// CASE is what benchmarks/plugin_cases.py writes: parameters, anchors, and several sets of inputs, each with the
// detections that are expected of it, bit for bit. One line a check; the exit status is 1 if one failed.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#if NV_TENSORRT_MAJOR < 10
#error "OdtrtDetect is driven through IPluginV3; compile with the headers of TensorRT 10 or newer"
#endif

namespace {

using namespace nvinfer1;

int failures = 0;

void check(bool is_right, const std::string &what) {
  std::printf("%s  %s\n", is_right ? "ok  " : "FAIL", what.c_str());
  failures += is_right ? 0 : 1;
}

[[noreturn]] void stop(const std::string &why) {
  std::fprintf(stderr, "drive: %s\n", why.c_str());
  std::exit(2);
}

// ---- The case -------------------------------------------------------------------------------------------

struct Attributes {  // in the order of the file
  int32_t background_column, score_converter;
  float logit_factor, box_scales[4], score_threshold, iou_threshold;
  int32_t max_detections_per_class, max_total_detections, class_agnostic, change_coordinate_frame;
};

struct Header {
  char magic[8];  // "ODTRTC01"
  int32_t sets, batch, anchors, columns, is_half, has_windows;
  Attributes attributes;
};

using Bytes = std::vector<char>;

struct Set {
  std::vector<Bytes> inputs;   // box_encodings, class_logits, and clip_windows if there are any
  std::vector<Bytes> outputs;  // num_detections, boxes, scores, classes: what is expected
};

struct Case {
  Header header;
  Bytes anchors;
  std::vector<Set> sets;
};

const char *const kOutputs[] = {"num_detections", "boxes", "scores", "classes"};

std::vector<size_t> output_sizes(const Header &h) {
  const size_t batch = h.batch, max_detections = h.attributes.max_total_detections;
  return {4 * batch, 16 * batch * max_detections, 4 * batch * max_detections, 4 * batch * max_detections};
}

Case read_case(const char *path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) stop(std::string(path) + ": cannot be read");
  const Bytes all((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  size_t place = 0;
  const auto take = [&](size_t size) {
    if (place + size > all.size()) stop(std::string(path) + ": ends early; write it again");
    const Bytes part(all.begin() + place, all.begin() + place + size);
    place += size;
    return part;
  };
  Case result{};
  std::memcpy(&result.header, take(sizeof(Header)).data(), sizeof(Header));
  const Header &h = result.header;
  if (std::memcmp(h.magic, "ODTRTC01", 8) != 0)
    stop(std::string(path) + ": not a case of benchmarks/plugin_cases.py");
  const size_t element = h.is_half ? 2 : 4, rows = size_t(h.batch) * h.anchors;
  result.anchors = take(16 * size_t(h.anchors));
  for (int32_t i = 0; i < h.sets; ++i) {
    Set set;
    set.inputs = {take(rows * 4 * element), take(rows * h.columns * element)};
    if (h.has_windows) set.inputs.push_back(take(16 * size_t(h.batch)));
    for (const size_t size : output_sizes(h)) set.outputs.push_back(take(size));
    result.sets.push_back(set);
  }
  if (place != all.size()) stop(std::string(path) + ": longer than its header says; write it again");
  return result;
}

// ---- The plugin -----------------------------------------------------------------------------------------

std::vector<PluginField> fields_of(const Attributes &a) {
  const auto whole = PluginFieldType::kINT32, real = PluginFieldType::kFLOAT32;
  return {{"background_column", &a.background_column, whole, 1},
          {"score_converter", &a.score_converter, whole, 1},
          {"logit_factor", &a.logit_factor, real, 1},
          {"box_scales", a.box_scales, real, 4},
          {"score_threshold", &a.score_threshold, real, 1},
          {"iou_threshold", &a.iou_threshold, real, 1},
          {"max_detections_per_class", &a.max_detections_per_class, whole, 1},
          {"max_total_detections", &a.max_total_detections, whole, 1},
          {"class_agnostic", &a.class_agnostic, whole, 1},
          {"change_coordinate_frame", &a.change_coordinate_frame, whole, 1}};
}

IPluginV3 *create(IPluginCreatorV3One *creator, const std::vector<PluginField> &fields, TensorRTPhase phase) {
  PluginFieldCollection collection{};
  collection.nbFields = static_cast<int32_t>(fields.size());
  collection.fields = fields.data();
  return creator->createPlugin("detect", &collection, phase);
}

template <typename Capability>
Capability *capability(IPluginV3 *plugin, PluginCapabilityType type) {
  return static_cast<Capability *>(plugin->getCapabilityInterface(type));
}

PluginTensorDesc tensor(DataType type, std::vector<int64_t> shape) {
  PluginTensorDesc desc{};
  desc.dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) desc.dims.d[i] = shape[i];
  desc.type = type;
  desc.format = TensorFormat::kLINEAR;
  desc.scale = 1.0f;
  return desc;
}

std::vector<PluginTensorDesc> input_descs(const Header &h) {
  const DataType heads = h.is_half ? DataType::kHALF : DataType::kFLOAT;
  std::vector<PluginTensorDesc> descs = {tensor(heads, {h.batch, h.anchors, 4}),
                                         tensor(heads, {h.batch, h.anchors, h.columns}),
                                         tensor(DataType::kFLOAT, {h.anchors, 4})};
  if (h.has_windows) descs.push_back(tensor(DataType::kFLOAT, {h.batch, 4}));
  return descs;
}

std::vector<PluginTensorDesc> output_descs(const Header &h) {
  const int64_t max_detections = h.attributes.max_total_detections;
  return {tensor(DataType::kINT32, {h.batch}), tensor(DataType::kFLOAT, {h.batch, max_detections, 4}),
          tensor(DataType::kFLOAT, {h.batch, max_detections}), tensor(DataType::kINT32, {h.batch, max_detections})};
}

// For a batch of 1 up to the one in `descs`.
std::vector<DynamicPluginTensorDesc> with_range(const std::vector<PluginTensorDesc> &descs, int64_t batch) {
  std::vector<DynamicPluginTensorDesc> result;
  for (const PluginTensorDesc &desc : descs) {
    DynamicPluginTensorDesc dynamic{};
    dynamic.desc = desc;
    dynamic.min = dynamic.opt = dynamic.max = desc.dims;
    if (desc.dims.d[0] == batch) dynamic.min.d[0] = 1;
    result.push_back(dynamic);
  }
  return result;
}

IPluginCreatorV3One *creator_in(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) stop(dlerror());
  const auto get =
      reinterpret_cast<IPluginCreatorInterface *const *(*)(int32_t &)>(dlsym(library, "getCreators"));
  check(dlsym(library, "setLoggerFinder") != nullptr, "the library exports setLoggerFinder");
  check(get != nullptr, "the library exports getCreators");
  if (get == nullptr) std::exit(1);
  int32_t count = 0;
  IPluginCreatorInterface *const *creators = get(count);
  check(count == 1, "one creator");
  auto *creator = static_cast<IPluginCreatorV3One *>(creators[0]);
  check(std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0,
        "it is an IPluginCreatorV3One");
  check(std::string(creator->getPluginNamespace()) + "/" + creator->getPluginName() + "/" +
                creator->getPluginVersion() ==
            "odtrt/OdtrtDetect/1",
        "it is odtrt, OdtrtDetect, 1");
  return creator;
}

void refuse_what_is_wrong(IPluginCreatorV3One *creator, const Header &h) {
  const std::vector<PluginField> right = fields_of(h.attributes);
  for (size_t i = 0; i < right.size(); ++i) {
    std::vector<PluginField> fields = right;
    fields.erase(fields.begin() + i);
    check(create(creator, fields, TensorRTPhase::kBUILD) == nullptr,
          std::string("refused without attribute ") + right[i].name);
  }
  std::vector<PluginField> fields = right;
  fields[2].type = PluginFieldType::kINT32;
  check(create(creator, fields, TensorRTPhase::kBUILD) == nullptr, "refused with logit_factor as an integer");
  fields = right;
  fields[3].length = 3;
  check(create(creator, fields, TensorRTPhase::kBUILD) == nullptr, "refused with three box_scales");
  fields = right;
  const int32_t too_many = 4097;
  fields[7].data = &too_many;
  check(create(creator, fields, TensorRTPhase::kBUILD) == nullptr, "refused with 4097 detections");
  check(creator->createPlugin("detect", nullptr, TensorRTPhase::kBUILD) == nullptr,
        "refused without attributes");

  IPluginV3 *plugin = create(creator, right, TensorRTPhase::kBUILD);
  if (plugin == nullptr) return;
  auto *build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  const auto outputs = with_range(output_descs(h), h.batch);
  const auto configure = [&](const std::vector<PluginTensorDesc> &inputs) {
    const auto ranges = with_range(inputs, h.batch);
    return build->configurePlugin(ranges.data(), static_cast<int32_t>(ranges.size()), outputs.data(), 4);
  };
  auto inputs = input_descs(h);
  inputs[2].dims.d[0] += 1;
  check(configure(inputs) != 0, "refused with one anchor too many");
  inputs = input_descs(h);
  inputs[1].dims.d[1] += 1;
  check(configure(inputs) != 0, "refused with one row of logits too many");
  inputs = input_descs(h);
  inputs[0].dims.d[2] = 5;
  check(configure(inputs) != 0, "refused with five values a box");
  inputs = input_descs(h);
  inputs[0].dims.nbDims = 2;
  check(configure(inputs) != 0, "refused with heads of two dimensions");
  inputs = input_descs(h);
  inputs.resize(2);
  check(configure(inputs) != 0, "refused without anchors");
  inputs = input_descs(h);
  inputs[1].dims.d[2] = int64_t{1} << 31;
  check(configure(inputs) != 0, "refused with 2^31 columns");
  delete plugin;
}

void check_formats(IPluginV3OneBuild *build, const Header &h) {
  auto descs = input_descs(h);
  const int32_t num_inputs = static_cast<int32_t>(descs.size());
  for (const PluginTensorDesc &output : output_descs(h)) descs.push_back(output);
  auto tensors = with_range(descs, h.batch);
  const auto supports = [&](int32_t position) {
    return build->supportsFormatCombination(position, tensors.data(), num_inputs, 4);
  };
  bool takes_all = true;
  for (int32_t i = 0; i < num_inputs + 4; ++i) takes_all = takes_all && supports(i);
  check(takes_all, "takes the case's types");
  tensors[1].desc.type = h.is_half ? DataType::kFLOAT : DataType::kHALF;
  check(!supports(1), "does not take logits of another type than the boxes");
  tensors[2].desc.type = DataType::kHALF;
  check(!supports(2), "does not take anchors in half precision");
  tensors[num_inputs].desc.type = DataType::kFLOAT;
  check(!supports(num_inputs), "does not give num_detections as float");
  tensors[0].desc.format = TensorFormat::kCHW32;
  check(!supports(0), "does not take another layout than the linear one");
}

// ---- The device -----------------------------------------------------------------------------------------

void require(cudaError_t status, const char *what) {
  if (status != cudaSuccess) stop(std::string(what) + ": " + cudaGetErrorString(status));
}

void *device_memory(size_t size) {
  void *memory = nullptr;
  require(cudaMalloc(&memory, size == 0 ? 1 : size), "cudaMalloc");
  return memory;
}

struct Device {
  std::vector<void *> inputs, outputs;
  void *workspace = nullptr;
  size_t workspace_size = 0;
  cudaStream_t stream = nullptr;
};

// Inputs of `set` onto the device; outputs and workspace filled with a pattern that no run may rely on.
void prepare(const Device &device, const Set &set, int pattern) {
  for (size_t i = 0; i < set.inputs.size(); ++i)
    require(cudaMemcpy(device.inputs[i < 2 ? i : 3], set.inputs[i].data(), set.inputs[i].size(),
                       cudaMemcpyHostToDevice),
            "cudaMemcpy");
  for (size_t i = 0; i < set.outputs.size(); ++i)
    require(cudaMemset(device.outputs[i], pattern, set.outputs[i].size()), "cudaMemset");
  require(cudaMemset(device.workspace, pattern, device.workspace_size), "cudaMemset");
  require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

void compare(const Device &device, const Set &set, const std::string &run) {
  require(cudaStreamSynchronize(device.stream), run.c_str());
  std::string different;
  for (size_t i = 0; i < set.outputs.size(); ++i) {
    Bytes found(set.outputs[i].size());
    require(cudaMemcpy(found.data(), device.outputs[i], found.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    size_t words = 0;
    for (size_t at = 0; at < found.size(); at += 4)
      words += std::memcmp(found.data() + at, set.outputs[i].data() + at, 4) != 0;
    if (words > 0) different += std::string(" ") + kOutputs[i] + " (" + std::to_string(words) + " values)";
  }
  check(different.empty(), run + ": " + (different.empty() ? "the expected bits" : "different:" + different));
}

void run_on_device(IPluginV3 *plugin, const Case &given, size_t workspace_size) {
  auto *runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  const auto inputs = input_descs(given.header), outputs = output_descs(given.header);
  check(runtime->onShapeChange(inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(), 4) == 0,
        "onShapeChange");
  Device device;
  device.workspace_size = workspace_size;
  device.workspace = device_memory(workspace_size);
  device.inputs = {device_memory(given.sets[0].inputs[0].size()),
                   device_memory(given.sets[0].inputs[1].size()), device_memory(given.anchors.size())};
  if (given.header.has_windows) device.inputs.push_back(device_memory(given.sets[0].inputs[2].size()));
  require(cudaMemcpy(device.inputs[2], given.anchors.data(), given.anchors.size(), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  for (const size_t size : output_sizes(given.header)) device.outputs.push_back(device_memory(size));
  require(cudaStreamCreateWithFlags(&device.stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const auto enqueue = [&] {
    return runtime->enqueue(inputs.data(), outputs.data(), device.inputs.data(), device.outputs.data(),
                            device.workspace, device.stream);
  };

  for (size_t i = 0; i < given.sets.size(); ++i) {
    prepare(device, given.sets[i], 0xcd);
    const int32_t status = enqueue();
    if (status != 0) {
      check(false, "enqueue returns " + std::to_string(status));
      return;
    }
    compare(device, given.sets[i], "enqueue, inputs " + std::to_string(i));
  }

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replayable = nullptr;
  require(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  const int32_t status = enqueue();
  require(cudaStreamEndCapture(device.stream, &graph), "cudaStreamEndCapture");
  check(status == 0, "enqueue while a CUDA graph is captured");
  require(cudaGraphInstantiateWithFlags(&replayable, graph, 0), "cudaGraphInstantiate");
  for (size_t i = 0; i < given.sets.size(); ++i) {
    prepare(device, given.sets[i], 0x7f);
    require(cudaGraphLaunch(replayable, device.stream), "cudaGraphLaunch");
    compare(device, given.sets[i], "CUDA graph, inputs " + std::to_string(i));
  }
  require(cudaGraphExecDestroy(replayable), "cudaGraphExecDestroy");
  require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  require(cudaStreamDestroy(device.stream), "cudaStreamDestroy");
  for (void *memory : device.inputs) require(cudaFree(memory), "cudaFree");
  for (void *memory : device.outputs) require(cudaFree(memory), "cudaFree");
  require(cudaFree(device.workspace), "cudaFree");
}

}  // namespace

int main(int argc, char **argv) {
  const bool is_host_only = argc == 4 && std::strcmp(argv[3], "--host") == 0;
  if (argc != 3 && !is_host_only) stop("usage: drive LIBRARY CASE [--host]");
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const Case given = read_case(argv[2]);
  const Header &h = given.header;
  IPluginCreatorV3One *creator = creator_in(argv[1]);
  refuse_what_is_wrong(creator, h);

  const std::vector<PluginField> fields = fields_of(h.attributes);
  IPluginV3 *plugin = create(creator, fields, TensorRTPhase::kBUILD);
  check(plugin != nullptr, "createPlugin to build");
  if (plugin == nullptr) return 1;
  auto *build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  auto *runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  check(build != nullptr && runtime != nullptr &&
            plugin->getCapabilityInterface(PluginCapabilityType::kCORE) != nullptr,
        "core, build and runtime capabilities");
  check(build->getNbOutputs() == 4, "four outputs");
  check_formats(build, h);
  const auto inputs = with_range(input_descs(h), h.batch), outputs = with_range(output_descs(h), h.batch);
  const int32_t num_inputs = static_cast<int32_t>(inputs.size());
  check(build->configurePlugin(inputs.data(), num_inputs, outputs.data(), 4) == 0, "configurePlugin");
  const size_t workspace_size = build->getWorkspaceSize(inputs.data(), num_inputs, outputs.data(), 4);
  check(workspace_size > 0, "getWorkspaceSize: " + std::to_string(workspace_size) + " bytes");

  const PluginFieldCollection *stored = runtime->getFieldsToSerialize();
  bool is_same = stored->nbFields == static_cast<int32_t>(fields.size());
  for (int32_t i = 0; is_same && i < stored->nbFields; ++i)
    is_same = std::strcmp(stored->fields[i].name, fields[i].name) == 0 &&
              stored->fields[i].length == fields[i].length &&
              std::memcmp(stored->fields[i].data, fields[i].data, 4u * fields[i].length) == 0;
  check(is_same, "the plan's fields are those that the plugin was made with");
  IPluginV3 *of_plan = creator->createPlugin("detect", stored, TensorRTPhase::kRUNTIME);
  check(of_plan != nullptr, "createPlugin from the plan's fields");
  if (of_plan == nullptr) return 1;
  delete plugin;
  IPluginV3 *in_context =
      capability<IPluginV3OneRuntime>(of_plan, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
  check(in_context != nullptr, "attachToContext");
  if (!is_host_only && in_context != nullptr) run_on_device(in_context, given, workspace_size);
  delete in_context;
  delete of_plan;
  std::printf("%s\n",
              failures == 0 ? "all checks passed" : (std::to_string(failures) + " checks failed").c_str());
  return failures == 0 ? 0 : 1;
}
