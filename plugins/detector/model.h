// What the detector reads of a model folder: spec.json and anchors.npy, after the seal in log.jsonl was checked. The
// Python side says it all in odtrt_lib/folder.py, spec.py and anchors.py.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "json.h"
#include "odtrt_detector.h"

namespace odtrt {

// What the newest record of a file in log.jsonl says. origins: what it was made from -> SHA-256.
struct Recorded {
  std::string sha256, stage;
  std::map<std::string, std::string> origins;
};

struct Input {
  std::string name;
  int32_t height, width;
  int32_t batch;  // 0: any
  bool keeps_aspect_ratio, is_padded;
  int32_t min_dimension, max_dimension;
  float scale[3], offset[3], pad_value[3];
};

struct Model {
  std::string folder;
  std::map<std::string, Recorded> recorded;
  std::string spec_content;
  Json spec;
  Input input;
  odtrt_postprocess_params postprocess;
  std::string box_encodings, class_logits;  // names of the network's outputs
  std::vector<std::string> class_names;     // of the ids 1, 2, ...
  std::vector<float> anchors;               // [num_anchors, 4]
};

// How a picture lies in the network's input, see odtrt_lib.preprocess.Frame.
struct Frame {
  int32_t image_height, image_width, true_height, true_width;
};

// Reads a folder whose files are those that their stages recorded. Throws Failure, ODTRT_BAD_MODEL.
Model read_model(const std::string &folder);

// The whole of a regular file of at most `largest` bytes. Throws Failure, ODTRT_BAD_MODEL, with `advice`.
std::string read_file(const std::string &path, size_t largest, const std::string &advice);

// The SHA-256 of a part of spec.json, as records name it, e.g. "spec.json: heads, input"; "" if there is none.
std::string part_sha256(const Json &spec, const std::string &part);

// Whether the records say that `name` was made from other files than those that are recorded now.
bool is_outdated(const Model &model, const std::string &name);

// Throws Failure, ODTRT_INVALID_ARGUMENT, if a picture of this size does not fit into the network's input.
Frame frame_of(const Input &input, int32_t image_height, int32_t image_width);

odtrt_preprocess_params preprocess_params(const Input &input, const Frame &frame, int64_t pitch, bool is_bgr);

// A box as post-processing gives it, in pixels of the picture.
void box_to_pixels(const Model &model, const Frame &frame, const float box[4], float pixels[4]);

}  // namespace odtrt
