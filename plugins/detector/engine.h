/* Between cuda_backend.cpp, which knows no TensorRT, and engine_tensorrt.cpp, which is compiled once for each major
 * version of TensorRT, because the tables of virtual functions differ between them. libodtrt_engine8.so, 10 and 11 each
 * export odtrt_engine_functions.
 *
 * All texts are NUL-terminated. A function that can fail returns 0 or a null pointer then, and writes TensorRT's
 * reasons into `error`. Not for several threads at a time. */
#ifndef ODTRT_ENGINE_H
#define ODTRT_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ODTRT_ENGINE_ABI_VERSION 1
#define ODTRT_ENGINE_MAX_DIMENSIONS 8

typedef enum { ODTRT_ENGINE_FLOAT32 = 0, ODTRT_ENGINE_INT32 = 1, ODTRT_ENGINE_OTHER = 2 } odtrt_engine_dtype;

typedef struct {
  const char *name;
  int32_t is_input;
  int32_t dtype;          /* odtrt_engine_dtype */
  int32_t num_dimensions; /* -1 if there are more than ODTRT_ENGINE_MAX_DIMENSIONS */
  int64_t dimensions[ODTRT_ENGINE_MAX_DIMENSIONS]; /* -1: dynamic */
} odtrt_engine_tensor;

typedef struct odtrt_engine odtrt_engine;

typedef struct {
  int32_t abi_version; /* ODTRT_ENGINE_ABI_VERSION */
  int32_t tensorrt_major;

  /* nvinfer: the handle of libnvinfer, of the same major version. plugin: a library, or null. CUDA must work: without
   * it TensorRT 10 and 11 give a runtime that crashes. */
  odtrt_engine *(*load)(void *nvinfer, const char *plugin, const void *plan, size_t plan_size,
                        int32_t is_version_compatible, char *error, size_t error_size);
  int32_t (*num_tensors)(const odtrt_engine *engine);
  /* The i-th input or output, as it is in the plan. */
  void (*tensor)(const odtrt_engine *engine, int32_t i, odtrt_engine_tensor *tensor);
  /* The smallest value of a dynamic first dimension in the first profile; 0: unknown. */
  int64_t (*min_batch)(const odtrt_engine *engine, const char *input);
  int32_t (*set_shape)(odtrt_engine *engine, const char *input, int32_t num_dimensions, const int64_t *dimensions,
                       char *error, size_t error_size);
  /* The shape of a tensor, once the shapes of all inputs are set. */
  void (*shape)(odtrt_engine *engine, const char *name, odtrt_engine_tensor *tensor);
  int32_t (*set_address)(odtrt_engine *engine, const char *name, void *address, char *error, size_t error_size);
  /* stream: a cudaStream_t. */
  int32_t (*enqueue)(odtrt_engine *engine, void *stream, char *error, size_t error_size);
  /* No work of the engine may be running. Null is allowed. */
  void (*close)(odtrt_engine *engine);
} odtrt_engine_function_table;

__attribute__((visibility("default"))) const odtrt_engine_function_table *odtrt_engine_functions(void);

#ifdef __cplusplus
}
#endif
#endif
