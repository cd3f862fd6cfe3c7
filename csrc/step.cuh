// Device kernel of guided_step: merge, classifier-free guidance and the scheduler's update in one pass. Free of torch.
#pragma once

#include "step_update.cuh"
#include "windows.cuh"

namespace instantas {

// KEEPS: the predictions are kept, and taken from those of before in cells that no window covers.
template <class T, int WIDTH, bool GUIDED, bool KEEPS>
__global__ void step_kernel(Step<T> step, Plan plan, CellDivisors<WIDTH> by) {
  constexpr int CHANNELS = CHANNELS_OF_THREAD<WIDTH>, SOURCES = GUIDED ? 2 : 1;
  const Cells<WIDTH, CHANNELS> cells(plan, by);
  if (!cells.inside) return;
  const int64_t offset = plan.canvas_offset(cells.image, cells.channel, cells.y, cells.x), plane = plan.canvas_plane();
  const T* sources[SOURCES];
  sources[0] = step.cond;
  if (GUIDED) sources[SOURCES - 1] = step.uncond;
  float total[SOURCES][CHANNELS][WIDTH] = {}, norm[WIDTH] = {};
  sum_windows(sources, step.weight, step.weight_stride, plan, cells, total, norm);
  divide<T>(total, norm);
  unsigned covered = 0;  // a bit for a cell: fewer registers than the sums
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) covered |= unsigned{norm[i] > 0.0f} << i;

  const double* coefficients = step.update.coefficients;
  const float a = static_cast<float>(coefficients[0]), b = static_cast<float>(coefficients[1]);
  const float d = static_cast<float>(step.update.keep[0]), e = static_cast<float>(step.update.keep[1]);
  const float p = KEEPS ? static_cast<float>(step.update.carry[0]) : 0.0f;
  const float q = KEEPS ? static_cast<float>(step.update.carry[1]) : 1.0f, of_q = 1.0f / q;
  float guidance[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) guidance[i] = step.guidance;
  if (step.guidance_map) load_floats(guidance, step.guidance_map + int64_t{cells.y} * plan.width + cells.x);
  float history[CHANNELS][WIDTH] = {};
#pragma unroll 1  // entries are few: more at once is code that never runs
  for (int j = 0; j < step.update.history; ++j) {
    const float coefficient = static_cast<float>(coefficients[2 + j]);
    const T* from = step.history + j * step.history_stride + offset;
    T* to = step.new_history + (j + 1) * step.history_stride + offset;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      if (cells.channel + c >= plan.channels) break;
      const Pack<T, WIDTH> past = load<WIDTH>(from + c * plane);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) history[c][i] += coefficient * widen(past.element[i]);
      if (j + 1 < step.update.history) store<WIDTH>(to + c * plane, past);
    }
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (cells.channel + c >= plan.channels) break;
    const int64_t place = offset + c * plane;
    const Pack<T, WIDTH> sample = load<WIDTH>(step.sample + place);
    Pack<T, WIDTH> newest, advanced, kept[SOURCES];
    if (KEEPS)
#pragma unroll
      for (int s = 0; s < SOURCES; ++s) kept[s] = load<WIDTH>(step.latest + s * step.history_stride + place);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float x = widen(sample.element[i]);
      float mean[SOURCES];
#pragma unroll
      for (int s = 0; s < SOURCES; ++s) {
        mean[s] = total[s][c][i];
        if (KEEPS) {
          if (covered >> i & 1)
            kept[s].element[i] = narrow<T>(combined(p, x, q, mean[s]));
          else
            mean[s] = quotient<T>(recalled(p, x, widen(kept[s].element[i])), q, of_q);
        }
      }
      const float merged = GUIDED ? guided(mean[0], mean[SOURCES - 1], guidance[i]) : mean[0];
      newest.element[i] = narrow<T>(combined(d, x, e, merged));
      advanced.element[i] = narrow<T>(combined(a, x, b, merged) + history[c][i]);
    }
    if (step.update.history > 0) store<WIDTH>(step.new_history + place, newest);
    if (KEEPS)
#pragma unroll
      for (int s = 0; s < SOURCES; ++s) store<WIDTH>(step.new_latest + s * step.history_stride + place, kept[s]);
    store<WIDTH>(step.new_sample + place, advanced);
  }
}

}  // namespace instantas
