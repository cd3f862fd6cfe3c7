// What the thin hosts share: tensors of the stable ABI in, plain structs and pointers out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "plan.cuh"
#include "step_update.cuh"

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

// Uninitialised, contiguous and on the tensor's device. torch::stable's own looks an operator up by its name.
inline Tensor uninitialized(const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                        std::optional<ScalarType> type = std::nullopt) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * (sizes[d] ? sizes[d] : 1);
  int32_t dtype, device;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  if (type) dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device,
                                                  tensor.get_device_index(), &result));
  return Tensor(result);
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

// What host and device make of an operation's arguments: inputs that are contiguous, and the results to be filled.
struct GatherCall {
  Tensor canvas;
  Plan plan;
  Tensor windows;

  GatherCall(const Tensor& canvas, const Plan& plan)
      : canvas(packed(canvas)),
        plan(plan),
        windows(uninitialized(canvas, {canvas.size(0), plan.windows, plan.channels, plan.h, plan.w})) {}

  int64_t planes() const { return canvas.size(0) * plan.windows * plan.channels; }
};

struct ScatterCall {
  Tensor windows;
  OptionalTensor weight;
  Plan plan;
  Tensor canvas;

  ScatterCall(const Tensor& windows, const OptionalTensor& weight, const Plan& plan)
      : windows(packed(windows)),
        weight(packed_arithmetic(weight, windows)),
        plan(plan),
        canvas(uninitialized(windows, {windows.size(0), plan.channels, plan.height, plan.width})) {}
};

struct StepCall {
  Tensor cond, sample, history, latest, coefficients, keep, carry;
  OptionalTensor uncond, weight, guidance_map;
  double guidance_scale;
  Tensor new_sample, new_history, new_latest;

  StepCall(const Tensor& cond, const OptionalTensor& uncond, const Tensor& sample, const OptionalTensor& weight,
           const Tensor& history, const Tensor& latest, const Tensor& coefficients, const Tensor& keep,
           const Tensor& carry, double guidance_scale, const OptionalTensor& guidance_map)
      : cond(packed(cond)),
        sample(packed(sample)),
        history(packed(history)),
        latest(packed(latest)),
        coefficients(packed(coefficients)),
        keep(packed(keep)),
        carry(packed(carry)),
        uncond(uncond ? OptionalTensor(packed(*uncond)) : std::nullopt),
        weight(packed_arithmetic(weight, sample)),
        guidance_map(packed_arithmetic(guidance_map, sample)),
        guidance_scale(guidance_scale),
        new_sample(uninitialized(sample, sample.sizes())),
        new_history(uninitialized(history, history.sizes())),
        new_latest(uninitialized(latest, latest.sizes())) {}

  std::tuple<Tensor, Tensor, Tensor> results() const { return {new_sample, new_history, new_latest}; }

  template <class T>
  Step<T> step() const {
    using A = arithmetic_t<T>;
    return {data<T>(cond),
            data<T>(uncond),
            data<T>(sample),
            data<T>(history),
            data<T>(latest),
            mutable_data<T>(new_sample),
            mutable_data<T>(new_history),
            mutable_data<T>(new_latest),
            data<A>(weight),
            data<A>(guidance_map),
            weight_stride(weight),
            sample.numel(),
            static_cast<A>(guidance_scale),
            {data<double>(coefficients), data<double>(keep), data<double>(carry), static_cast<int>(history.size(0))},
            uncond.has_value(),
            latest.size(0) > 0};
  }
};

Tensor gather_windows(Tensor canvas, Tensor origins, Tensor cover_start, Tensor cover_index, Geometry geometry);
Tensor scatter_windows(Tensor windows, OptionalTensor weight, Tensor origins, Tensor cover_start, Tensor cover_index,
                       Geometry geometry, bool normalize);
std::tuple<Tensor, Tensor, Tensor> guided_step(Tensor cond, OptionalTensor uncond, Tensor sample, OptionalTensor weight,
                                               Tensor history, Tensor latest, Tensor coefficients, Tensor keep,
                                               Tensor carry, double guidance_scale, OptionalTensor guidance_map,
                                               Tensor origins, Tensor cover_start, Tensor cover_index,
                                               Geometry geometry);
Tensor regional_attention(Tensor query, Tensor key, Tensor value, Tensor prompt_ids, Tensor weights, bool joint,
                          double scale, OptionalTensor order, OptionalTensor lengths);
std::tuple<Tensor, Tensor, Tensor> regional_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                               Tensor prompt_ids, Tensor weights, bool joint,
                                                               double scale, OptionalTensor order,
                                                               OptionalTensor lengths);

}  // namespace instantas
