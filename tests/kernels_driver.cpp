// Runs the *_cpu functions over the cases of a file that tests/test_kernels.py writes: driver CASES RESULTS.
// Every array is memory of exactly its size, so that a sanitizer sees each byte that is touched beside it.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "odtrt.h"
#include "semantics.h"

namespace {

FILE *cases, *results;

void fail(const char *what) {
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(2);
}

template <typename Number>
bool try_read(Number *numbers, size_t count) {
  return std::fread(numbers, sizeof(Number), count, cases) == count;
}

template <typename Number>
Number read_one() {
  Number number;
  if (!try_read(&number, 1)) fail("the file of cases ends early");
  return number;
}

template <typename Number>
std::unique_ptr<Number[]> read_array(size_t count) {
  std::unique_ptr<Number[]> numbers(new Number[count]);
  if (!try_read(numbers.get(), count)) fail("the file of cases ends early");
  return numbers;
}

template <typename Number>
void write(const Number *numbers, size_t count) {
  if (std::fwrite(numbers, sizeof(Number), count, results) != count) fail("cannot write the results");
}

void run_postprocess() {
  const auto params = read_one<odtrt_postprocess_params>();
  const auto batch = read_one<int32_t>(), dtype = read_one<int32_t>(), has_windows = read_one<int32_t>(),
             num_threads = read_one<int32_t>();
  const size_t images = static_cast<size_t>(batch), rows = static_cast<size_t>(params.num_anchors);
  const size_t number = dtype == ODTRT_FLOAT16 ? 2 : 4;
  const auto encodings = read_array<char>(images * rows * 4 * number);
  const auto logits = read_array<char>(images * rows * static_cast<size_t>(params.num_columns) * number);
  const auto anchors = read_array<float>(rows * 4);
  const auto windows = read_array<float>(has_windows ? images * 4 : 0);
  const size_t most = images * static_cast<size_t>(params.max_total_detections);
  const std::unique_ptr<int32_t[]> num_detections(new int32_t[images]), classes(new int32_t[most]),
      own_anchors(new int32_t[most]);
  const std::unique_ptr<float[]> boxes(new float[most * 4]), scores(new float[most]);
  const odtrt_heads heads{encodings.get(), logits.get(), dtype, anchors.get(),
                          has_windows ? windows.get() : nullptr};
  const odtrt_detections out{num_detections.get(), boxes.get(), scores.get(), classes.get(), own_anchors.get()};
  const odtrt_status status = odtrt_postprocess_cpu(&params, batch, &heads, &out, num_threads);
  write(&status, 1);
  write(num_detections.get(), images);
  write(boxes.get(), most * 4);
  write(scores.get(), most);
  write(classes.get(), most);
  write(own_anchors.get(), most);
}

void run_nms() {
  const auto params = read_one<odtrt_nms_params>();
  const auto has_classes = read_one<int32_t>();
  const size_t count = static_cast<size_t>(params.num_boxes), most = static_cast<size_t>(params.max_kept);
  const auto boxes = read_array<float>(count * 4), scores = read_array<float>(count);
  const auto classes = read_array<int32_t>(has_classes ? count : 0);
  const std::unique_ptr<int32_t[]> kept(new int32_t[most]);
  int32_t num_kept = 0;
  const odtrt_status status = odtrt_nms_cpu(&params, boxes.get(), scores.get(),
                                            has_classes ? classes.get() : nullptr, kept.get(), &num_kept);
  write(&status, 1);
  write(&num_kept, 1);
  write(kept.get(), most);
}

void run_preprocess() {
  const auto params = read_one<odtrt_preprocess_params>();
  const auto num_threads = read_one<int32_t>();
  const size_t last_row = 3 * static_cast<size_t>(params.image_width);
  const size_t before = static_cast<size_t>(params.image_pitch) * static_cast<size_t>(params.image_height - 1);
  const auto image = read_array<uint8_t>(before + last_row);
  const size_t number = params.output_dtype == ODTRT_FLOAT16 ? 2 : 4;
  const size_t size =
      3 * number * static_cast<size_t>(params.output_height) * static_cast<size_t>(params.output_width);
  const std::unique_ptr<char[]> output(new char[size]);
  const odtrt_status status = odtrt_preprocess_cpu(&params, image.get(), output.get(), num_threads);
  write(&status, 1);
  write(output.get(), size);
}

void run_semantics() {
  const size_t count = static_cast<size_t>(read_one<int32_t>());
  const auto values = read_array<float>(count);
  const std::unique_ptr<float[]> found(new float[count]);
  for (size_t i = 0; i < count; ++i) found[i] = odtrt::exponential(values[i]);
  write(found.get(), count);
  for (size_t i = 0; i < count; ++i) found[i] = odtrt::sigmoid(values[i]);
  write(found.get(), count);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 3) fail("expected two arguments, the files of cases and of results");
  cases = std::fopen(argv[1], "rb");
  results = std::fopen(argv[2], "wb");
  if (cases == nullptr || results == nullptr) fail("cannot open the files");
  void (*const runs[])() = {run_postprocess, run_nms, run_preprocess, run_semantics};
  for (int32_t kind; try_read(&kind, 1);) {
    if (kind < 0 || kind > 3) fail("unknown kind of case");
    runs[kind]();
  }
  return std::fclose(results) == 0 ? 0 : 2;
}
