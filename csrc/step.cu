// guided_step on the device.
#include "cells.h"
#include "step.cuh"
#include "stream.h"

namespace instantas {

std::tuple<Tensor, Tensor, Tensor> guided_step(Tensor cond, OptionalTensor uncond, Tensor sample, OptionalTensor weight,
                                               Tensor history, Tensor latest, Tensor coefficients, Tensor keep,
                                               Tensor carry, double guidance_scale, OptionalTensor guidance_map,
                                               Tensor origins, Tensor cover_start, Tensor cover_index,
                                               Geometry geometry) {
  const Stream stream(sample);
  const Plan plan = make_plan(origins, cover_start, cover_index, geometry, sample.size(1));
  const StepCall call(cond, uncond, sample, weight, history, latest, coefficients, keep, carry, guidance_scale,
                      guidance_map);
  if (sample.numel() == 0) return call.results();
  with_device_element(sample, [&](auto element) {
    using T = decltype(element);
    const Step<T> step = call.step<T>();
    with_width<T>(plan, {step.cond, step.uncond, step.sample, step.history, step.latest, step.weight, step.guidance_map},
                  [&](auto w) {
      constexpr int WIDTH = decltype(w)::value;
      const auto run = [&](void (*kernel)(Step<T>, Plan, CellDivisors<WIDTH>)) {
        check(launch(kernel, blocks_of_cells<WIDTH>(plan, sample.size(0)), plan.tile_y * plan.tile_x / WIDTH, 0, stream,
                     step, plan, CellDivisors<WIDTH>(plan)));
      };
      if (step.keeps)
        step.is_guided ? run(step_kernel<T, WIDTH, true, true>) : run(step_kernel<T, WIDTH, false, true>);
      else
        step.is_guided ? run(step_kernel<T, WIDTH, true, false>) : run(step_kernel<T, WIDTH, false, false>);
    });
  });
  return call.results();
}

}  // namespace instantas
