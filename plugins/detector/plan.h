// The plans of a model folder, and whether one may be given to TensorRT here. odtrt_lib/engine/passport.py and
// odtrt_lib/portability/policy.py say the same in Python, with the sources of the rules.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "model.h"

namespace odtrt {

struct Machine {
  std::string system, architecture;
  std::string gpu, compute_capability;         // "": not known
  int64_t sm_count = -1, gpu_memory_mb = -1;  // -1: not known
  bool is_jetson = false;
};

struct Plugin {
  std::string path, sha256, abi;
};

// The machine and the software that are to run a plan. version: TensorRT's, e.g. "10.3.0".
struct Environment {
  Machine machine;
  std::string version;
  std::optional<Plugin> plugin;
};

// What is used of plans/<fingerprint>.json.
struct Passport {
  std::string fingerprint, plan, plan_sha256, model, onnx_sha256, spec_sha256, runtime_library, version, precision;
  std::string hardware_compatibility, built;
  size_t plan_bytes;
  bool version_compatible;
  std::optional<Plugin> plugin;
  Machine machine;
  std::string spec_part_sha256;  // of the part of spec.json that went into the plan; "": not recorded

  bool is_fused() const { return model.rfind("detector", 0) == 0; }
};

// The readable passports of a folder, newest first; a line for each that is not.
struct Survey {
  std::vector<Passport> passports;
  std::vector<std::string> damaged;
};
Survey survey(const std::string &folder);

// Why the plan may not be used, as far as it can be said without reading the plan; empty if it may.
std::vector<std::string> misfits(const Model &model, const Passport &passport, const Environment &here);

// The bytes of the plan, which are those that the passport describes. Throws Failure, ODTRT_NO_PLAN.
std::string read_plan(const std::string &folder, const Passport &passport);

// Throws Failure, ODTRT_BAD_MODEL, if the library cannot be read.
Plugin identify_plugin(const std::string &path);

// The system, the architecture and whether it is a Jetson; without the GPU.
Machine this_machine();

}  // namespace odtrt
