// What the thin hosts share: tensors of the stable ABI in, plain structs and pointers out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "plan.cuh"

namespace instantas {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Geometry = std::vector<int64_t>;  // height, width, h, w, wrap_y, wrap_x, tile_y, tile_x

inline Plan make_plan(const Tensor& origins, const Tensor& start, const Tensor& index, const Geometry& g, int64_t channels) {
  return {static_cast<int>(g[0]), static_cast<int>(g[1]), static_cast<int>(g[2]), static_cast<int>(g[3]),
          static_cast<int>(g[6]), static_cast<int>(g[7]), static_cast<int>(origins.size(0)), static_cast<int>(channels),
          static_cast<const int32_t*>(origins.data_ptr()), static_cast<const int32_t*>(start.data_ptr()),
          static_cast<const int32_t*>(index.data_ptr())};
}

inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensor, contiguous, in the type of the arithmetic with `like`; an absent one stays absent.
inline OptionalTensor packed_arithmetic(const OptionalTensor& tensor, const Tensor& like) {
  if (!tensor) return std::nullopt;
  const auto type = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return packed(tensor->scalar_type() == type ? *tensor : torch::stable::to(*tensor, type));
}

template <class T>
const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.data_ptr()); }
template <class T>
const T* data(const OptionalTensor& tensor) { return tensor ? data<T>(*tensor) : nullptr; }
template <class T>
T* mutable_data(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

// run(T{}) with the element type of the tensor.
template <class Run>
void with_element(const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(Half{});
    case ScalarType::BFloat16: return run(BFloat16{});
    case ScalarType::Double: return run(double{});
    default: STD_TORCH_CHECK(false, "expected float32, float16, bfloat16 or float64");
  }
}

// The same for what the device computes with.
template <class Run>
void with_device_element(const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(Half{});
    case ScalarType::BFloat16: return run(BFloat16{});
    default: STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
}

// Elements from one window's overlap weight to the next one's: 0 where all have the same.
inline int64_t weight_stride(const OptionalTensor& weight) {
  return weight && weight->dim() == 3 ? weight->size(1) * weight->size(2) : 0;
}

Tensor gather_windows(Tensor canvas, Tensor origins, Tensor cover_start, Tensor cover_index, Geometry geometry);
Tensor scatter_windows(Tensor windows, OptionalTensor weight, Tensor origins, Tensor cover_start, Tensor cover_index,
                       Geometry geometry, bool normalize);
std::tuple<Tensor, Tensor> guided_step(Tensor cond, OptionalTensor uncond, Tensor sample, OptionalTensor weight,
                                       Tensor history, Tensor coefficients, Tensor keep, double guidance_scale,
                                       OptionalTensor guidance_map, Tensor origins, Tensor cover_start,
                                       Tensor cover_index, Geometry geometry);
Tensor regional_attention(Tensor query, Tensor key, Tensor value, Tensor prompt_ids, Tensor weights, bool joint,
                          double scale);
std::tuple<Tensor, Tensor, Tensor> regional_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                               Tensor prompt_ids, Tensor weights, bool joint,
                                                               double scale);
Tensor take_rows(Tensor source, Tensor rows);
void put_rows(Tensor target, Tensor rows, Tensor values);

}  // namespace instantas
