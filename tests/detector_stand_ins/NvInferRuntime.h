// The part of TensorRT that plugins/detector/engine_tensorrt.cpp uses, with the names and types that NVIDIA's
// headers give it in the version STAND_IN_TENSORRT, major * 100 + minor; nvinfer.cpp implements it. It is no copy: its
// tables of virtual functions are others. test_native_detector.py also compiles with the real headers, where they are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

#define NV_TENSORRT_MAJOR (STAND_IN_TENSORRT / 100)
#define NV_TENSORRT_MINOR (STAND_IN_TENSORRT % 100)
#define NV_TENSORRT_VERSION \
  (NV_TENSORRT_MAJOR < 10 ? NV_TENSORRT_MAJOR * 1000 + NV_TENSORRT_MINOR * 100 \
                          : NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100)

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class ErrorCode : int32_t { kSUCCESS = 0, kUNSPECIFIED_ERROR = 1 };

struct Dims {
  int32_t nbDims;
#if STAND_IN_TENSORRT < 1000
  int32_t d[8];
#else
  int64_t d[8];
#endif
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, const char *message) noexcept = 0;
  virtual ~ILogger() = default;
};

class IErrorRecorder {
 public:
  using ErrorDesc = const char *;
  using RefCount = int32_t;
  virtual ~IErrorRecorder() noexcept = default;
  virtual int32_t getNbErrors() const noexcept = 0;
  virtual ErrorCode getErrorCode(int32_t index) const noexcept = 0;
  virtual ErrorDesc getErrorDesc(int32_t index) const noexcept = 0;
  virtual bool hasOverflowed() const noexcept = 0;
  virtual void clear() noexcept = 0;
  virtual bool reportError(ErrorCode value, ErrorDesc description) noexcept = 0;
  virtual RefCount incRefCount() noexcept = 0;
  virtual RefCount decRefCount() noexcept = 0;
};

class IExecutionContext {
 public:
  virtual ~IExecutionContext() = default;
  virtual void setErrorRecorder(IErrorRecorder *recorder) noexcept = 0;
  virtual bool setInputShape(const char *name, const Dims &shape) noexcept = 0;
  virtual Dims getTensorShape(const char *name) const noexcept = 0;
  virtual bool setTensorAddress(const char *name, void *address) noexcept = 0;
  virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

class ICudaEngine {
 public:
  virtual ~ICudaEngine() = default;
  virtual IExecutionContext *createExecutionContext() noexcept = 0;
  virtual int32_t getNbIOTensors() const noexcept = 0;
  virtual const char *getIOTensorName(int32_t index) const noexcept = 0;
  virtual TensorIOMode getTensorIOMode(const char *name) const noexcept = 0;
  virtual DataType getTensorDataType(const char *name) const noexcept = 0;
  virtual Dims getTensorShape(const char *name) const noexcept = 0;
  virtual Dims getProfileShape(const char *name, int32_t profile, OptProfileSelector select) const noexcept = 0;
};

#if STAND_IN_TENSORRT >= 806
class IPluginRegistry {
 public:
  using PluginLibraryHandle = void *;
  virtual ~IPluginRegistry() = default;
  virtual PluginLibraryHandle loadLibrary(const char *path) noexcept = 0;
};
#endif

class IRuntime {
 public:
  virtual ~IRuntime() = default;
  virtual ICudaEngine *deserializeCudaEngine(const void *blob, size_t size) noexcept = 0;
  virtual void setErrorRecorder(IErrorRecorder *recorder) noexcept = 0;
#if STAND_IN_TENSORRT >= 806
  virtual IPluginRegistry &getPluginRegistry() noexcept = 0;
  virtual void setEngineHostCodeAllowed(bool allowed) noexcept = 0;
#endif
};

}  // namespace nvinfer1
