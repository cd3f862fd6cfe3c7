// The device and the stream on which PyTorch wants a tensor's kernels to run.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "host.h"

namespace instantas {

// While it lives, the tensor's device is the current one.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check(cudaError_t error) { STD_CUDA_CHECK(error); }

}  // namespace instantas
