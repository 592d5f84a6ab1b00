/* odtrt: a detector in C. Opens a model folder, takes pictures, gives boxes in pixels.
 *
 *   odtrt_detector_open      a model folder, on the GPU by TensorRT or with a network that the caller runs
 *   odtrt_detector_infer     a picture -> its detections
 *   odtrt_detector_infer_async, _result   the same, without waiting in between
 *   odtrt_detector_slot, _release         memory to decode a picture into, so that it need not be copied
 *   odtrt_detector_close     gives everything back
 *
 * Preprocessing and post-processing are those of ../kernels/odtrt.h: with equal heads the detections are, bit for bit,
 * those of odtrt_lib.detector.Detector in Python.
 *
 * Every function that can fail returns an odtrt_status, and on failure writes one line about it into `error`:
 * what was found, where, what was expected, what to do. It writes at most error_size bytes, the final 0 included; a
 * null `error` is allowed. No exception leaves a function. Each struct but odtrt_detection begins with its size, sizeof
 * of the caller's struct, so that later versions can add fields at its end.
 *
 * A detector may be used from several threads. odtrt_detector_close must be its last call. It must not be used in the
 * child of a fork.
 */
#ifndef ODTRT_DETECTOR_H
#define ODTRT_DETECTOR_H

#include <stddef.h>
#include <stdint.h>

#include "../kernels/odtrt.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ODTRT_DETECTOR_ABI_VERSION 1

/* They continue those of odtrt.h. */
enum {
  ODTRT_TIMEOUT = -5,        /* the result is not there yet; its ticket stays valid */
  ODTRT_BUSY = -6,           /* all slots hold pictures without a result: fetch one, or drop this picture */
  ODTRT_UNKNOWN_TICKET = -7, /* no such picture, or its slot has been used again */
  ODTRT_BAD_MODEL = -8,      /* a file of the folder is missing, damaged or not what the seal says */
  ODTRT_NO_PLAN = -9,        /* no plan in the folder may be used here */
  ODTRT_NETWORK_FAILED = -10 /* the caller's network, TensorRT or CUDA failed */
};

typedef struct odtrt_detector odtrt_detector;

/* A network that the caller runs on the CPU. input: float32 [3, height, width], normalised. It writes box_encodings,
 * float32 [num_anchors, 4], and class_logits, float32 [num_anchors, num_columns], and returns 0; or another number, and
 * a line into `error`. It is called from one thread at a time, which is not the caller's. */
typedef int32_t (*odtrt_network)(void *context, const float *input, float *box_encodings, float *class_logits,
                                 char *error, size_t error_size);

typedef struct {
  size_t struct_size;
  const char *folder;    /* the model folder: spec.json, anchors.npy, log.jsonl; plans/ for the GPU */
  odtrt_network network; /* NULL: a plan of TensorRT, on the first GPU that CUDA shows */
  void *network_context; /* the first argument of `network` */
  const char *plugin;    /* libodtrt_tensorrt.so, for plans that contain the post-processing; NULL: others only */
  const char *plan;      /* a fingerprint in plans/; NULL: the newest plan that may be used here */
  int32_t num_slots;     /* pictures that may be unfinished or wait for their result to be fetched, 1 to 16; 0: 2 */
} odtrt_detector_options;

typedef enum { ODTRT_RGB8 = 0, ODTRT_BGR8 = 1 } odtrt_pixel_format;

typedef struct {
  size_t struct_size;
  uint8_t *data; /* [height, pitch]; read only, unless it is a slot */
  int32_t height, width;
  int64_t pitch;  /* bytes from one row to the next; 0: 3 * width */
  int32_t format; /* odtrt_pixel_format */
} odtrt_image;

typedef struct {
  float box[4]; /* ymin, xmin, ymax, xmax, in pixels of the picture */
  float score;
  int32_t class_id; /* as in the label map */
} odtrt_detection;

/* The caller sets `detections` and `capacity`, at least max_detections of odtrt_detector_shape, so that none is ever
 * left out. The memory is the caller's, so results of several threads cannot meet. */
typedef struct {
  size_t struct_size;
  odtrt_detection *detections; /* filled, best score first */
  int32_t capacity;
  int32_t num_detections; /* filled */
  uint64_t ticket;        /* filled: of the picture */
} odtrt_result;

/* What the network's input and outputs look like. */
typedef struct {
  size_t struct_size;
  int32_t batch;                    /* pictures in the network's input; 0: any number. `network` gets one */
  int32_t height, width;            /* of a picture in it */
  int32_t num_anchors, num_columns; /* of the raw heads */
  int32_t num_classes;
  int32_t max_detections;
} odtrt_detector_shape;

/* Opens a model folder. The hashes of its files are compared with log.jsonl, and a plan with its passport, the TensorRT
 * and the GPU that are here, before any of it is used. *detector is NULL after a failure. */
ODTRT_API odtrt_status odtrt_detector_open(const odtrt_detector_options *options, odtrt_detector **detector,
                                           char *error, size_t error_size);

/* Waits for its turn and for the result. */
ODTRT_API odtrt_status odtrt_detector_infer(odtrt_detector *detector, const odtrt_image *image,
                                            odtrt_result *result, char *error, size_t error_size);

/* Copies the picture, unless it is in a slot, and returns; pictures are worked on in order. Never waits for a slot:
 * ODTRT_BUSY if all are in use. On the GPU the first picture of a size in a slot is an exception: it runs, and the CUDA
 * graph of that size is recorded, before this returns. */
ODTRT_API odtrt_status odtrt_detector_infer_async(odtrt_detector *detector, const odtrt_image *image,
                                                  uint64_t *ticket, char *error, size_t error_size);

/* The result of a ticket. It can be fetched more than once, and stays until num_slots - 1 further pictures have been
 * submitted or slots lent, at least. timeout_us: how long to wait; 0: not at all; negative:
 * without limit. A picture whose network failed gives ODTRT_NETWORK_FAILED. */
ODTRT_API odtrt_status odtrt_detector_result(odtrt_detector *detector, uint64_t ticket, int64_t timeout_us,
                                             odtrt_result *result, char *error, size_t error_size);

/* Lends memory for an RGB8 picture of that size; on the GPU it is pinned. *image describes it; change `format` if the
 * picture is BGR. infer and infer_async with this image->data take the slot back, release gives it back unused. */
ODTRT_API odtrt_status odtrt_detector_slot(odtrt_detector *detector, int32_t height, int32_t width,
                                           odtrt_image *image, char *error, size_t error_size);
ODTRT_API odtrt_status odtrt_detector_release(odtrt_detector *detector, const odtrt_image *image, char *error,
                                              size_t error_size);

ODTRT_API odtrt_status odtrt_detector_get_shape(const odtrt_detector *detector, odtrt_detector_shape *shape);

/* The name of a class, UTF-8, as long as the detector is open; NULL if there is no such id. */
ODTRT_API const char *odtrt_detector_class_name(const odtrt_detector *detector, int32_t class_id);

/* One line into `text`: what runs the network, which plan, and whether as a CUDA graph, or why not. */
ODTRT_API void odtrt_detector_describe(odtrt_detector *detector, char *text, size_t text_size);

/* Waits for running work and frees everything. NULL is allowed. */
ODTRT_API void odtrt_detector_close(odtrt_detector *detector);

/* ODTRT_DETECTOR_ABI_VERSION of the library that is loaded. */
ODTRT_API int32_t odtrt_detector_abi_version(void);

#ifdef __cplusplus
}
#endif
#endif
