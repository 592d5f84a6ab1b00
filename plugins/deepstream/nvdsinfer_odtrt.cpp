// Hands the detections of odtrt's TensorRT plugin to DeepStream's nvinfer; nvinfer.txt says how to compile.
// boxes are [ymin, xmin, ymax, xmax], normalised to the network input; nvinfer wants pixels of that input.
#include <dlfcn.h>

#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "NvInferRuntime.h"
#include "nvdsinfer_custom_impl.h"

namespace {

const void* buffer_of(const std::vector<NvDsInferLayerInfo>& layers, const char* name) {
  for (const NvDsInferLayerInfo& layer : layers) {
    if (std::strcmp(layer.layerName, name) == 0) return layer.buffer;
  }
  std::cerr << "odtrt: the network has no output `" << name << "`; expected detector.onnx\n";
  return nullptr;
}

// nvinfer loads this library before it reads the plan, and the plan needs the plugin.
__attribute__((constructor)) void load_plugin() {
  Dl_info here;
  if (dladdr(reinterpret_cast<const void*>(&buffer_of), &here) == 0) return;
  const std::string path(here.dli_fname);
  const std::size_t slash = path.rfind('/');
  const std::string plugin = (slash == std::string::npos ? "" : path.substr(0, slash + 1)) +
                             "../plugins/build/libodtrt_tensorrt.so";
#if NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 806
  const bool is_loaded = getPluginRegistry()->loadLibrary(plugin.c_str()) != nullptr;
#else
  const bool is_loaded = dlopen(plugin.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr;
#endif
  if (!is_loaded) std::cerr << "odtrt: " << plugin << " cannot be loaded; run build_here.py\n";
}

}  // namespace

extern "C" bool NvDsInferParseOdtrt(const std::vector<NvDsInferLayerInfo>& layers,
                                    const NvDsInferNetworkInfo& network,
                                    const NvDsInferParseDetectionParams& params,
                                    std::vector<NvDsInferObjectDetectionInfo>& objects) {
  const auto* count = static_cast<const int*>(buffer_of(layers, "num_detections"));
  const auto* boxes = static_cast<const float*>(buffer_of(layers, "boxes"));
  const auto* scores = static_cast<const float*>(buffer_of(layers, "scores"));
  const auto* classes = static_cast<const int*>(buffer_of(layers, "classes"));
  if (!count || !boxes || !scores || !classes) return false;
  for (int i = 0; i < *count; ++i) {
    const auto class_id = static_cast<unsigned int>(classes[i]);
    if (class_id >= params.numClassesConfigured) {
      std::cerr << "odtrt: class " << class_id << ", but num-detected-classes is "
                << params.numClassesConfigured << "\n";
      return false;
    }
    if (scores[i] < params.perClassPreclusterThreshold[class_id]) continue;
    const float* box = boxes + 4 * i;
    NvDsInferObjectDetectionInfo object{};
    object.classId = class_id;
    object.detectionConfidence = scores[i];
    object.top = box[0] * network.height;
    object.left = box[1] * network.width;
    object.height = (box[2] - box[0]) * network.height;
    object.width = (box[3] - box[1]) * network.width;
    objects.push_back(object);
  }
  return true;
}

CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParseOdtrt);
