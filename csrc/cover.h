// Merging windows on the host: a tile of the canvas at a time, by runs of cells that the compiler vectorises.
#pragma once

#include "plan.cuh"

namespace instantas {

template <class A>
struct Overlap {
  const A* weight;  // (h, w), or (n, h, w) with a stride; nullptr: 1 everywhere
  int64_t stride;

  const A* row(const Plan& plan, int window, int i, int j) const {
    return weight ? weight + window * stride + int64_t{i} * plan.w + j : nullptr;
  }
};

// One of the tiles for which a plan lists the covering windows.
struct CanvasTile {
  Span y, x;
  const int32_t* first;
  const int32_t* last;  // the covering windows

  // Whether all its cells have the same single window: their mean is that window's value.
  bool has_one_window() const { return last - first == 1; }

  CanvasTile(const Plan& plan, int64_t tile) {
    const int top = static_cast<int>(tile / plan.tiles_x()) * plan.tile_y;
    const int left = static_cast<int>(tile % plan.tiles_x()) * plan.tile_x;
    y = {top, top + plan.tile_y < plan.height ? top + plan.tile_y : plan.height};
    x = {left, left + plan.tile_x < plan.width ? left + plan.tile_x : plan.width};
    first = plan.cover_index + plan.cover_start[tile];
    last = plan.cover_index + plan.cover_start[tile + 1];
  }
};

// run(window, i, j, cell, count): `count` cells of the tile, from its cell number `cell`, are the window's (i, j...).
template <class Run>
void for_each_run(const Plan& plan, const CanvasTile& tile, const Run& run) {
  for (const int32_t* window = tile.first; window != tile.last; ++window) {
    const int y0 = plan.origins[2 * *window], x0 = plan.origins[2 * *window + 1];
    for (int turn_y = 0; turn_y < 2; ++turn_y) {
      const Span y = covered(tile.y, y0, plan.h, plan.height, turn_y);
      if (y.begin >= y.end) continue;
      for (int turn_x = 0; turn_x < 2; ++turn_x) {
        const Span x = covered(tile.x, x0, plan.w, plan.width, turn_x);
        for (int row = y.begin; row < y.end && x.begin < x.end; ++row) {
          const int cell = (row - tile.y.begin) * plan.tile_x + x.begin - tile.x.begin;
          const int i = place_in_window(row, y0, plan.height), j = place_in_window(x.begin, x0, plan.width);
          run(*window, i, j, cell, x.end - x.begin);
        }
      }
    }
  }
}

template <class T, class A>
void add_weighted(A* total, const A* weight, const T* values, int count) {
  if (weight)
    for (int x = 0; x < count; ++x) total[x] += weight[x] * widen(values[x]);
  else
    for (int x = 0; x < count; ++x) total[x] += widen(values[x]);
}

// norm = the sum of the overlap weights over each cell of the tile.
template <class A>
void sum_weights(const Plan& plan, const CanvasTile& tile, const Overlap<A>& overlap, A* norm) {
  for_each_run(plan, tile, [&](int window, int i, int j, int cell, int count) {
    const A* weight = overlap.row(plan, window, i, j);
    for (int x = 0; x < count; ++x) norm[cell + x] += weight ? weight[x] : A(1);
  });
}

// total = the weighted sum of the windows over each cell of the tile, for one image and channel.
template <class T, class A>
void sum_windows(const Plan& plan, const CanvasTile& tile, const Overlap<A>& overlap, const T* windows, int64_t image,
                 int channel, A* total) {
  for_each_run(plan, tile, [&](int window, int i, int j, int cell, int count) {
    add_weighted(total + cell, overlap.row(plan, window, i, j),
                 windows + plan.window_offset(image, window, channel, i, j), count);
  });
}

}  // namespace instantas
