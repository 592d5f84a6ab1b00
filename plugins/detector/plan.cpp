#include "plan.h"

#include <dirent.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "failure.h"
#include "sha256.h"

namespace odtrt {
namespace {

constexpr size_t kLargestPassport = size_t{8} << 20, kLargestLibrary = size_t{1} << 30;
constexpr int64_t kLargestPlan = int64_t{1} << 40;
const char kBuildAgain[] = "run `odtrt build` again";

using Version = std::vector<int>;

// "10.0.0b6" -> 10, 0, 0
Version version_order(const std::string &version) {
  Version numbers;
  for (const char *at = version.c_str(); *at >= '0' && *at <= '9';) {
    char *end = nullptr;
    numbers.push_back(static_cast<int>(std::strtol(at, &end, 10)));
    if (*end != '.') break;
    at = end + 1;
  }
  return numbers;
}

// -1, 0 or 1: `one` is older than, the same as or newer than `other`, as far as both say.
int compare(const Version &one, const Version &other) {
  for (size_t i = 0; i < std::min(one.size(), other.size()); ++i) {
    if (one[i] != other[i]) return one[i] < other[i] ? -1 : 1;
  }
  return 0;
}

bool is_hexadecimal(const std::string &text, size_t length) {
  return text.size() == length && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::string text_or_nothing(const Fields &fields, const char *name) {
  return fields.is_null(name) ? "" : fields.text(name);
}

int64_t count_or_nothing(const Fields &fields, const char *name) {
  return fields.is_null(name) ? -1 : fields.whole(name, 0, int64_t{1} << 53);
}

const std::string &digest(const Fields &fields, const char *name) {
  const std::string &text = fields.text(name);
  if (!is_hexadecimal(text, 64)) fields.refuse(name, "64 hexadecimal digits");
  return text;
}

// The part of spec.json that goes into a plan of the model, as odtrt_lib.variants names it.
const char *spec_part(const std::string &model) {
  return model.rfind("detector", 0) == 0 ? "spec.json: box_coder, heads, input, nms, scores"
                                         : "spec.json: heads, input";
}

Machine parse_machine(const Fields &fields) {
  Machine machine;
  machine.system = fields.text("system");
  machine.architecture = fields.text("architecture");
  machine.gpu = text_or_nothing(fields, "gpu");
  machine.compute_capability = text_or_nothing(fields, "compute_capability");
  machine.sm_count = count_or_nothing(fields, "sm_count");
  machine.gpu_memory_mb = count_or_nothing(fields, "gpu_memory_mb");
  machine.is_jetson = !fields.is_null("l4t");
  return machine;
}

Passport parse_passport(const std::string &path, const std::string &stem) {
  Json json;
  try {
    json = parse_json(read_file(path, kLargestPassport, kBuildAgain));
  } catch (const std::invalid_argument &error) {
    fail(ODTRT_NO_PLAN, path + ": not a plan's passport (" + error.what() + "); " + kBuildAgain);
  }
  const Fields fields(json, path + ": passport", kBuildAgain);
  fields.whole("schema", 2, 2);
  Json unchecked = json;
  unchecked.members.erase("check");
  if (sha256(unchecked.sorted()) != fields.text("check")) {
    fields.refuse("check", "the checksum of the other fields: altered or damaged");
  }
  Passport passport{};
  passport.fingerprint = fields.text("fingerprint");
  if (!is_hexadecimal(passport.fingerprint, 16) || passport.fingerprint != stem) {
    fields.refuse("fingerprint", "the 16 hexadecimal digits in the file's name");
  }
  passport.plan_sha256 = digest(fields, "plan_sha256");
  passport.plan = fields.text("plan");
  if (passport.plan != stem + "-" + passport.plan_sha256.substr(0, 8) + ".plan") {
    fields.refuse("plan", "a name of its fingerprint and SHA-256");
  }
  passport.plan_bytes = static_cast<size_t>(fields.whole("plan_bytes", 0, kLargestPlan));
  passport.model = fields.text("model");
  passport.onnx_sha256 = digest(fields, "onnx_sha256");
  passport.spec_sha256 = digest(fields, "spec_sha256");
  passport.runtime_library = fields.text("flavour");
  passport.version = fields.text("version");
  passport.precision = fields.text("precision");
  passport.version_compatible = fields.flag("version_compatible");
  passport.hardware_compatibility = fields.text("hardware_compatibility");
  passport.built = fields.text("built");
  passport.machine = parse_machine(fields.object("machine"));
  if (!fields.is_null("plugin")) {
    const Fields plugin = fields.object("plugin");
    passport.plugin = Plugin{plugin.text("file"), digest(plugin, "sha256"), plugin.text("abi")};
  }
  const Fields settings = fields.object("settings");
  if (settings.has(spec_part(passport.model))) passport.spec_part_sha256 = settings.text(spec_part(passport.model));
  return passport;
}

// Whether the plan was built from the model and the spec.json of the folder.
bool is_of_this_model(const Model &model, const Passport &passport) {
  const auto known = model.recorded.find(passport.model);
  if (known != model.recorded.end() && known->second.sha256 != passport.onnx_sha256) return false;
  const bool has_same_spec = model.recorded.at("spec.json").sha256 == passport.spec_sha256 ||
                             (!passport.spec_part_sha256.empty() &&
                              passport.spec_part_sha256 == part_sha256(model.spec, spec_part(passport.model)));
  return has_same_spec && !is_outdated(model, passport.model);
}

std::string version_problem(const Passport &passport, const Environment &here) {
  const Version built = version_order(passport.version), installed = version_order(here.version);
  const std::string said = "built by TensorRT " + passport.version + ", here is " + here.version + ": ";
  const int step = compare(installed, built);
  if (step == 0) return "";
  if (step < 0) return said + "an older library never reads a newer plan";
  const int from = built.empty() ? 0 : built[0], to = installed.empty() ? 0 : installed[0];
  const bool crosses = (from == 8 && to == 10 && compare(built, {8, 6}) >= 0) || (from == 10 && to == 11);
  if (passport.version_compatible && (from == to || crosses)) return "";
  return said + "only a version-compatible plan goes on to a newer version, and from 8 to 10 or 10 to 11";
}

bool has_same_size(const Machine &built, const Machine &here) {
  if (built.sm_count >= 0 && here.sm_count >= 0 && built.sm_count != here.sm_count) return false;
  if (built.gpu_memory_mb < 0 || here.gpu_memory_mb < 0) return true;
  return std::abs(built.gpu_memory_mb - here.gpu_memory_mb) * 10 <= built.gpu_memory_mb;
}

std::string gpu_problem(const Passport &passport, const Machine &here) {
  const Machine &built = passport.machine;
  if (built.gpu.empty() || built.compute_capability.empty()) {
    return "its passport does not say on which GPU it was built";
  }
  const std::string said = "built on " + built.gpu + " (compute capability " + built.compute_capability +
                           "), this is " + here.gpu + " (" + here.compute_capability + "): ";
  const bool is_same_capability = built.compute_capability == here.compute_capability;
  if (is_same_capability && built.gpu == here.gpu && has_same_size(built, here)) return "";
  const std::string &level = passport.hardware_compatibility;
  if (level == "none") return said + "another GPU, or another size of it";
  if (built.is_jetson || here.is_jetson) return said + "hardware compatibility does not exist on JetPack";
  const Version ampere = {8, 0};
  const bool are_ampere = compare(version_order(here.compute_capability), ampere) >= 0 &&
                          compare(version_order(built.compute_capability), ampere) >= 0;
  const bool is_covered = level == "ampere_plus" ? are_ampere : is_same_capability;
  return is_covered ? "" : said + "not covered by " + level;
}

std::string plugin_problem(const Passport &passport, const Environment &here) {
  if (!passport.plugin) return "";
  if (!here.plugin) return "it calls " + passport.plugin->path + ", and no plugin was named";
  if (passport.plugin->abi != here.plugin->abi) return "it calls its plugin as " + passport.plugin->abi;
  if (passport.plugin->sha256 != here.plugin->sha256) return "built with another build of the plugin";
  return "";
}

}  // namespace

Survey survey(const std::string &folder) {
  Survey found;
  std::vector<std::string> names;
  DIR *listed = opendir((folder + "/plans").c_str());
  while (listed != nullptr) {
    const dirent *entry = readdir(listed);
    if (entry == nullptr) break;
    const std::string name = entry->d_name;
    if (name.size() > 5 && name[0] != '.' && name.compare(name.size() - 5, 5, ".json") == 0) names.push_back(name);
  }
  if (listed != nullptr) closedir(listed);
  std::sort(names.begin(), names.end());
  for (const std::string &name : names) {
    try {
      found.passports.push_back(parse_passport(folder + "/plans/" + name, name.substr(0, name.size() - 5)));
    } catch (const Failure &failure) {
      found.damaged.push_back(failure.text);
    }
  }
  std::sort(found.passports.begin(), found.passports.end(), [](const Passport &one, const Passport &other) {
    return std::tie(one.built, one.fingerprint) > std::tie(other.built, other.fingerprint);
  });
  return found;
}

std::vector<std::string> misfits(const Model &model, const Passport &passport, const Environment &here) {
  std::vector<std::string> found;
  const auto add = [&](const std::string &problem) {
    if (!problem.empty()) found.push_back(one_line(problem));
  };
  const std::string &file = passport.model;
  const bool has_form = file == "heads.onnx" || file == "heads_int8.onnx" || file == "detector.onnx" ||
                        file == "detector_int8.onnx";
  if (!has_form) add("built from " + file + ", expected heads.onnx or detector.onnx");
  if (passport.runtime_library != "tensorrt") {
    add("built by " + passport.runtime_library + ", which this library does not use: Python's Detector does");
    return found;
  }
  if (!is_of_this_model(model, passport)) add("the model changed since it was built");
  const Machine &built = passport.machine;
  if (built.system != here.machine.system || built.architecture != here.machine.architecture) {
    add("built on " + built.system + " " + built.architecture + ", this is " + here.machine.system + " " +
        here.machine.architecture);
  }
  add(version_problem(passport, here));
  add(gpu_problem(passport, here.machine));
  add(plugin_problem(passport, here));
  return found;
}

std::string read_plan(const std::string &folder, const Passport &passport) {
  const std::string path = folder + "/plans/" + passport.plan;
  std::string content = read_file(path, passport.plan_bytes, kBuildAgain);
  if (content.size() != passport.plan_bytes || sha256(content) != passport.plan_sha256) {
    fail(ODTRT_NO_PLAN, path + ": damaged, or not the plan that its passport describes; " + kBuildAgain);
  }
  const bool has_header = content.size() >= 28 && content.compare(0, 4, "ftrt") == 0 &&
                          content.compare(4, 4, std::string(4, '\0')) == 0;
  const Version built = version_order(passport.version);
  if (has_header && compare(built, {8, 6}) >= 0) {
    Version header;
    for (size_t at = 24; at < 28; ++at) header.push_back(static_cast<unsigned char>(content[at]));
    if (compare(header, built) != 0) {
      fail(ODTRT_NO_PLAN, path + ": its header and its passport name different versions of TensorRT; " + kBuildAgain);
    }
  }
  return content;
}

Plugin identify_plugin(const std::string &path) {
  const std::string content = read_file(path, kLargestLibrary, "run `make plugin`, with nvcc and TensorRT's headers");
  const std::string entry("\0getCreators\0", 13);
  const bool is_v3 = content.find(entry) != std::string::npos;
  return {path, sha256(content), is_v3 ? "IPluginV3" : "IPluginV2DynamicExt"};
}

Machine this_machine() {
  Machine machine;
  utsname names{};
  if (uname(&names) == 0) {
    machine.system = names.sysname;
    machine.architecture = names.machine;
  }
  machine.is_jetson = access("/etc/nv_tegra_release", F_OK) == 0;
  return machine;
}

}  // namespace odtrt
