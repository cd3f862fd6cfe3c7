// guided_step on the host.
#include <algorithm>

#include "cover.h"
#include "host.h"

namespace instantas {

namespace {

constexpr int64_t GRAIN = 1 << 14;  // cells that are worth a thread

template <class A>
void divide(A* sums, const A* norm, int count) {
  for (int x = 0; x < count; ++x) sums[x] /= norm[x];
}

// One row of a tile, of one guidance branch, whose means `means` are kept where a window covers the cell, and are what
// was kept elsewhere. norm nullptr: all are covered.
template <class T, class A>
void keep(const Step<T>& step, int64_t offset, int branch, const A* norm, A* means, int count) {
  const A p = static_cast<A>(step.update.carry[0]), q = static_cast<A>(step.update.carry[1]);
  const T *sample = step.sample + offset, *old = step.latest + branch * step.history_stride + offset;
  T* kept = step.new_latest + branch * step.history_stride + offset;
  if (!norm) {
    for (int x = 0; x < count; ++x) kept[x] = narrow<T>(combined(p, A(widen(sample[x])), q, means[x]));
    return;
  }
  for (int x = 0; x < count; ++x) {
    const A sampled = widen(sample[x]), before = widen(old[x]);
    const bool is_covered = norm[x] > 0;
    kept[x] = is_covered ? narrow<T>(combined(p, sampled, q, means[x])) : old[x];
    means[x] = is_covered ? means[x] : recalled(p, sampled, q, before);
  }
}

// One row of a tile: the merged sums become the new sample and the new history entry. norm nullptr: 1 everywhere.
template <class T, class A = arithmetic_t<T>>
void advance(const Step<T>& step, int64_t offset, const A* guidance, const A* norm, A* merged, A* unguided, int count) {
  if (norm) divide(merged, norm, count);
  if (step.keeps) keep(step, offset, 0, norm, merged, count);
  if (step.is_guided) {
    if (norm) divide(unguided, norm, count);
    if (step.keeps) keep(step, offset, 1, norm, unguided, count);
    const A scale = step.guidance;
    if (guidance)
      for (int x = 0; x < count; ++x) merged[x] = guided(merged[x], unguided[x], guidance[x]);
    else
      for (int x = 0; x < count; ++x) merged[x] = guided(merged[x], unguided[x], scale);
  }
  const T* sample = step.sample + offset;
  const double* coefficients = step.update.coefficients;
  const int k = step.update.history;
  if (k > 0) {
    const A d = static_cast<A>(step.update.keep[0]), e = static_cast<A>(step.update.keep[1]);
    T* newest = step.new_history + offset;
    for (int x = 0; x < count; ++x) newest[x] = narrow<T>(combined(d, A(widen(sample[x])), e, merged[x]));
  }
  A* history = unguided;  // which is spent
  std::fill_n(history, count, A(0));
  for (int j = 0; j < k; ++j) {
    const A c = static_cast<A>(coefficients[2 + j]);
    const T* past = step.history + j * step.history_stride + offset;
    for (int x = 0; x < count; ++x) history[x] += c * widen(past[x]);
    if (j + 1 < k) std::copy_n(past, count, step.new_history + (j + 1) * step.history_stride + offset);
  }
  const A a = static_cast<A>(coefficients[0]), b = static_cast<A>(coefficients[1]);
  T* out = step.new_sample + offset;
  for (int x = 0; x < count; ++x) out[x] = narrow<T>(combined(a, A(widen(sample[x])), b, merged[x]) + history[x]);
}

// Whether there is some weight over every cell of the tile.
template <class A>
bool has_weight(const CanvasTile& tile, const A* norm, int tile_x) {
  bool everywhere = true;
  for (int y = 0; y < tile.y.end - tile.y.begin; ++y)
    for (int x = 0; x < tile.x.end - tile.x.begin; ++x) everywhere &= norm[y * tile_x + x] > 0;
  return everywhere;
}

template <class T, class A = arithmetic_t<T>>
void run(const Step<T>& step, const Plan& plan, int64_t images) {
  const int64_t tiles = int64_t{plan.tiles_y()} * plan.tiles_x(), area = int64_t{plan.tile_y} * plan.tile_x;
  const int64_t grain = GRAIN / (area * plan.channels) + 1;
  torch::stable::parallel_for(0, images * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> norm(area), merged(area), unguided(area);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tiles;
      const CanvasTile tile(plan, task % tiles);
      Overlap<A> overlap{step.weight, step.weight_stride};
      bool one_window = tile.has_one_window(plan);
      std::fill(norm.begin(), norm.end(), A(0));
      if (!one_window || step.keeps) sum_weights(plan, tile, overlap, norm.data());
      if (one_window && step.keeps) one_window = has_weight(tile, norm.data(), plan.tile_x);
      if (one_window) overlap = {nullptr, 0};
      for (int channel = 0; channel < plan.channels; ++channel) {
        std::fill(merged.begin(), merged.end(), A(0));
        sum_windows(plan, tile, overlap, step.cond, image, channel, merged.data());
        if (step.is_guided) {
          std::fill(unguided.begin(), unguided.end(), A(0));
          sum_windows(plan, tile, overlap, step.uncond, image, channel, unguided.data());
        }
        for (int y = tile.y.begin; y < tile.y.end; ++y) {
          const int64_t row = int64_t{y - tile.y.begin} * plan.tile_x;
          const A* guidance = step.guidance_map ? step.guidance_map + int64_t{y} * plan.width + tile.x.begin : nullptr;
          advance<T>(step, plan.canvas_offset(image, channel, y, tile.x.begin), guidance,
                     one_window ? nullptr : norm.data() + row, merged.data() + row,
                     unguided.data() + row, tile.x.end - tile.x.begin);
        }
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> guided_step(Tensor cond, OptionalTensor uncond, Tensor sample, OptionalTensor weight,
                                               Tensor history, Tensor latest, Tensor coefficients, Tensor keep,
                                               Tensor carry, double guidance_scale, OptionalTensor guidance_map,
                                               Tensor origins, Tensor cover_start, Tensor cover_index,
                                               Geometry geometry) {
  const Plan plan = make_plan(origins, cover_start, cover_index, geometry, sample.size(1));
  const StepCall call(cond, uncond, sample, weight, history, latest, coefficients, keep, carry, guidance_scale,
                      guidance_map);
  if (sample.numel() == 0) return call.results();
  with_element(sample, [&](auto element) {
    run(call.step<decltype(element)>(), plan, sample.size(0));
  });
  return call.results();
}

}  // namespace instantas
