// Device kernel of guided_step: merge, classifier-free guidance and the scheduler's update in one pass. Free of torch.
#pragma once

#include "step_update.cuh"
#include "windows.cuh"

namespace instantas {

template <class T, int WIDTH, bool GUIDED>
__global__ void step_kernel(Step<T> step, Plan plan) {
  constexpr int CHANNELS = CHANNELS_OF_THREAD<WIDTH>, SOURCES = GUIDED ? 2 : 1;
  const Cells<WIDTH, CHANNELS> cells(plan);
  if (!cells.inside) return;
  const T* sources[SOURCES];
  sources[0] = step.cond;
  if (GUIDED) sources[SOURCES - 1] = step.uncond;
  float total[SOURCES][CHANNELS][WIDTH] = {}, norm[WIDTH] = {};
  sum_windows(sources, step.weight, step.weight_stride, plan, cells, total, norm);

  const double* coefficients = step.update.coefficients;
  const float a = static_cast<float>(coefficients[0]), b = static_cast<float>(coefficients[1]);
  const float d = static_cast<float>(step.update.keep[0]), e = static_cast<float>(step.update.keep[1]);
  float guidance[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) guidance[i] = step.guidance;
  if (step.guidance_map) load_floats(guidance, step.guidance_map + int64_t{cells.y} * plan.width + cells.x);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (cells.channel + c >= plan.channels) break;
    const int64_t offset = plan.canvas_offset(cells.image, cells.channel + c, cells.y, cells.x);
    const Pack<T, WIDTH> sample = load<WIDTH>(step.sample + offset);
    float history[WIDTH] = {};
    for (int j = 0; j < step.update.history; ++j) {
      const Pack<T, WIDTH> past = load<WIDTH>(step.history + j * step.history_stride + offset);
      const float coefficient = static_cast<float>(coefficients[2 + j]);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) history[i] += coefficient * widen(past.element[i]);
      if (j + 1 < step.update.history) store<WIDTH>(step.new_history + (j + 1) * step.history_stride + offset, past);
    }
    Pack<T, WIDTH> newest, advanced;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      float merged = total[0][c][i] / norm[i];
      if (GUIDED) merged = guided(merged, total[SOURCES - 1][c][i] / norm[i], guidance[i]);
      const float x = widen(sample.element[i]);
      newest.element[i] = narrow<T>(combined(d, x, e, merged));
      advanced.element[i] = narrow<T>(combined(a, x, b, merged) + history[i]);
    }
    if (step.update.history > 0) store<WIDTH>(step.new_history + offset, newest);
    store<WIDTH>(step.new_sample + offset, advanced);
  }
}

}  // namespace instantas
