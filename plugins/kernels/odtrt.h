/* odtrt: preprocessing and post-processing of a detector, on a CPU and on an NVIDIA GPU.
 *
 * odtrt_postprocess_*   raw heads -> detections, the TensorFlow OD API's own post-processing, exactly
 * odtrt_nms_*           boxes and scores -> the boxes that non-maximum suppression keeps
 * odtrt_preprocess_*    uint8 image -> network input, the OD API's own resizer and normalisation
 *
 * Each exists as *_cpu, which runs threads of its own, and as *_cuda, which enqueues kernels on a stream.
 * Both give the same bits from the same inputs, because semantics.h defines exp, sigmoid and softmax operation by
 * operation.
 *
 * A *_cuda call allocates nothing, does not wait for the device, uses no memory but its arguments and the
 * workspace, and may be captured in a CUDA graph. The workspace needs no initialisation; a *_workspace function
 * returns its size, and two calls that may run at the same time need one each. *_cuda takes device pointers, *_cpu host
 * pointers. The structs lie in host memory and are read only during the call.
 *
 * Boxes are [ymin, xmin, ymax, xmax]. Arrays are dense, in C order. Device arrays are aligned to 16 bytes, host
 * arrays and structs as the compiler aligns them; a misaligned host pointer is an invalid argument.
 * Every function returns an odtrt_status: 0, a negative number listed here, or a positive cudaError_t.
 */
#ifndef ODTRT_H
#define ODTRT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ODTRT_ABI_VERSION 1

#if defined(_WIN32)
#define ODTRT_API __declspec(dllexport)
#else
#define ODTRT_API __attribute__((visibility("default")))
#endif

typedef int32_t odtrt_status;

enum {
  ODTRT_OK = 0,
  ODTRT_INVALID_ARGUMENT = -1,    /* a null or misaligned pointer, a size or a setting out of its range */
  ODTRT_WORKSPACE_TOO_SMALL = -2, /* less than *_workspace() says */
  ODTRT_NO_CUDA = -3,             /* this library was built without CUDA */
  ODTRT_OUT_OF_MEMORY = -4        /* host memory; *_cpu only */
};

typedef enum { ODTRT_FLOAT32 = 0, ODTRT_FLOAT16 = 1 } odtrt_dtype;
typedef enum { ODTRT_SIGMOID = 0, ODTRT_SOFTMAX = 1, ODTRT_IDENTITY = 2 } odtrt_score_converter;

/* The fields of spec.json that decide about detections; see odtrt_lib/spec.py. */
typedef struct {
  int32_t num_anchors;              /* N >= 1 */
  int32_t num_columns;              /* of class_logits, the background included; N * num_columns < 2^31 */
  int32_t background_column;        /* 1: column 0 is the background. Classes are counted without it */
  int32_t score_converter;          /* odtrt_score_converter, applied to logit * logit_factor */
  float logit_factor;               /* float32(1 / logit_scale); finite and positive, as the next four */
  float box_scales[4];              /* y, x, height, width: the encodings are divided by them */
  float score_threshold;            /* a score must be greater */
  float iou_threshold;              /* an overlap must be greater to suppress */
  int32_t max_detections_per_class; /* >= 1; counted before clipping, as the OD API does */
  int32_t max_total_detections;     /* M, 1 to 4096 */
  int32_t class_agnostic;           /* 1: one candidate an anchor, its best class */
  int32_t change_coordinate_frame;  /* 1: boxes are given relative to the clip window */
} odtrt_postprocess_params;

typedef struct {
  const void *box_encodings; /* dtype [batch, N, 4]: ty, tx, th, tw */
  const void *class_logits;  /* dtype [batch, N, num_columns] */
  int32_t dtype;             /* odtrt_dtype of both */
  const float *anchors;      /* [N, 4]: ycenter, xcenter, height, width; normalised */
  const float *clip_windows; /* [batch, 4], normalised; NULL: 0, 0, 1, 1 for every image */
} odtrt_heads;

/* Best score first, padded with zeros. */
typedef struct {
  int32_t *num_detections; /* [batch] */
  float *boxes;            /* [batch, M, 4], normalised */
  float *scores;           /* [batch, M] */
  int32_t *classes;        /* [batch, M], 0-based, without the background */
  int32_t *anchors;        /* [batch, M], the row of the heads of each detection; NULL: not wanted */
} odtrt_detections;

/* num_threads: 0 for all that the machine has. */
ODTRT_API odtrt_status odtrt_postprocess_cpu(const odtrt_postprocess_params *params, int32_t batch,
                                             const odtrt_heads *heads, const odtrt_detections *out,
                                             int32_t num_threads);

/* Bytes of device memory that odtrt_postprocess_cuda needs; 0 if an argument is invalid. */
ODTRT_API size_t odtrt_postprocess_workspace(const odtrt_postprocess_params *params, int32_t batch);

ODTRT_API odtrt_status odtrt_postprocess_cuda(const odtrt_postprocess_params *params, int32_t batch,
                                              const odtrt_heads *heads, const odtrt_detections *out,
                                              void *workspace, size_t workspace_size, void *stream);

/* Greedy non-maximum suppression: from the best score down (the lower index first if scores are equal), a
 * box is kept unless its IoU with a kept one of its class is greater than iou_threshold.
 * boxes float32 [n, 4], scores float32 [n], classes int32 [n] or NULL: all boxes compete.
 * Scores that are not greater than score_threshold are left out: NaN always, -infinity too.
 * kept int32 [max_kept], indices, best first, then -1; num_kept int32 [1]. 0 <= n < 2^24, max_kept >= 1. */
typedef struct {
  int32_t num_boxes;
  int32_t max_kept;
  float score_threshold; /* -INFINITY: all that are finite */
  float iou_threshold;
} odtrt_nms_params;

ODTRT_API odtrt_status odtrt_nms_cpu(const odtrt_nms_params *params, const float *boxes, const float *scores,
                                     const int32_t *classes, int32_t *kept, int32_t *num_kept);

ODTRT_API size_t odtrt_nms_workspace(const odtrt_nms_params *params);

ODTRT_API odtrt_status odtrt_nms_cuda(const odtrt_nms_params *params, const float *boxes, const float *scores,
                                      const int32_t *classes, int32_t *kept, int32_t *num_kept, void *workspace,
                                      size_t workspace_size, void *stream);

/* One image. The output is output_height x output_width; the resized image covers true_height x true_width of
 * it, at the top left, and pad_value the rest. Output pixel i of an axis samples the image at
 * i * (float32(in) / float32(out)), bilinearly: TensorFlow 1's ResizeBilinear. A value p enters as
 * p * scale + offset. A region of an image: pass its first pixel, its size and the image's pitch. */
typedef struct {
  int32_t image_height, image_width; /* of the region that is read */
  int64_t image_pitch;               /* bytes from one row to the next, >= 3 * image_width */
  int32_t bgr;                       /* 1: blue first, as OpenCV has it */
  int32_t true_height, true_width;   /* 1 to output_* */
  int32_t output_height, output_width;
  float scale[3], offset[3]; /* R, G, B */
  float pad_value[3];        /* R, G, B, in the units of the normalised image */
  int32_t output_dtype;      /* odtrt_dtype */
  int32_t output_nhwc;       /* 1: [height, width, 3]; 0: [3, height, width] */
} odtrt_preprocess_params;

/* image: uint8 [image_height, image_pitch]; output: [3, output_height, output_width], or HWC; RGB. */
ODTRT_API odtrt_status odtrt_preprocess_cpu(const odtrt_preprocess_params *params, const uint8_t *image,
                                            void *output, int32_t num_threads);

ODTRT_API odtrt_status odtrt_preprocess_cuda(const odtrt_preprocess_params *params, const uint8_t *image,
                                             void *output, void *stream);

/* One line about a status, in static memory. */
ODTRT_API const char *odtrt_error_string(odtrt_status status);

/* ODTRT_ABI_VERSION of the library that is loaded. */
ODTRT_API int32_t odtrt_abi_version(void);

/* The GPU architectures that the kernels were compiled for, e.g. "75 80 86 87 89 90"; "" without CUDA. */
ODTRT_API const char *odtrt_cuda_architectures(void);

#ifdef __cplusplus
}
#endif
#endif
