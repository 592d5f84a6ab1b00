#include "json.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <locale.h>
#include <stdexcept>

#include "failure.h"

namespace odtrt {
namespace {

constexpr int kDeepest = 32;

class Reader {
 public:
  explicit Reader(std::string_view content) : content_(content) {}

  Json document() {
    Json value = any(0);
    skip_space();
    if (at_ != content_.size()) refuse("something behind the value");
    return value;
  }

 private:
  [[noreturn]] void refuse(const char *what) const {
    throw std::invalid_argument(std::string(what) + " at byte " + std::to_string(at_));
  }

  bool at_end() const { return at_ == content_.size(); }
  char next() const { return at_end() ? '\0' : content_[at_]; }

  void skip_space() {
    while (!at_end() && (next() == ' ' || next() == '\n' || next() == '\r' || next() == '\t')) ++at_;
  }

  void require(char wanted, const char *what) {
    skip_space();
    if (at_end() || next() != wanted) refuse(what);
    ++at_;
  }

  bool takes(char wanted) {
    skip_space();
    const bool is_there = !at_end() && next() == wanted;
    if (is_there) ++at_;
    return is_there;
  }

  Json any(int depth) {
    if (depth > kDeepest) refuse("nested too deep");
    skip_space();
    if (at_end()) refuse("the end instead of a value");
    switch (next()) {
      case '{':
        return object(depth);
      case '[':
        return array(depth);
      case '"':
        return string();
      default:
        return scalar();
    }
  }

  Json object(int depth) {
    Json value;
    value.kind = Json::Kind::kObject;
    require('{', "no object");
    if (takes('}')) return value;
    do {
      skip_space();
      if (next() != '"') refuse("no name of a member");
      const Json name = string();
      require(':', "no colon");
      if (!value.members.emplace(name.text, any(depth + 1)).second) refuse("a name that is there twice");
      value.own_names.emplace(name.text, name.token);
    } while (takes(','));
    require('}', "neither comma nor end of the object");
    return value;
  }

  Json array(int depth) {
    Json value;
    value.kind = Json::Kind::kArray;
    require('[', "no list");
    if (takes(']')) return value;
    do value.items.push_back(any(depth + 1));
    while (takes(','));
    require(']', "neither comma nor end of the list");
    return value;
  }

  Json scalar() {
    const size_t start = at_;
    Json value;
    if (next() == '-' || is_digit(next())) {
      number();
      value.kind = Json::Kind::kNumber;
    } else {
      while (next() >= 'a' && next() <= 'z') ++at_;
      const std::string_view word = content_.substr(start, at_ - start);
      if (word == "null")
        value.kind = Json::Kind::kNull;
      else if (word == "true" || word == "false")
        value.kind = Json::Kind::kBool;
      else
        refuse("no value");
    }
    value.token = content_.substr(start, at_ - start);
    return value;
  }

  static bool is_digit(char one) { return one >= '0' && one <= '9'; }

  void digits() {
    if (!is_digit(next())) refuse("no digit");
    while (is_digit(next())) ++at_;
  }

  void number() {
    if (next() == '-') ++at_;
    if (next() == '0')
      ++at_;
    else
      digits();
    if (next() == '.') {
      ++at_;
      digits();
    }
    if (next() == 'e' || next() == 'E') {
      ++at_;
      if (next() == '+' || next() == '-') ++at_;
      digits();
    }
  }

  Json string() {
    const size_t start = at_++;
    Json value;
    value.kind = Json::Kind::kString;
    while (next() != '"') {
      if (at_end() || static_cast<unsigned char>(next()) < 0x20) refuse("no end of the text");
      if (next() == '\\')
        escape(value.text);
      else
        utf8(value.text);
    }
    ++at_;
    value.token = content_.substr(start, at_ - start);
    return value;
  }

  void escape(std::string &text) {
    ++at_;
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const size_t which = kNames.find(next());
    if (!at_end() && which != std::string_view::npos) {
      text += kMeanings[which];
      ++at_;
      return;
    }
    uint32_t code = unicode();
    if (code >= 0xD800 && code < 0xDC00) {
      if (next() != '\\') refuse("half a surrogate pair");
      ++at_;
      const uint32_t low = unicode();
      if (low < 0xDC00 || low > 0xDFFF) refuse("half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code <= 0xDFFF) {
      refuse("half a surrogate pair");
    }
    append(text, code);
  }

  uint32_t unicode() {
    if (next() != 'u') refuse("an unknown escape");
    ++at_;
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char one = next();
      const int digit = is_digit(one)                ? one - '0'
                        : one >= 'a' && one <= 'f' ? one - 'a' + 10
                        : one >= 'A' && one <= 'F' ? one - 'A' + 10
                                                   : -1;
      if (digit < 0) refuse("no hexadecimal digit");
      code = 16 * code + static_cast<uint32_t>(digit);
    }
    return code;
  }

  static void append(std::string &text, uint32_t code) {
    const auto add = [&](uint32_t byte) { text += static_cast<char>(byte); };
    if (code < 0x80) {
      add(code);
    } else if (code < 0x800) {
      add(0xC0 | code >> 6);
      add(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      add(0xE0 | code >> 12);
      add(0x80 | (code >> 6 & 0x3F));
      add(0x80 | (code & 0x3F));
    } else {
      add(0xF0 | code >> 18);
      add(0x80 | (code >> 12 & 0x3F));
      add(0x80 | (code >> 6 & 0x3F));
      add(0x80 | (code & 0x3F));
    }
  }

  // One character of UTF-8, without overlong forms and surrogates.
  void utf8(std::string &text) {
    const auto first = static_cast<unsigned char>(next());
    const int following = first < 0x80 ? 0 : first >= 0xC2 && first < 0xE0 ? 1 : first >= 0xE0 && first < 0xF0 ? 2
                                              : first >= 0xF0 && first < 0xF5                                ? 3
                                                                                                             : -1;
    if (following < 0 || at_ + static_cast<size_t>(following) >= content_.size()) refuse("no UTF-8");
    for (int i = 1; i <= following; ++i) {
      const auto byte = static_cast<unsigned char>(content_[at_ + static_cast<size_t>(i)]);
      const unsigned low = i > 1 ? 0x80 : first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
      const unsigned high = i > 1 ? 0xBF : first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
      if (byte < low || byte > high) refuse("no UTF-8");
    }
    text += content_.substr(at_, static_cast<size_t>(following) + 1);
    at_ += static_cast<size_t>(following) + 1;
  }

  std::string_view content_;
  size_t at_ = 0;
};

// The value of a number's token, rounded once, whatever the process's locale is.
double value_of(const std::string &token) {
  static const locale_t plain = newlocale(LC_ALL_MASK, "C", nullptr);
  return plain == nullptr ? std::strtod(token.c_str(), nullptr) : strtod_l(token.c_str(), nullptr, plain);
}

std::string shown(const Json &value) {
  if (value.kind == Json::Kind::kObject) return "an object";
  if (value.kind == Json::Kind::kArray) return "a list of " + std::to_string(value.items.size());
  return value.token.size() <= 60 ? value.token : value.token.substr(0, 60) + "...";
}

}  // namespace

std::string Json::sorted() const {
  std::string written;
  if (kind == Kind::kArray) {
    for (const Json &item : items) written += (written.empty() ? "" : ", ") + item.sorted();
    return "[" + written + "]";
  }
  if (kind != Kind::kObject) return token;
  for (const auto &[name, value] : members) {
    written += (written.empty() ? "" : ", ") + own_names.at(name) + ": " + value.sorted();
  }
  return "{" + written + "}";
}

Json parse_json(std::string_view content) { return Reader(content).document(); }

Fields::Fields(const Json &object, std::string where, std::string advice)
    : json_(object), where_(std::move(where)), advice_(std::move(advice)) {
  if (object.kind != Json::Kind::kObject) {
    fail(ODTRT_BAD_MODEL, where_ + ": " + one_line(shown(object)) + ", expected an object; " + advice_);
  }
}

void Fields::refuse(const std::string &name, const std::string &expected) const {
  const auto found = json_.members.find(name);
  const std::string what =
      found == json_.members.end() ? "missing field" : one_line(shown(found->second)) + ", expected " + expected;
  fail(ODTRT_BAD_MODEL, where_ + "." + name + ": " + what + "; " + advice_);
}

const Json &Fields::member(const std::string &name, Json::Kind kind, const char *expected) const {
  const auto found = json_.members.find(name);
  if (found == json_.members.end() || found->second.kind != kind) refuse(name, expected);
  return found->second;
}

Fields Fields::object(const std::string &name) const {
  return {member(name, Json::Kind::kObject, "an object"), where_ + "." + name, advice_};
}

bool Fields::is_null(const std::string &name) const {
  const auto found = json_.members.find(name);
  if (found == json_.members.end()) refuse(name, "");
  return found->second.kind == Json::Kind::kNull;
}

const std::string &Fields::text(const std::string &name) const {
  return member(name, Json::Kind::kString, "text").text;
}

bool Fields::flag(const std::string &name) const {
  return member(name, Json::Kind::kBool, "true or false").token == "true";
}

int64_t Fields::whole(const std::string &name, int64_t low, int64_t high) const {
  const std::string &token = member(name, Json::Kind::kNumber, "a whole number").token;
  if (token.find_first_of(".eE") != std::string::npos) refuse(name, "a whole number");
  const double value = value_of(token);  // exact below 2^53
  if (!(value >= static_cast<double>(low) && value <= static_cast<double>(high))) {
    refuse(name, std::to_string(low) + " to " + std::to_string(high));
  }
  return static_cast<int64_t>(value);
}

double Fields::number(const std::string &name, double low, double high) const {
  const double value = value_of(member(name, Json::Kind::kNumber, "a number").token);
  if (!(value >= low && value <= high)) refuse(name, "another number, see odtrt_lib/spec.py");
  return value;
}

std::vector<double> Fields::three(const std::string &name, double low, double high) const {
  std::vector<double> values;
  for (const Json &item : list(name)) {
    const double value = item.kind == Json::Kind::kNumber ? value_of(item.token) : std::nan("");
    if (!(value >= low && value <= high)) refuse(name, "3 numbers, see odtrt_lib/spec.py");
    values.push_back(value);
  }
  if (values.size() != 3) refuse(name, "3 numbers");
  return values;
}

const std::vector<Json> &Fields::list(const std::string &name) const {
  return member(name, Json::Kind::kArray, "a list").items;
}

void Fields::only(std::initializer_list<const char *> names) const {
  for (const auto &[name, value] : json_.members) {
    const auto is_it = [&name = name](const char *known) { return name == known; };
    if (std::none_of(names.begin(), names.end(), is_it)) {
      fail(ODTRT_BAD_MODEL, where_ + "." + one_line(name) + ": unknown field; " + advice_);
    }
  }
}

}  // namespace odtrt
