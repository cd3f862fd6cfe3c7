// Device kernels of gather_windows and scatter_windows. Free of torch.
//
// Memory moves in packs of WIDTH elements, 16 bytes where rows allow it. Every element of the result is written by one
// thread, which reads what it needs: no atomics.
#pragma once

#include "pack.cuh"
#include "plan.cuh"

namespace instantas {

constexpr int GATHER_THREADS = 256;
constexpr int GATHER_PACKS = 4;  // per thread, all read before the first is written

// T: any type of the element's size. A block copies GATHER_THREADS * GATHER_PACKS packs of one channel of one window.
template <class T, int WIDTH>
__global__ void __launch_bounds__(GATHER_THREADS)
    gather_kernel(const T* canvas, T* windows, Plan plan, int blocks_of_plane) {
  const int64_t plane = blockIdx.x / blocks_of_plane;
  const int channel = static_cast<int>(plane % plan.channels);
  const int64_t row_of_windows = plane / plan.channels;
  const int window = static_cast<int>(row_of_windows % plan.windows);
  const int y0 = plan.origins[2 * window], x0 = plan.origins[2 * window + 1];
  const int packs_of_row = plan.w / WIDTH, packs = plan.h * packs_of_row;
  const int first = blockIdx.x % blocks_of_plane * (GATHER_THREADS * GATHER_PACKS) + threadIdx.x;
  const T* source = canvas + plan.canvas_offset(row_of_windows / plan.windows, channel, 0, 0);
  T* target = windows + plane * plan.window_plane();

  Pack<T, WIDTH> pack[GATHER_PACKS];
#pragma unroll
  for (int k = 0; k < GATHER_PACKS; ++k) {
    const int index = first + k * GATHER_THREADS;
    if (index >= packs) break;
    const T* row = source + int64_t{position_on_canvas(index / packs_of_row, y0, plan.height)} * plan.width;
    const int j = index % packs_of_row * WIDTH;
    if (x0 % WIDTH == 0) {
      pack[k] = load<WIDTH>(row + position_on_canvas(j, x0, plan.width));
    } else {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) pack[k].element[e] = row[position_on_canvas(j + e, x0, plan.width)];
    }
  }
#pragma unroll
  for (int k = 0; k < GATHER_PACKS; ++k) {
    const int index = first + k * GATHER_THREADS;
    if (index >= packs) break;
    store<WIDTH>(target + int64_t{index} * WIDTH, pack[k]);
  }
}

// A thread's place on the canvas: WIDTH cells of one row of a tile, for a few channels of one image.
template <int WIDTH, int CHANNELS>
struct Cells {
  int64_t image;
  int channel, tile, y, x;
  bool inside;

  __device__ __forceinline__ explicit Cells(const Plan& plan) {
    const int tiles = plan.tiles_y() * plan.tiles_x(), groups = (plan.channels + CHANNELS - 1) / CHANNELS;
    const int packs_of_row = plan.tile_x / WIDTH;
    tile = blockIdx.x % tiles;
    const int group = blockIdx.x / tiles;
    image = group / groups;
    channel = group % groups * CHANNELS;
    y = tile / plan.tiles_x() * plan.tile_y + threadIdx.x / packs_of_row;
    x = tile % plan.tiles_x() * plan.tile_x + threadIdx.x % packs_of_row * WIDTH;
    inside = y < plan.height && x < plan.width;
  }
};

// total += weight * windows over the cells, for every covering window; norm += weight. `sources` read the same places.
template <int WIDTH, int CHANNELS, int SOURCES, class T>
__device__ __forceinline__ void sum_windows(const T* const (&sources)[SOURCES], const float* weight, int64_t weight_stride,
                                            const Plan& plan, const Cells<WIDTH, CHANNELS>& cells,
                                            float (&total)[SOURCES][CHANNELS][WIDTH], float (&norm)[WIDTH]) {
  const int last = plan.cover_start[cells.tile + 1];
  for (int covering = plan.cover_start[cells.tile]; covering < last; ++covering) {
    const int window = plan.cover_index[covering];
    const int y0 = plan.origins[2 * window], x0 = plan.origins[2 * window + 1];
    const int i = place_in_window(cells.y, y0, plan.height);
    if (i >= plan.h) continue;
    const int64_t offset = plan.window_offset(cells.image, window, cells.channel, i, 0);
    const float* weight_row = weight ? weight + window * weight_stride + int64_t{i} * plan.w : nullptr;
    if (x0 % WIDTH == 0) {  // then the window has all of the cells or none
      const int j = place_in_window(cells.x, x0, plan.width);
      if (j >= plan.w) continue;
      Pack<T, WIDTH> pack[SOURCES][CHANNELS];
#pragma unroll
      for (int s = 0; s < SOURCES; ++s)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
          if (cells.channel + c < plan.channels)
            pack[s][c] = load<WIDTH>(sources[s] + offset + c * plan.window_plane() + j);
      float share[WIDTH];
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) share[e] = 1.0f;
      if (weight_row) load_floats(share, weight_row + j);
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
        norm[e] += share[e];
#pragma unroll
        for (int s = 0; s < SOURCES; ++s)
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c)
            if (cells.channel + c < plan.channels) total[s][c][e] += share[e] * widen(pack[s][c].element[e]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
        const int j = place_in_window(cells.x + e, x0, plan.width);
        if (j >= plan.w) continue;
        const float share = weight_row ? weight_row[j] : 1.0f;
        norm[e] += share;
#pragma unroll
        for (int s = 0; s < SOURCES; ++s)
#pragma unroll
          for (int c = 0; c < CHANNELS; ++c)
            if (cells.channel + c < plan.channels)
              total[s][c][e] += share * widen(sources[s][offset + c * plan.window_plane() + j]);
      }
    }
  }
}

template <class T, int WIDTH>
__global__ void scatter_kernel(const T* windows, const float* weight, int64_t weight_stride, T* canvas, Plan plan,
                               bool normalize) {
  constexpr int CHANNELS = CHANNELS_OF_THREAD<WIDTH>;
  const Cells<WIDTH, CHANNELS> cells(plan);
  if (!cells.inside) return;
  float total[1][CHANNELS][WIDTH] = {}, norm[WIDTH] = {};
  sum_windows({windows}, weight, weight_stride, plan, cells, total, norm);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (cells.channel + c >= plan.channels) break;
    Pack<T, WIDTH> pack;
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) pack.element[e] = narrow<T>(normalize ? total[0][c][e] / norm[e] : total[0][c][e]);
    store<WIDTH>(canvas + plan.canvas_offset(cells.image, cells.channel + c, cells.y, cells.x), pack);
  }
}

}  // namespace instantas
