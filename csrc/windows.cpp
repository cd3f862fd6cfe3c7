// gather_windows and scatter_windows on the host.
#include <algorithm>
#include <limits>

#include "cover.h"
#include "host.h"

namespace instantas {

namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements that are worth a thread
constexpr int64_t LINE = 64;        // bytes of a cache line

// Walks down a channel of a window.
class Rows {
 public:
  Rows(const Plan& plan, int64_t image, int window, int channel)
      : x0_(plan.origins[2 * window + 1]),
        w_(plan.w),
        whole_(std::min(plan.w, plan.width - x0_)),
        width_(plan.width),
        top_(plan.canvas_offset(image, channel, 0, 0)),
        bottom_(top_ + plan.canvas_plane()),
        row_(top_ + int64_t{plan.origins[2 * window]} * width_),
        place_(plan.window_offset(image, window, channel, 0, 0)) {}

  // copy(canvas, windows, count) for the runs of cells of a row: their offsets in the two tensors.
  template <class Copy>
  void next(const Copy& copy) {
    copy(row_ + x0_, place_, whole_);
    if (whole_ < w_) copy(row_, place_ + whole_, w_ - whole_);  // at the other end of the axis
    place_ += w_;
    row_ += width_;
    if (row_ == bottom_) row_ = top_;
  }

 private:
  int x0_, w_, whole_;
  int64_t width_, top_, bottom_, row_, place_;
};

// A row of 64 cells of 2 or 4 bytes, as most windows have, needs no call.
inline void copy_bytes(char* to, const char* from, int64_t count) {
  if (count == 128)
    std::memcpy(to, from, 128);
  else if (count == 256)
    std::memcpy(to, from, 256);
  else
    std::memcpy(to, from, count);
}

void gather(const GatherCall& call) {
  const char* canvas = data<char>(call.canvas);
  char* windows = mutable_data<char>(call.windows);
  const Plan plan = call.plan;
  const int64_t planes = call.planes(), size = call.canvas.element_size();
  const auto copy = [&](int64_t from, int64_t to, int64_t count) {
    copy_bytes(windows + to * size, canvas + from * size, count * size);
  };
  torch::stable::parallel_for(0, planes, GRAIN / plan.window_plane() + 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int channel = static_cast<int>(plane % plan.channels);
      const int window = static_cast<int>(plane / plan.channels % plan.windows);
      Rows rows(plan, plane / plan.channels / plan.windows, window, channel);
      for (int i = 0; i < plan.h; ++i) rows.next(copy);
    }
  });
}

// Whether each place of a grid of windows is taken once: then they cover the canvas, and no two share a cell.
bool is_grid(const Plan& plan) {
  const int down = plan.height / plan.h, across = plan.width / plan.w;
  if (plan.height % plan.h || plan.width % plan.w || int64_t{down} * across != plan.windows) return false;
  std::vector<bool> taken(plan.windows);
  for (int window = 0; window < plan.windows; ++window) {
    const int y = place_in_window(plan.origins[2 * window], plan.origins[0], plan.height);
    const int x = place_in_window(plan.origins[2 * window + 1], plan.origins[1], plan.width);
    const int place = y / plan.h * across + x / plan.w;
    if (y % plan.h || x % plan.w || taken[place]) return false;
    taken[place] = true;
  }
  return true;
}

// The windows of a grid, in the order in which the canvas lies in memory as far as the plan's allows.
template <class T>
void copy_windows(const T* windows, T* canvas, const Plan& plan, int64_t images) {
  std::vector<int> bands;  // the first of neighbours with the same rows
  for (int window = 0; window < plan.windows; ++window)
    if (window == 0 || plan.origins[2 * window] != plan.origins[2 * window - 2]) bands.push_back(window);
  const int64_t count = bands.size(), grain = GRAIN * count / plan.canvas_plane() + 1;
  bands.push_back(plan.windows);
  const auto copy = [&](int64_t to, int64_t from, int64_t count) {
    const T* row = windows + from;
    // two rows ahead: the processor does not follow so many windows in turn by itself
    for (int64_t x = 0; x < count; x += LINE / sizeof(T)) __builtin_prefetch(row + 2 * plan.w + x);
    std::memcpy(canvas + to, row, count * sizeof(T));
  };
  torch::stable::parallel_for(0, images * plan.channels * count, grain, [&](int64_t begin, int64_t end) {
    std::vector<Rows> band;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / count;
      band.clear();
      for (int window = bands[task % count]; window < bands[task % count + 1]; ++window)
        band.emplace_back(plan, plane / plan.channels, window, static_cast<int>(plane % plan.channels));
      for (int i = 0; i < plan.h; ++i)
        for (Rows& rows : band) rows.next(copy);
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
          if (normalize && block.window >= 0) {
            const T* from = windows + plan.window_offset(image, block.window, channel, block.i, block.j);
            for (int row = 0; row < block.rows; ++row, from += plan.w, to += plan.width)
              std::copy_n(from, block.columns, to);
            continue;
          }
          if (normalize && block.window == NONE)  // which only the operator itself lets through
            std::fill(merged.begin(), merged.end(), std::numeric_limits<A>::quiet_NaN());
          else if (normalize)
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
  if (normalize && is_grid(plan)) return copy_windows(windows, canvas, plan, images);
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
