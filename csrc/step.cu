// guided_step on the device.
#include "cells.h"
#include "step.cuh"
#include "stream.h"

namespace instantas {

std::tuple<Tensor, Tensor> guided_step(Tensor cond, OptionalTensor uncond, Tensor sample, OptionalTensor weight,
                                       Tensor history, Tensor coefficients, Tensor keep, double guidance_scale,
                                       OptionalTensor guidance_map, Tensor origins, Tensor cover_start,
                                       Tensor cover_index, Geometry geometry) {
  const Stream stream(sample);
  cond = packed(cond), sample = packed(sample), history = packed(history);
  coefficients = packed(coefficients), keep = packed(keep);
  if (uncond) uncond = packed(*uncond);
  weight = packed_arithmetic(weight, sample);
  guidance_map = packed_arithmetic(guidance_map, sample);
  const Plan plan = make_plan(origins, cover_start, cover_index, geometry, sample.size(1));
  Tensor new_sample = torch::stable::new_empty(sample, sample.sizes());
  Tensor new_history = torch::stable::new_empty(history, history.sizes());
  if (sample.numel() == 0) return {new_sample, new_history};
  with_device_element(sample, [&](auto element) {
    using T = decltype(element);
    const Step<T> step{data<T>(cond),
                       data<T>(uncond),
                       data<T>(sample),
                       data<T>(history),
                       mutable_data<T>(new_sample),
                       mutable_data<T>(new_history),
                       data<float>(weight),
                       data<float>(guidance_map),
                       weight_stride(weight),
                       sample.numel(),
                       static_cast<float>(guidance_scale),
                       {data<double>(coefficients), data<double>(keep), static_cast<int>(history.size(0))}};
    with_width<T>(plan, {step.cond, step.uncond, step.sample, step.history, step.weight, step.guidance_map}, [&](auto w) {
      constexpr int WIDTH = decltype(w)::value;
      const auto run = [&](void (*kernel)(Step<T>, Plan)) {
        check(launch(kernel, blocks_of_cells<WIDTH>(plan, sample.size(0)), plan.tile_y * plan.tile_x / WIDTH, 0, stream,
                     step, plan));
      };
      uncond ? run(step_kernel<T, WIDTH, true>) : run(step_kernel<T, WIDTH, false>);
    });
  });
  return {new_sample, new_history};
}

}  // namespace instantas
