// The guided step of a plan's tiles on the host, in loops over rows of cells that the compiler vectorises. Free of torch.
#pragma once

#include <algorithm>
#include <vector>

#include "cover.h"
#include "step_update.cuh"

namespace instantas {

// The scheduler's numbers in the type of the arithmetic.
template <class A>
struct Numbers {
  A a, b, d, e, p, q;
  std::vector<A> c;

  explicit Numbers(const Update& update)
      : a(update.coefficients[0]),
        b(update.coefficients[1]),
        d(update.keep[0]),
        e(update.keep[1]),
        p(update.carry[0]),
        q(update.carry[1]),
        c(update.coefficients + 2, update.coefficients + 2 + update.history) {}
};

// to = of_sample * sample + of_mean * mean.
template <class T, class S, class A>
INSTANTAS_KERNEL void combine(A of_sample, const T* sample, A of_mean, const S* mean, T* to, int count) {
  for (int k = 0; k < count; ++k) to[k] = narrow<T>(combined(of_sample, A(widen(sample[k])), of_mean, A(widen(mean[k]))));
}

// A row of cells: the means become the new sample, the new history entry and what is kept. merged, history: room for it.
template <class T, class S, class A>
INSTANTAS_KERNEL void advance(const Step<T>& step, const Numbers<A>& numbers, int64_t offset, const S* cond,
                              const S* uncond, const A* guidance, A* merged, A* history, int count) {
  if (!step.is_guided) {
    for (int k = 0; k < count; ++k) merged[k] = widen(cond[k]);
  } else if (guidance) {
    for (int k = 0; k < count; ++k) merged[k] = guided(A(widen(cond[k])), A(widen(uncond[k])), guidance[k]);
  } else {
    const A scale = step.guidance;
    for (int k = 0; k < count; ++k) merged[k] = guided(A(widen(cond[k])), A(widen(uncond[k])), scale);
  }
  const T* sample = step.sample + offset;
  T *out = step.new_sample + offset, *kept = step.new_latest + offset;
  if (step.keeps) combine(numbers.p, sample, numbers.q, cond, kept, count);
  if (step.keeps && step.is_guided) combine(numbers.p, sample, numbers.q, uncond, kept + step.history_stride, count);
  const int entries = step.update.history;
  if (entries == 0) return combine(numbers.a, sample, numbers.b, merged, out, count);
  combine(numbers.d, sample, numbers.e, merged, step.new_history + offset, count);
  std::fill_n(history, count, A(0));
  for (int j = 0; j < entries; ++j) {
    const T* entry = step.history + j * step.history_stride + offset;
    const A c = numbers.c[j];
    for (int k = 0; k < count; ++k) history[k] += c * widen(entry[k]);
    if (j + 1 < entries) std::copy_n(entry, count, step.new_history + (j + 1) * step.history_stride + offset);
  }
  const A a = numbers.a, b = numbers.b;
  for (int k = 0; k < count; ++k) out[k] = narrow<T>(combined(a, A(widen(sample[k])), b, merged[k]) + history[k]);
}

// One channel of a tile, whose means are rows `pitch` apart.
template <class T, class S, class A>
INSTANTAS_KERNEL void advance_tile(const Step<T>& step, const Numbers<A>& numbers, const Plan& plan, const Cover<A>& cover,
                                   int64_t offset, const S* cond, const S* uncond, int pitch, A* merged, A* history) {
  for (int row = 0; row < cover.rows(); ++row) {
    const int64_t place = int64_t{cover.y.begin + row} * plan.width + cover.x.begin;
    advance(step, numbers, offset + int64_t{row} * plan.width, cond, uncond,
            step.guidance_map ? step.guidance_map + place : nullptr, merged, history, cover.columns());
    cond += pitch;
    uncond += pitch;
  }
}

// Where no window covers a block's cells, their means are what was kept.
template <class T, class A>
INSTANTAS_KERNEL void recall(const Step<T>& step, const Numbers<A>& numbers, const Plan& plan, const Cover<A>& cover,
                             const Block& block, int64_t offset, int branch, A* means) {
  const T *samples = step.sample + offset, *latest = step.latest + branch * step.history_stride + offset;
  const A p = numbers.p, q = numbers.q;
  for (int row = 0; row < block.rows; ++row) {
    const int64_t place = int64_t{block.y + row} * plan.width + block.x;
    const T *sample = samples + place, *old = latest + place;
    A* mean = means + cover.cell(block, row);
    for (int k = 0; k < block.columns; ++k) mean[k] = recalled(p, A(widen(sample[k])), A(widen(old[k]))) / q;
  }
}

// And what was kept stays as it is.
template <class T>
void leave(const Step<T>& step, const Plan& plan, const Block& block, int64_t offset, int branch) {
  for (int row = 0; row < block.rows; ++row) {
    const int64_t place = branch * step.history_stride + offset + int64_t{block.y + row} * plan.width + block.x;
    std::copy_n(step.latest + place, block.columns, step.new_latest + place);
  }
}

// Tiles of the canvases, those of one image after those of another.
struct Advance {
  template <class T, class A>
  static INSTANTAS_KERNEL void run(const Step<T>& step, const Numbers<A>& numbers, const Overlap<A>& overlap,
                                   const Plan& plan, int64_t begin, int64_t end) {
    const int64_t tiles = int64_t{plan.tiles_y()} * plan.tiles_x(), area = int64_t{plan.tile_y} * plan.tile_x;
    const T* sources[] = {step.cond, step.uncond};
    const int branches = step.is_guided ? 2 : 1;
    std::vector<A> means[] = {std::vector<A>(area), std::vector<A>(area)}, merged(plan.tile_x), history(plan.tile_x);
    Cover<A> cover(plan, overlap);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tiles;
      cover.visit(task % tiles);
      for (int channel = 0; channel < plan.channels; ++channel) {
        const int64_t offset = plan.canvas_offset(image, channel, cover.y.begin, cover.x.begin);
        const Block& first = cover.blocks[0];
        if (cover.blocks.size() == 1 && first.window >= 0) {  // the means are the window's own values
          const int64_t place = plan.window_offset(image, first.window, channel, first.i, first.j);
          const T *cond = step.cond + place, *uncond = step.is_guided ? step.uncond + place : cond;
          advance_tile(step, numbers, plan, cover, offset, cond, uncond, plan.w, merged.data(), history.data());
          continue;
        }
        for (int branch = 0; branch < branches; ++branch)
          for (const Block& block : cover.blocks)
            if (block.window == NONE)
              recall(step, numbers, plan, cover, block, offset, branch, means[branch].data());
            else
              cover.average(block, sources[branch], image, channel, means[branch].data());
        const A *cond = means[0].data(), *uncond = means[1].data();
        advance_tile(step, numbers, plan, cover, offset, cond, uncond, plan.tile_x, merged.data(), history.data());
        for (int branch = 0; branch < branches; ++branch)
          for (const Block& block : cover.blocks)
            if (block.window == NONE) leave(step, plan, block, offset, branch);
      }
    }
  }
};

}  // namespace instantas
