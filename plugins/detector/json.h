// A strict reader of JSON: RFC 8259 in UTF-8, no name twice in one object, nothing behind the value.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace odtrt {

struct Json {
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  Kind kind = Kind::kNull;
  std::string token;  // of a null, a bool or a number: as it is written; of a string: with its quotes and escapes
  std::string text;   // of a string: its UTF-8
  std::vector<Json> items;
  std::map<std::string, Json> members;          // ordered as Python orders them: by code points
  std::map<std::string, std::string> own_names;  // of members: name -> as it is written

  // What Python's json.dumps(value, sort_keys=True) gives, if Python has written the value.
  std::string sorted() const;
};

// Throws std::invalid_argument with the reason, which names the byte.
Json parse_json(std::string_view content);

// The fields of a JSON object in a file. Each getter names the file and the field in its Failure, ODTRT_BAD_MODEL.
class Fields {
 public:
  // advice: what to do about a wrong field.
  Fields(const Json &object, std::string where, std::string advice);

  Fields object(const std::string &name) const;
  bool is_null(const std::string &name) const;
  bool has(const std::string &name) const { return json_.members.count(name) != 0; }
  const std::string &text(const std::string &name) const;
  bool flag(const std::string &name) const;
  int64_t whole(const std::string &name, int64_t low, int64_t high) const;
  double number(const std::string &name, double low, double high) const;
  std::vector<double> three(const std::string &name, double low, double high) const;
  const std::vector<Json> &list(const std::string &name) const;
  // Fails if there is a field that is not among these: its meaning is not known here.
  void only(std::initializer_list<const char *> names) const;
  const Json &json() const { return json_; }
  const std::string &where() const { return where_; }

  [[noreturn]] void refuse(const std::string &name, const std::string &expected) const;

 private:
  const Json &member(const std::string &name, Json::Kind kind, const char *expected) const;

  const Json &json_;
  std::string where_, advice_;
};

}  // namespace odtrt
