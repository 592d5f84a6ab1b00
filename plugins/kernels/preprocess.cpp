// odtrt_preprocess_cpu works row by row, so that intermediate values stay in the cache.
#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "check.h"
#include "half.h"
#include "parallel.h"
#include "semantics.h"

namespace odtrt {
namespace {

constexpr size_t kPixelsOfAThread = 1 << 16;

using Floats4 = float __attribute__((vector_size(16)));

// semantics.h's `between` for four channels at a time.
Floats4 between_pixels(Floats4 low, Floats4 high, float weight) { return low + (high - low) * weight; }

struct Column {
  size_t left, right;  // bytes from the start of a row
  float weight;
};

struct Columns {
  std::vector<Column> columns;
  size_t with_next;  // for so many columns from the left, the row has a fourth byte behind each pixel's three
  bool interpolates;
};

Columns columns_of(const odtrt_preprocess_params &params) {
  Columns found{std::vector<Column>(static_cast<size_t>(params.true_width)), 0, false};
  const float in_over_out =
      divide(static_cast<float>(params.image_width), static_cast<float>(params.true_width));
  for (size_t i = 0; i < found.columns.size(); ++i) {
    const Sample at = sample(static_cast<int32_t>(i), params.image_width, in_over_out);
    found.columns[i] = {size_t{3} * static_cast<size_t>(at.lower), size_t{3} * static_cast<size_t>(at.upper),
                        at.weight};
    found.interpolates |= at.weight != 0.0f;
    if (at.upper < params.image_width - 1) found.with_next = i + 1;
  }
  return found;
}

// Loads the three channels of a pixel. With kBytes = 4 it also loads the byte behind them, which is quicker.
template <size_t kBytes>
Floats4 pixel_at(const uint8_t *bytes) {
#if defined(__SSE2__) || (defined(__ARM_NEON) && defined(__aarch64__))
  uint32_t pixel = 0;
  std::memcpy(&pixel, bytes, kBytes);
#if defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128(),
                wide = _mm_unpacklo_epi8(_mm_cvtsi32_si128(static_cast<int>(pixel)), zero);
  return _mm_cvtepi32_ps(_mm_unpacklo_epi16(wide, zero));
#else
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(pixel)))));
#endif
#else
  return Floats4{static_cast<float>(bytes[0]), static_cast<float>(bytes[1]), static_cast<float>(bytes[2]),
                 0.0f};
#endif
}

void store(float *at, Floats4 values) { std::memcpy(at, &values, sizeof values); }

// Resizes a row of the image to the output's width. `line` gets four floats a pixel; the last one has no meaning.
void resize_line(const uint8_t *row, const Columns &columns, float *line) {
  const Column *const own = columns.columns.data();
  const size_t width = columns.columns.size();
  size_t i = 0;
  if (columns.interpolates) {
    for (; i < columns.with_next; ++i) {
      store(line + 4 * i,
            between_pixels(pixel_at<4>(row + own[i].left), pixel_at<4>(row + own[i].right), own[i].weight));
    }
  } else {
    for (; i < columns.with_next; ++i) store(line + 4 * i, pixel_at<4>(row + own[i].left));
  }
  for (; i < width; ++i) {
    store(line + 4 * i,
          between_pixels(pixel_at<3>(row + own[i].left), pixel_at<3>(row + own[i].right), own[i].weight));
  }
}

// The two resized lines that an output row lies between. A line that the row before used is not computed again.
class Lines {
 public:
  Lines(const odtrt_preprocess_params &params, const Columns &columns, const uint8_t *image)
      : image_(image), pitch_(params.image_pitch), columns_(columns) {
    for (auto &line : lines_) line.resize(columns.columns.size() * 4);
  }

  // The resized line of an image row. The line of row `needed_too` stays valid.
  const float *get(int32_t row, int32_t needed_too) {
    for (int i = 0; i < 2; ++i) {
      if (rows_[i] == row) return lines_[i].data();
    }
    const int i = rows_[0] == needed_too ? 1 : 0;
    resize_line(image_ + pitch_ * row, columns_, lines_[i].data());
    rows_[i] = row;
    return lines_[i].data();
  }

 private:
  const uint8_t *image_;
  const int64_t pitch_;
  const Columns &columns_;
  std::vector<float> lines_[2];
  int32_t rows_[2] = {-1, -1};
};

struct Normalisation {
  float scale[3], offset[3];  // in the order of the image's channels
};

// Interpolates between two lines and normalises. planes[i] receives `count` floats of the image's channel i.
void normalise(const float *top, const float *bottom, float weight, size_t count, const Normalisation &by,
               float *const planes[3]) {
  const Normalisation n = by;
  float *__restrict const first = planes[0], *__restrict const second = planes[1],
                          *__restrict const third = planes[2];
  for (size_t i = 0; i < count; ++i) {
    const float *const above = top + 4 * i, *const below = bottom + 4 * i;
    first[i] = add(mul(between(above[0], below[0], weight), n.scale[0]), n.offset[0]);
    second[i] = add(mul(between(above[1], below[1], weight), n.scale[1]), n.offset[1]);
    third[i] = add(mul(between(above[2], below[2], weight), n.scale[2]), n.offset[2]);
  }
}

void assign(float &to, float value) { to = value; }
void assign(uint16_t &to, float value) { to = half_of_float(value); }

template <typename Number>
class Output {
 public:
  Output(const odtrt_preprocess_params &params, void *output)
      : output_(static_cast<Number *>(output)),
        width_(static_cast<size_t>(params.output_width)),
        channel_stride_(params.output_nhwc ? 1 : width_ * static_cast<size_t>(params.output_height)),
        pixel_stride_(params.output_nhwc ? 3 : 1) {}

  Number *row(size_t y, size_t channel) const {
    return output_ + y * width_ * pixel_stride_ + channel * channel_stride_;
  }
  bool is_planar() const { return pixel_stride_ == 1; }

  void write(size_t y, size_t channel, const float *values, size_t count) const {
    Number *const own = row(y, channel);
    if (is_planar()) {
      for (size_t x = 0; x < count; ++x) assign(own[x], values[x]);
    } else {
      for (size_t x = 0; x < count; ++x) assign(own[3 * x], values[x]);
    }
  }

  void pad(size_t y, size_t channel, size_t first_x, float value) const {
    Number padding;
    assign(padding, value);
    Number *const own = row(y, channel);
    for (size_t x = first_x; x < width_; ++x) own[x * pixel_stride_] = padding;
  }

 private:
  Number *const output_;
  const size_t width_, channel_stride_, pixel_stride_;
};

// Where `normalise` can write a row directly; nullptr if the values must be converted or interleaved first.
float *direct_row(const Output<float> &output, size_t y, size_t channel) {
  return output.is_planar() ? output.row(y, channel) : nullptr;
}
float *direct_row(const Output<uint16_t> &, size_t, size_t) { return nullptr; }

template <typename Number>
void preprocess_rows(const odtrt_preprocess_params &params, const Columns &columns, const uint8_t *image,
                     const Output<Number> &output, int32_t first_y, int32_t last_y) {
  const size_t width = columns.columns.size();
  Lines lines(params, columns, image);
  std::vector<float> scratch(width * 3);
  Normalisation by;
  for (size_t i = 0; i < 3; ++i) {
    const size_t channel = params.bgr ? 2 - i : i;
    by.scale[i] = params.scale[channel];
    by.offset[i] = params.offset[channel];
  }
  const float in_over_out =
      divide(static_cast<float>(params.image_height), static_cast<float>(params.true_height));
  for (int32_t row = first_y; row < last_y; ++row) {
    const size_t y = static_cast<size_t>(row);
    if (row >= params.true_height) {
      for (size_t channel = 0; channel < 3; ++channel) output.pad(y, channel, 0, params.pad_value[channel]);
      continue;
    }
    const Sample at = sample(row, params.image_height, in_over_out);
    const int32_t lower = at.lower, upper = at.weight != 0.0f ? at.upper : at.lower;
    const float *const top = lines.get(lower, upper), *const bottom = lines.get(upper, lower);
    float *planes[3];
    for (size_t i = 0; i < 3; ++i) {
      float *const direct = direct_row(output, y, params.bgr ? 2 - i : i);
      planes[i] = direct != nullptr ? direct : scratch.data() + i * width;
    }
    normalise(top, bottom, at.weight, width, by, planes);
    for (size_t i = 0; i < 3; ++i) {
      const size_t channel = params.bgr ? 2 - i : i;
      if (direct_row(output, y, channel) == nullptr) output.write(y, channel, planes[i], width);
      output.pad(y, channel, width, params.pad_value[channel]);
    }
  }
}

template <typename Number>
void preprocess(const odtrt_preprocess_params &params, const uint8_t *image, void *output,
                int32_t num_threads) {
  const Columns columns = columns_of(params);
  const Output<Number> rows(params, output);
  const size_t height = static_cast<size_t>(params.output_height);
  const size_t pixels = static_cast<size_t>(params.true_height) * static_cast<size_t>(params.true_width);
  const int threads = threads_for(pixels, kPixelsOfAThread, num_threads);
  const size_t tasks = threads == 1 ? 1 : std::min(height, static_cast<size_t>(threads) * 4);
  for_each_index(tasks, threads, [&](size_t task) {
    preprocess_rows(params, columns, image, rows, static_cast<int32_t>(height * task / tasks),
                    static_cast<int32_t>(height * (task + 1) / tasks));
  });
}

}  // namespace
}  // namespace odtrt

odtrt_status odtrt_preprocess_cpu(const odtrt_preprocess_params *params, const uint8_t *image, void *output,
                                  int32_t num_threads) {
  if (!odtrt::is_valid(params) || image == nullptr || output == nullptr ||
      !odtrt::is_aligned(output, odtrt::alignment_of(params->output_dtype)) || num_threads < 0) {
    return ODTRT_INVALID_ARGUMENT;
  }
  return odtrt::status_of([&] {
    if (params->output_dtype == ODTRT_FLOAT16) {
      odtrt::preprocess<uint16_t>(*params, image, output, num_threads);
    } else {
      odtrt::preprocess<float>(*params, image, output, num_threads);
    }
  });
}
