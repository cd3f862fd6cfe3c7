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

// One row of a tile, of one guidance branch: its means are kept where a window covers the cell (norm > 0; nullptr:
// everywhere), elsewhere they are what was kept.
template <class T, class A>
void keep(const Step<T>& step, int64_t offset, int branch, const A* norm, A* means, int count) {
  const A p = static_cast<A>(step.update.carry[0]), q = static_cast<A>(step.update.carry[1]);
  const T *sample = step.sample + offset, *old = step.latest + branch * step.history_stride + offset;
  T* kept = step.new_latest + branch * step.history_stride + offset;
  for (int x = 0; x < count; ++x) kept[x] = narrow<T>(combined(p, A(widen(sample[x])), q, means[x]));
  for (int x = 0; norm && x < count; ++x) {
    if (norm[x] > 0) continue;
    kept[x] = old[x];
    means[x] = recalled(p, A(widen(sample[x])), A(widen(old[x]))) / q;
  }
}

// One row of a tile: the means become the new sample and the new history entry.
template <class T, class A = arithmetic_t<T>>
void advance(const Step<T>& step, int64_t offset, const A* guidance, A* merged, A* unguided, int count) {
  if (step.is_guided) {
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

// How the windows share the cells of a tile.
template <class A>
struct Sharing {
  bool is_disjoint, is_covered;  // whether no cell has two windows, and whether every cell has one, with some weight

  // norm: (tile_y, tile_x), to be filled with the sums of the overlap weights unless there is one window everywhere.
  Sharing(const Plan& plan, const CanvasTile& tile, const Overlap<A>& overlap, bool is_partial, std::vector<A>& norm)
      : is_disjoint(!is_partial && tile.has_one_window()), is_covered(is_disjoint) {
    if (is_disjoint) return;
    std::fill(norm.begin(), norm.end(), A(0));
    sum_weights(plan, tile, overlap, norm.data());
    int64_t covered = 0, with_weight = 0;
    for_each_run(plan, tile, [&](int, int, int, int, int count) { covered += count; });
    for (const A weight : norm) with_weight += weight > 0;
    is_disjoint = covered == with_weight;
    is_covered = with_weight == int64_t{tile.y.end - tile.y.begin} * (tile.x.end - tile.x.begin);
  }
};

template <class T, class A = arithmetic_t<T>>
void run(const Step<T>& step, const Plan& plan, int64_t images) {
  const int64_t tiles = int64_t{plan.tiles_y()} * plan.tiles_x(), area = int64_t{plan.tile_y} * plan.tile_x;
  const int64_t grain = GRAIN / (area * plan.channels) + 1;
  const T* sources[] = {step.cond, step.uncond};
  const int branches = step.is_guided ? 2 : 1;
  torch::stable::parallel_for(0, images * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> norm(area), means[] = {std::vector<A>(area), std::vector<A>(area)};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tiles;
      const CanvasTile tile(plan, task % tiles);
      const Overlap<A> weights{step.weight, step.weight_stride};
      const Sharing<A> sharing(plan, tile, weights, step.keeps, norm);
      const Overlap<A> overlap = sharing.is_disjoint ? Overlap<A>{nullptr, 0} : weights;
      const int count = tile.x.end - tile.x.begin;
      for (int channel = 0; channel < plan.channels; ++channel) {
        for (int branch = 0; branch < branches; ++branch) {
          std::fill(means[branch].begin(), means[branch].end(), A(0));
          sum_windows(plan, tile, overlap, sources[branch], image, channel, means[branch].data());
        }
        for (int y = tile.y.begin; y < tile.y.end; ++y) {
          const int64_t row = int64_t{y - tile.y.begin} * plan.tile_x;
          const int64_t offset = plan.canvas_offset(image, channel, y, tile.x.begin);
          for (int branch = 0; branch < branches; ++branch) {
            A* mean = means[branch].data() + row;
            if (!sharing.is_disjoint) divide(mean, norm.data() + row, count);
            if (step.keeps) keep(step, offset, branch, sharing.is_covered ? nullptr : norm.data() + row, mean, count);
          }
          const A* guidance = step.guidance_map ? step.guidance_map + int64_t{y} * plan.width + tile.x.begin : nullptr;
          advance<T>(step, offset, guidance, means[0].data() + row, means[1].data() + row, count);
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
