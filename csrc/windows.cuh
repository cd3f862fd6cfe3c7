// Device kernels of gather_windows and scatter_windows. Free of torch.
//
// Memory moves in packs of WIDTH elements, 16 bytes where rows allow it. Every element of the result is written by one
// thread, which reads what it needs: no atomics.
#pragma once

#include "divisor.cuh"
#include "pack.cuh"
#include "plan.cuh"

namespace instantas {

constexpr int GATHER_THREADS = 128;
constexpr int GATHER_PACKS = 4;  // per thread, all read before the first is written: 64x64 cells of 16 bits are a block's

// What the numbers of blocks and packs are divided by.
struct GatherDivisors {
  Divisor blocks_of_plane, channels, windows, packs_of_row;
};

// T: any type of the element's size. A block copies GATHER_THREADS * GATHER_PACKS packs of one channel of one window.
template <class T, int WIDTH>
__global__ void __launch_bounds__(GATHER_THREADS)
    gather_kernel(const T* canvas, T* windows, Plan plan, GatherDivisors by) {
  const Parts block = by.blocks_of_plane.divide(blockIdx.x), plane = by.channels.divide(block.quotient);
  const Parts row_of_windows = by.windows.divide(plane.quotient);
  const int window = row_of_windows.remainder;
  const int y0 = plan.origins[2 * window], x0 = plan.origins[2 * window + 1];
  const int packs = static_cast<int>(plan.window_plane() / WIDTH);
  const int first = block.remainder * (GATHER_THREADS * GATHER_PACKS) + threadIdx.x;
  const T* source = canvas + plan.canvas_offset(row_of_windows.quotient, plane.remainder, 0, 0);
  T* target = windows + block.quotient * plan.window_plane();

  Pack<T, WIDTH> pack[GATHER_PACKS];
#pragma unroll
  for (int k = 0; k < GATHER_PACKS; ++k) {
    const int index = first + k * GATHER_THREADS;
    if (index >= packs) break;
    const Parts place = by.packs_of_row.divide(index);
    const T* row = source + int64_t{position_on_canvas(place.quotient, y0, plan.height)} * plan.width;
    const int j = place.remainder * WIDTH;
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

// What the numbers of blocks and threads are divided by.
template <int WIDTH>
struct CellDivisors {
  Divisor tiles, groups, tiles_x, packs_of_row;

  explicit CellDivisors(const Plan& plan)
      : tiles(int64_t{plan.tiles_y()} * plan.tiles_x()),
        groups((plan.channels + CHANNELS_OF_THREAD<WIDTH> - 1) / CHANNELS_OF_THREAD<WIDTH>),
        tiles_x(plan.tiles_x()),
        packs_of_row(plan.tile_x / WIDTH) {}
};

// A thread's place on the canvas: WIDTH cells of one row of a tile, for a few channels of one image.
template <int WIDTH, int CHANNELS>
struct Cells {
  int image, channel, tile, y, x;
  bool inside;

  __device__ __forceinline__ Cells(const Plan& plan, const CellDivisors<WIDTH>& by) {
    const Parts block = by.tiles.divide(blockIdx.x), group = by.groups.divide(block.quotient);
    const Parts place = by.tiles_x.divide(block.remainder), thread = by.packs_of_row.divide(threadIdx.x);
    image = group.quotient;
    channel = group.remainder * CHANNELS;
    tile = block.remainder;
    y = place.quotient * plan.tile_y + thread.quotient;
    x = place.remainder * plan.tile_x + thread.remainder * WIDTH;
    inside = y < plan.height && x < plan.width;
  }
};

// total += weight * windows over the cells, for every covering window; norm += weight. `sources` read the same places.
template <int WIDTH, int CHANNELS, int SOURCES, class T>
__device__ __forceinline__ void sum_windows(const T* const (&sources)[SOURCES], const float* weight, int64_t weight_stride,
                                            const Plan& plan, const Cells<WIDTH, CHANNELS>& cells,
                                            float (&total)[SOURCES][CHANNELS][WIDTH], float (&norm)[WIDTH]) {
  const int64_t plane = plan.window_plane(), stride = plane * plan.channels;  // from one window to the next
  const int64_t first = plan.window_offset(cells.image, 0, cells.channel, 0, 0);
  const int last = plan.cover_start[cells.tile + 1];
  for (int covering = plan.cover_start[cells.tile]; covering < last; ++covering) {
    const int window = plan.cover_index[covering];
    const int y0 = plan.origins[2 * window], x0 = plan.origins[2 * window + 1];
    const int i = place_in_window(cells.y, y0, plan.height);
    if (i >= plan.h) continue;
    const int64_t offset = first + window * stride + int64_t{i} * plan.w;
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
            pack[s][c] = load<WIDTH>(sources[s] + offset + c * plane + j);
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
              total[s][c][e] += share * widen(sources[s][offset + c * plane + j]);
      }
    }
  }
}

// dividend / divisor with a reciprocal made once: in float32 what was rounded away is put back, so that the digits are those
// of a division; in 16 bits it does not show.
template <class T>
__device__ __forceinline__ float quotient(float dividend, float divisor, float reciprocal) {
  const float rounded = dividend * reciprocal;
  if (sizeof(T) < sizeof(float)) return rounded;
  return fabsf(rounded) < INFINITY ? fmaf(fmaf(-rounded, divisor, dividend), reciprocal, rounded) : rounded;
}

// The sums become means: one reciprocal for a cell. Where the weights are so small that it would be infinite, it is that of
// more, and the sums are more as well.
template <class T, int WIDTH, int CHANNELS, int SOURCES>
__device__ __forceinline__ void divide(float (&total)[SOURCES][CHANNELS][WIDTH], const float (&norm)[WIDTH]) {
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) {
    const float more = norm[e] < 0x1p-100f ? 0x1p100f : 1.0f, divisor = norm[e] * more, reciprocal = 1.0f / divisor;
#pragma unroll
    for (int s = 0; s < SOURCES; ++s)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) total[s][c][e] = quotient<T>(total[s][c][e] * more, divisor, reciprocal);
  }
}

template <class T, int WIDTH>
__global__ void scatter_kernel(const T* windows, const float* weight, int64_t weight_stride, T* canvas, Plan plan,
                               CellDivisors<WIDTH> by, bool normalize) {
  constexpr int CHANNELS = CHANNELS_OF_THREAD<WIDTH>;
  const Cells<WIDTH, CHANNELS> cells(plan, by);
  if (!cells.inside) return;
  float total[1][CHANNELS][WIDTH] = {}, norm[WIDTH] = {};
  sum_windows({windows}, weight, weight_stride, plan, cells, total, norm);
  if (normalize) divide<T>(total, norm);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (cells.channel + c >= plan.channels) break;
    Pack<T, WIDTH> pack;
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) pack.element[e] = narrow<T>(total[0][c][e]);
    store<WIDTH>(canvas + plan.canvas_offset(cells.image, cells.channel + c, cells.y, cells.x), pack);
  }
}

}  // namespace instantas
