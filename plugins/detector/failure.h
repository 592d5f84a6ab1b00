// How the detector's functions report what went wrong: the C ABI turns a Failure into a status and a line of text.
#pragma once

#include <string>
#include <utility>

#include "odtrt_detector.h"

namespace odtrt {

struct Failure {
  odtrt_status status;
  std::string text;
};

[[noreturn]] inline void fail(odtrt_status status, std::string text) { throw Failure{status, std::move(text)}; }

// Of a function of the kernels.
inline void require_ok(odtrt_status status, const char *step) {
  if (status != ODTRT_OK) fail(status < 0 ? status : static_cast<odtrt_status>(ODTRT_NETWORK_FAILED),
                               std::string(step) + ": " + odtrt_error_string(status));
}

// Text from a file or another library on one line, without characters that a terminal would obey.
inline std::string one_line(const std::string &text) {
  std::string line;
  for (const char one : text) {
    const auto code = static_cast<unsigned char>(one);
    line += code < 0x20 || code == 0x7f ? ' ' : one;
  }
  return line.substr(0, 400);
}

}  // namespace odtrt
