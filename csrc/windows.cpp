// gather_windows and scatter_windows on the host.
#include <algorithm>

#include "cover.h"
#include "host.h"

namespace instantas {

namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements that are worth a thread

// copy(canvas, windows, count) for the runs of cells of a window's row: their offsets in the two tensors.
template <class Copy>
void for_row(const Plan& plan, int64_t image, int window, int channel, int i, const Copy& copy) {
  const int y0 = plan.origins[2 * window], x0 = plan.origins[2 * window + 1];
  const int whole = std::min(plan.w, plan.width - x0);  // the rest lies at the other end of the axis
  const int64_t row = plan.canvas_offset(image, channel, position_on_canvas(i, y0, plan.height), 0);
  const int64_t place = plan.window_offset(image, window, channel, i, 0);
  copy(row + x0, place, whole);
  if (whole < plan.w) copy(row, place + whole, plan.w - whole);
}

void gather(const GatherCall& call) {
  const char* canvas = data<char>(call.canvas);
  char* windows = mutable_data<char>(call.windows);
  const Plan plan = call.plan;
  const int64_t planes = call.planes(), size = call.canvas.element_size();
  const auto copy = [&](int64_t from, int64_t to, int64_t count) {
    std::memcpy(windows + to * size, canvas + from * size, count * size);
  };
  torch::stable::parallel_for(0, planes, GRAIN / plan.window_plane() + 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int channel = static_cast<int>(plane % plan.channels);
      const int window = static_cast<int>(plane / plan.channels % plan.windows);
      for (int i = 0; i < plan.h; ++i) for_row(plan, plane / plan.channels / plan.windows, window, channel, i, copy);
    }
  });
}

// Windows of which no two share a cell, in the order in which the canvas lies in memory as far as the plan's allows.
template <class T>
void copy_windows(const T* windows, T* canvas, const Plan& plan, int64_t images) {
  std::vector<int> bands;  // the first of neighbours with the same rows
  for (int window = 0; window < plan.windows; ++window)
    if (window == 0 || plan.origins[2 * window] != plan.origins[2 * window - 2]) bands.push_back(window);
  const int64_t count = bands.size(), grain = GRAIN * count / plan.canvas_plane() + 1;
  bands.push_back(plan.windows);
  const auto copy = [&](int64_t to, int64_t from, int64_t count) {
    std::memcpy(canvas + to, windows + from, count * sizeof(T));
  };
  torch::stable::parallel_for(0, images * plan.channels * count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / count, band = task % count;
      const int channel = static_cast<int>(plane % plan.channels);
      for (int i = 0; i < plan.h; ++i)
        for (int window = bands[band]; window < bands[band + 1]; ++window)
          for_row(plan, plane / plan.channels, window, channel, i, copy);
    }
  });
}

struct Merge {
  template <class T, class A>
  static INSTANTAS_KERNEL void run(const T* const& windows, const Overlap<A>& overlap, T* const& canvas,
                                   const Plan& plan, bool normalize, int64_t begin, int64_t end) {
    const int64_t tiles = int64_t{plan.tiles_y()} * plan.tiles_x();
    Cover<A> cover(plan, overlap);
    std::vector<A> merged(int64_t{plan.tile_y} * plan.tile_x);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tiles;
      cover.visit(task % tiles);
      for (int channel = 0; channel < plan.channels; ++channel)
        for (const Block& block : cover.blocks) {
          T* to = canvas + plan.canvas_offset(image, channel, cover.y.begin + block.y, cover.x.begin + block.x);
          if (normalize && block.window != SEVERAL) {
            const T* from = windows + plan.window_offset(image, block.window, channel, block.i, block.j);
            for (int row = 0; row < block.rows; ++row, from += plan.w, to += plan.width)
              std::copy_n(from, block.columns, to);
            continue;
          }
          if (normalize)
            cover.average(block, windows, image, channel, merged.data());
          else
            cover.sum(block, windows, image, channel, merged.data());
          for (int row = 0; row < block.rows; ++row, to += plan.width) {
            const A* from = merged.data() + cover.cell(block, row);
            for (int k = 0; k < block.columns; ++k) to[k] = narrow<T>(from[k]);
          }
        }
    }
  }
};

template <class T, class A>
void scatter(const T* windows, const Overlap<A>& overlap, T* canvas, const Plan& plan, int64_t images, bool normalize) {
  const int64_t tiles = int64_t{plan.tiles_y()} * plan.tiles_x(), area = int64_t{plan.tile_y} * plan.tile_x;
  const int64_t grain = GRAIN / (area * plan.channels) + 1;
  // with as many cells as the canvas, which they cover, windows share none
  if (normalize && plan.windows * plan.window_plane() == plan.canvas_plane())
    return copy_windows(windows, canvas, plan, images);
  torch::stable::parallel_for(0, images * tiles, grain, [&](int64_t begin, int64_t end) {
    run_for_processor<Merge>(windows, overlap, canvas, plan, normalize, begin, end);
  });
}

}  // namespace

Tensor gather_windows(Tensor canvas, Tensor origins, Tensor cover_start, Tensor cover_index, Geometry geometry) {
  const GatherCall call(canvas, make_plan(origins, cover_start, cover_index, geometry, canvas.size(1)));
  if (call.windows.numel()) gather(call);
  return call.windows;
}

Tensor scatter_windows(Tensor windows, OptionalTensor weight, Tensor origins, Tensor cover_start, Tensor cover_index,
                       Geometry geometry, bool normalize) {
  const ScatterCall call(windows, weight, make_plan(origins, cover_start, cover_index, geometry, windows.size(2)));
  if (call.canvas.numel() == 0) return call.canvas;
  with_element(windows, [&](auto element) {
    using T = decltype(element);
    using A = arithmetic_t<T>;
    const Overlap<A> overlap{data<A>(call.weight), weight_stride(call.weight), false};
    scatter(data<T>(call.windows), overlap, mutable_data<T>(call.canvas), call.plan, windows.size(0), normalize);
  });
  return call.canvas;
}

}  // namespace instantas
