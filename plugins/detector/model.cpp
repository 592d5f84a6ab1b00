#include "model.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "failure.h"
#include "sha256.h"

namespace odtrt {
namespace {

constexpr size_t kLargestSpec = size_t{1} << 24, kLargestAnchors = size_t{1} << 30, kLargestLog = size_t{1} << 26;
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxSide = (1 << 24) - 1;
constexpr double kMaxFloat = std::numeric_limits<float>::max(), kMinPositive = std::numeric_limits<float>::min();
const char kExportAgain[] = "run `odtrt export` again";

struct Descriptor {
  int number = -1;
  explicit Descriptor(int opened) : number(opened) {}
  Descriptor(const Descriptor &) = delete;
  Descriptor &operator=(const Descriptor &) = delete;
  ~Descriptor() {
    if (number >= 0) ::close(number);
  }
};

// Holds the folder's lock, which its readers share, so that its files belong together. flock is advisory: where it does
// not work, as on some network file systems, the folder is read without.
class Undisturbed {
 public:
  explicit Undisturbed(const std::string &folder) : lock_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    if (lock_.number < 0) {
      fail(ODTRT_BAD_MODEL, folder + ": no such folder (" + std::strerror(errno) +
                                "); expected a model folder, as `odtrt export` writes it");
    }
    while (flock(lock_.number, LOCK_SH) != 0 && errno == EINTR) {
    }
    DIR *listed = opendir(folder.c_str());
    bool is_changing = false;
    while (listed != nullptr) {
      const dirent *entry = readdir(listed);
      if (entry == nullptr) break;
      is_changing |= std::strncmp(entry->d_name, ".commit-", 8) == 0;
    }
    if (listed != nullptr) closedir(listed);
    if (is_changing) {
      fail(ODTRT_BAD_MODEL, folder + ": a change of several files was interrupted; run `odtrt plans` on the " +
                                "folder, which completes it");
    }
  }

 private:
  Descriptor lock_;
};

bool is_digest(const std::string &text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::vector<std::string> origins_of(const std::string &name) {
  if (name == "heads.onnx") return {"frozen.pb", "anchors.npy", "spec.json"};
  if (name.rfind("detector", 0) == 0) return {"heads.onnx", "anchors.npy", "spec.json"};
  return {};
}

bool is_among(const std::vector<std::string> &names, const std::string &name) {
  for (const std::string &one : names) {
    if (one == name) return true;
  }
  return false;
}

std::map<std::string, std::string> texts(const Fields &record, const char *name) {
  std::map<std::string, std::string> found;
  for (const auto &[key, value] : record.object(name).json().members) {
    if (value.kind != Json::Kind::kString) throw std::invalid_argument(std::string(name) + " is no object of texts");
    found[key] = value.text;
  }
  return found;
}

// Adds what one line of log.jsonl says, as odtrt_lib.folder.recorded does.
void add_record(const std::string &line, std::map<std::string, Recorded> &recorded) {
  Json json = parse_json(line);
  const Fields record(json, "record", "");
  const std::string stage = record.text("stage");
  const auto inputs = texts(record, "inputs"), outputs = texts(record, "outputs");
  const auto check = json.members.find("check");
  if (check != json.members.end()) {
    const std::string expected = check->second.text;
    json.members.erase("check");
    if (sha256(json.sorted()) != expected) {
      throw std::invalid_argument("altered: its fields do not go with their checksum `check`");
    }
  }
  for (const auto &[name, digest] : outputs) {
    if (!is_digest(digest)) throw std::invalid_argument("outputs: no SHA-256");
    Recorded one{digest, stage, inputs};
    if (inputs.empty()) {
      for (const auto &[other, others_digest] : outputs) {
        if (is_among(origins_of(name), other)) one.origins[other] = others_digest;
      }
    }
    recorded[name] = one;
  }
}

std::map<std::string, Recorded> read_log(const std::string &folder) {
  const std::string path = folder + "/log.jsonl";
  const std::string content = read_file(path, kLargestLog, "expected the records of the stages");
  std::map<std::string, Recorded> recorded;
  size_t start = 0;
  for (int number = 1; start < content.size(); ++number) {
    const size_t end = std::min(content.find('\n', start), content.size());
    const std::string line = content.substr(start, end - start);
    start = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    std::string reason;
    try {
      add_record(line, recorded);
    } catch (const std::invalid_argument &error) {
      reason = error.what();
    } catch (const Failure &failure) {
      reason = failure.text;
    }
    if (!reason.empty()) {
      fail(ODTRT_BAD_MODEL, path + ": line " + std::to_string(number) + " is damaged (" + one_line(reason) +
                                "); delete it and run the stages, or unpack the bundle, again");
    }
  }
  return recorded;
}

std::string read_sealed(const std::string &folder, const std::string &name, size_t largest,
                        const std::map<std::string, Recorded> &recorded) {
  const std::string path = folder + "/" + name;
  const std::string content = read_file(path, largest, kExportAgain);
  const auto known = recorded.find(name);
  if (known == recorded.end()) {
    fail(ODTRT_BAD_MODEL, path + ": not sealed, log.jsonl has no record of it; run `odtrt export` again, or, if it is" +
                              " your own file, call odtrt_lib.folder.seal on the folder");
  }
  const std::string digest = sha256(content);
  if (digest != known->second.sha256) {
    fail(ODTRT_BAD_MODEL, path + ": damaged or changed: its SHA-256 is " + digest.substr(0, 12) +
                              "..., the record of `" + one_line(known->second.stage) + "` in log.jsonl says " +
                              known->second.sha256.substr(0, 12) + "...; " + kExportAgain);
  }
  return content;
}

void set_three(float *values, const std::vector<double> &from) {
  for (size_t i = 0; i < 3; ++i) values[i] = static_cast<float>(from[i]);
}

Input read_input(const Fields &spec) {
  const Fields fields = spec.object("input");
  fields.only({"height", "width", "resizer", "scale", "offset", "batch", "name"});
  const Fields resizer = fields.object("resizer");
  resizer.only({"kind", "min_dimension", "max_dimension", "pad_to_max_dimension", "pad_value", "method"});
  Input input{};
  input.name = fields.text("name");
  input.height = static_cast<int32_t>(fields.whole("height", 1, kMaxSide));
  input.width = static_cast<int32_t>(fields.whole("width", 1, kMaxSide));
  input.batch = fields.is_null("batch") ? 0 : static_cast<int32_t>(fields.whole("batch", 1, 1 << 16));
  if (int64_t{3} * input.height * input.width * std::max(1, input.batch) > kMaxInt) {
    fields.refuse("height", "less than 2^31 values in all");
  }
  set_three(input.scale, fields.three("scale", kMinPositive, kMaxFloat));
  set_three(input.offset, fields.three("offset", -kMaxFloat, kMaxFloat));
  set_three(input.pad_value, resizer.three("pad_value", -kMaxFloat, kMaxFloat));
  const std::string &kind = resizer.text("kind");
  input.keeps_aspect_ratio = kind == "keep_aspect_ratio";
  if (!input.keeps_aspect_ratio && kind != "fixed_shape") resizer.refuse("kind", "fixed_shape or keep_aspect_ratio");
  if (resizer.text("method") != "bilinear") resizer.refuse("method", "bilinear");
  input.is_padded = resizer.flag("pad_to_max_dimension");
  if (input.keeps_aspect_ratio) {
    input.min_dimension = static_cast<int32_t>(resizer.whole("min_dimension", 1, kMaxSide));
    input.max_dimension = static_cast<int32_t>(resizer.whole("max_dimension", input.min_dimension, kMaxSide));
  } else if (input.is_padded || !resizer.is_null("min_dimension") || !resizer.is_null("max_dimension")) {
    resizer.refuse("kind", "no min_dimension, max_dimension or padding with it");
  }
  const bool is_square = input.height == input.max_dimension && input.width == input.max_dimension;
  if (input.is_padded && !is_square) fields.refuse("height", "the square of resizer.max_dimension");
  return input;
}

void read_heads(const Fields &spec, int64_t schema, Model &model) {
  odtrt_postprocess_params &params = model.postprocess;
  const Fields heads = spec.object("heads");
  if (schema == 1) {
    heads.only({"num_anchors", "num_classes", "background_column", "box_encodings", "class_logits"});
  } else {
    heads.only({"family", "num_anchors", "num_classes", "background_column", "box_coder", "scores", "box_encodings",
                "class_logits"});
    if (heads.text("family") != "ssd") heads.refuse("family", "ssd");
  }
  const Fields &decoding = schema == 1 ? spec : heads;
  const Fields coder = decoding.object("box_coder"), scores = decoding.object("scores");
  coder.only({"y_scale", "x_scale", "height_scale", "width_scale"});
  scores.only({"converter", "logit_scale"});
  params.num_anchors = static_cast<int32_t>(heads.whole("num_anchors", 1, kMaxInt));
  params.background_column = heads.flag("background_column");
  const int64_t classes = heads.whole("num_classes", 1, 1 << 16);
  params.num_columns = static_cast<int32_t>(classes) + params.background_column;
  if (int64_t{params.num_anchors} * params.num_columns > kMaxInt) {
    heads.refuse("num_anchors", "less than 2^31 scores in all");
  }
  const std::string &converter = scores.text("converter");
  params.score_converter = converter == "sigmoid"    ? ODTRT_SIGMOID
                           : converter == "softmax"  ? ODTRT_SOFTMAX
                           : converter == "identity" ? ODTRT_IDENTITY
                                                     : -1;
  if (params.score_converter < 0) scores.refuse("converter", "sigmoid, softmax or identity");
  params.logit_factor = static_cast<float>(1.0 / scores.number("logit_scale", kMinPositive, kMaxFloat));
  int i = 0;
  for (const char *name : {"y_scale", "x_scale", "height_scale", "width_scale"}) {
    params.box_scales[i++] = static_cast<float>(coder.number(name, kMinPositive, kMaxFloat));
  }
  model.box_encodings = heads.text("box_encodings");
  model.class_logits = heads.text("class_logits");
  const std::vector<Json> &labels = spec.list("labels");
  if (static_cast<int64_t>(labels.size()) != classes) spec.refuse("labels", "one for each of heads.num_classes");
  for (const Json &item : labels) {
    const int64_t id = static_cast<int64_t>(model.class_names.size()) + 1;
    const Fields label(item, spec.where() + ".labels[" + std::to_string(id - 1) + "]", kExportAgain);
    label.only({"id", "name"});
    label.whole("id", id, id);
    model.class_names.push_back(label.text("name"));
  }
}

void read_nms(const Fields &spec, odtrt_postprocess_params &params) {
  const Fields nms = spec.object("nms");
  nms.only({"score_threshold", "iou_threshold", "max_detections_per_class", "max_total_detections", "class_agnostic",
            "change_coordinate_frame"});
  params.score_threshold = static_cast<float>(nms.number("score_threshold", -kMaxFloat, kMaxFloat));
  params.iou_threshold = static_cast<float>(nms.number("iou_threshold", 0, 1));
  params.max_detections_per_class = static_cast<int32_t>(nms.whole("max_detections_per_class", 1, kMaxInt));
  params.max_total_detections = static_cast<int32_t>(nms.whole("max_total_detections", 1, 4096));
  params.class_agnostic = nms.flag("class_agnostic");
  params.change_coordinate_frame = nms.flag("change_coordinate_frame");
}

// Exactly what numpy.save writes for float32 [count, 4].
std::vector<float> parse_anchors(const std::string &content, const std::string &path, int32_t count) {
  const std::string expected = "float32 [" + std::to_string(count) + ", 4]";
  const std::string dictionary =
      "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(count) + ", 4), }";
  const std::string magic("\x93NUMPY\x01\x00", 8);
  const auto is_expected = [&] {
    if (content.size() < 10 || content.compare(0, 8, magic) != 0) return false;
    const size_t length = static_cast<unsigned char>(content[8]) + 256u * static_cast<unsigned char>(content[9]);
    if (content.size() != 10 + length + 16 * static_cast<size_t>(count)) return false;
    const std::string header = content.substr(10, length);
    const size_t end = header.find_first_not_of(' ', dictionary.size());
    return header.compare(0, dictionary.size(), dictionary) == 0 && end + 1 == length && header[end] == '\n';
  };
  if (!is_expected()) {
    fail(ODTRT_BAD_MODEL, path + ": not an .npy file of " + expected + ", as spec.json says; " + kExportAgain);
  }
  std::vector<float> anchors(4 * static_cast<size_t>(count));
  std::memcpy(anchors.data(), content.data() + content.size() - 4 * anchors.size(), 4 * anchors.size());
  for (size_t i = 0; i < anchors.size(); ++i) {
    if (!std::isfinite(anchors[i]) || (i % 4 >= 2 && anchors[i] <= 0)) {
      fail(ODTRT_BAD_MODEL, path + ": anchor " + std::to_string(i / 4) + " is not finite, or has no height or width; " +
                                kExportAgain);
    }
  }
  return anchors;
}

}  // namespace

std::string read_file(const std::string &path, size_t largest, const std::string &advice) {
  const auto refuse = [&](const std::string &reason) {
    fail(ODTRT_BAD_MODEL, path + ": cannot be read (" + reason + "); " + advice);
  };
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  struct stat found {};
  if (file.number < 0 || fstat(file.number, &found) != 0) refuse(std::strerror(errno));
  if (!S_ISREG(found.st_mode)) refuse("not a regular file");
  if (static_cast<uint64_t>(found.st_size) > largest) refuse("larger than any such file");
  std::string content(static_cast<size_t>(found.st_size), '\0');
  size_t size = 0;
  while (size < content.size()) {
    const ssize_t count = ::read(file.number, &content[size], content.size() - size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) refuse(std::strerror(errno));
    if (count == 0) break;
    size += static_cast<size_t>(count);
  }
  content.resize(size);
  return content;
}

std::string part_sha256(const Json &spec, const std::string &part) {
  const size_t colon = part.find(": ");
  if (colon == std::string::npos) return "";
  Json arranged = spec;  // as odtrt_lib.spec.sections_for_records arranges it
  const auto schema = spec.members.find("schema");
  const auto heads = arranged.members.find("heads");
  if (schema == spec.members.end() || heads == arranged.members.end()) return "";
  if (schema->second.token == "2") {
    for (const char *name : {"box_coder", "scores"}) {
      const auto moved = heads->second.members.find(name);
      Json value;
      value.token = "null";
      if (moved != heads->second.members.end()) {
        value = moved->second;
        heads->second.members.erase(moved);
      }
      arranged.members[name] = value;
      arranged.own_names[name] = "\"" + std::string(name) + "\"";
    }
    const auto family = heads->second.members.find("family");
    if (family == heads->second.members.end()) return "";
    if (family->second.text == "ssd") heads->second.members.erase(family);
  }
  Json sections;
  sections.kind = Json::Kind::kObject;
  for (size_t start = colon + 2; start <= part.size();) {
    const size_t end = std::min(part.find(", ", start), part.size());
    const std::string name = part.substr(start, end - start);
    const auto found = arranged.members.find(name);
    if (found == arranged.members.end()) return "";
    sections.members[name] = found->second;
    sections.own_names[name] = "\"" + name + "\"";
    start = end + 2;
  }
  return sha256(sections.sorted());
}

bool is_outdated(const Model &model, const std::string &name) {
  const auto known = model.recorded.find(name);
  if (known == model.recorded.end()) return false;
  for (const auto &[origin, digest] : known->second.origins) {
    std::string found;
    if (origin.find(": ") != std::string::npos) {
      found = part_sha256(model.spec, origin);
    } else if (is_among(origins_of(name), origin) && model.recorded.count(origin) != 0) {
      found = model.recorded.at(origin).sha256;
    }
    if (!found.empty() && found != digest) return true;
  }
  return false;
}

Model read_model(const std::string &folder) {
  const Undisturbed undisturbed(folder);
  Model model{};
  model.folder = folder;
  model.recorded = read_log(folder);
  model.spec_content = read_sealed(folder, "spec.json", kLargestSpec, model.recorded);
  const std::string path = folder + "/spec.json";
  try {
    model.spec = parse_json(model.spec_content);
  } catch (const std::invalid_argument &error) {
    fail(ODTRT_BAD_MODEL, path + ": not JSON (" + error.what() + "); " + kExportAgain);
  }
  const Fields spec(model.spec, path + ": spec", kExportAgain);
  const int64_t schema = spec.whole("schema", 1, 2);
  if (schema == 1) {
    spec.only({"schema", "name", "source", "input", "heads", "nms", "labels", "box_coder", "scores"});
  } else {
    spec.only({"schema", "name", "source", "input", "heads", "nms", "labels"});
  }
  spec.text("name");
  const Fields source = spec.object("source");
  source.only({"pipeline_sha256", "checkpoint", "checkpoint_sha256", "feature_extractor", "odapi_version",
               "tensorflow_version"});
  for (const char *name : {"pipeline_sha256", "checkpoint", "checkpoint_sha256", "feature_extractor", "odapi_version",
                           "tensorflow_version"}) {
    source.text(name);
  }
  model.input = read_input(spec);
  read_heads(spec, schema, model);
  read_nms(spec, model.postprocess);
  const std::string anchors = read_sealed(folder, "anchors.npy", kLargestAnchors, model.recorded);
  model.anchors = parse_anchors(anchors, folder + "/anchors.npy", model.postprocess.num_anchors);
  return model;
}

Frame frame_of(const Input &input, int32_t image_height, int32_t image_width) {
  Frame frame{image_height, image_width, input.height, input.width};
  if (!input.keeps_aspect_ratio) return frame;
  // odtrt_lib.preprocess.network_size, operation by operation in float32
  const auto height = static_cast<float>(image_height), width = static_cast<float>(image_width);
  const auto low = static_cast<float>(input.min_dimension), high = static_cast<float>(input.max_dimension);
  const bool is_upright = image_height >= image_width;
  const float by_height = (is_upright ? high : low) / height, by_width = (is_upright ? low : high) / width;
  const float scale = by_width < by_height ? by_width : by_height;
  frame.true_height = static_cast<int32_t>(std::nearbyint(scale * height));
  frame.true_width = static_cast<int32_t>(std::nearbyint(scale * width));
  const bool fits = frame.true_height <= input.height && frame.true_width <= input.width;
  const bool fills = frame.true_height == input.height && frame.true_width == input.width;
  if (frame.true_height < 1 || frame.true_width < 1 || !(input.is_padded ? fits : fills)) {
    const auto sizes = [](int32_t a, int32_t b) { return std::to_string(a) + "x" + std::to_string(b); };
    fail(ODTRT_INVALID_ARGUMENT,
         "image: " + sizes(image_height, image_width) + " becomes " + sizes(frame.true_height, frame.true_width) +
             ", which does not fit the network's input, " + sizes(input.height, input.width) +
             "; pass pictures of its aspect ratio, or crop them");
  }
  return frame;
}

odtrt_preprocess_params preprocess_params(const Input &input, const Frame &frame, int64_t pitch, bool is_bgr) {
  odtrt_preprocess_params params{};
  params.image_height = frame.image_height;
  params.image_width = frame.image_width;
  params.image_pitch = pitch;
  params.bgr = is_bgr;
  params.true_height = frame.true_height;
  params.true_width = frame.true_width;
  params.output_height = input.height;
  params.output_width = input.width;
  std::memcpy(params.scale, input.scale, sizeof params.scale);
  std::memcpy(params.offset, input.offset, sizeof params.offset);
  std::memcpy(params.pad_value, input.pad_value, sizeof params.pad_value);
  params.output_dtype = ODTRT_FLOAT32;
  params.output_nhwc = 0;
  return params;
}

void box_to_pixels(const Model &model, const Frame &frame, const float box[4], float pixels[4]) {
  double height = frame.image_height, width = frame.image_width;
  if (!model.postprocess.change_coordinate_frame) {
    height *= static_cast<double>(model.input.height) / frame.true_height;
    width *= static_cast<double>(model.input.width) / frame.true_width;
  }
  for (int i = 0; i < 4; ++i) {
    pixels[i] = static_cast<float>(box[i] * (i % 2 == 0 ? height : width));
  }
}

}  // namespace odtrt
