// gather_windows and scatter_windows on the device.
#include "cells.h"
#include "stream.h"
#include "windows.cuh"

namespace instantas {

namespace {

template <class T>
void gather(const Tensor& canvas, const Tensor& windows, const Plan& plan, const Stream& stream) {
  with_width<T>(plan, {canvas.data_ptr(), windows.data_ptr()}, [&](auto width) {
    constexpr int WIDTH = decltype(width)::value;
    const int64_t planes = windows.size(0) * plan.windows * plan.channels;
    const int64_t packs = plan.window_plane() / WIDTH, packs_of_block = GATHER_THREADS * GATHER_PACKS;
    const int blocks = static_cast<int>((packs + packs_of_block - 1) / packs_of_block);
    check(launch(gather_kernel<T, WIDTH>, planes * blocks, GATHER_THREADS, 0, stream, data<T>(canvas),
                 mutable_data<T>(windows), plan, blocks));
  });
}

}  // namespace

Tensor gather_windows(Tensor canvas, Tensor origins, Tensor cover_start, Tensor cover_index, Geometry geometry) {
  const Stream stream(canvas);
  canvas = packed(canvas);
  const Plan plan = make_plan(origins, cover_start, cover_index, geometry, canvas.size(1));
  Tensor windows = torch::stable::new_empty(canvas, {canvas.size(0), plan.windows, plan.channels, plan.h, plan.w});
  if (windows.numel() == 0) return windows;
  if (canvas.element_size() == 2) {
    gather<uint16_t>(canvas, windows, plan, stream);
  } else {
    gather<uint32_t>(canvas, windows, plan, stream);
  }
  return windows;
}

Tensor scatter_windows(Tensor windows, OptionalTensor weight, Tensor origins, Tensor cover_start, Tensor cover_index,
                       Geometry geometry, bool normalize) {
  const Stream stream(windows);
  windows = packed(windows);
  weight = packed_arithmetic(weight, windows);
  const Plan plan = make_plan(origins, cover_start, cover_index, geometry, windows.size(2));
  Tensor canvas = torch::stable::new_empty(windows, {windows.size(0), plan.channels, plan.height, plan.width});
  if (canvas.numel() == 0) return canvas;
  with_device_element(windows, [&](auto element) {
    using T = decltype(element);
    with_width<T>(plan, {windows.data_ptr(), canvas.data_ptr(), data<float>(weight)}, [&](auto width) {
      constexpr int WIDTH = decltype(width)::value;
      check(launch(scatter_kernel<T, WIDTH>, blocks_of_cells<WIDTH>(plan, canvas.size(0)),
                   plan.tile_y * plan.tile_x / WIDTH, 0, stream, data<T>(windows), data<float>(weight),
                   weight_stride(weight), mutable_data<T>(canvas), plan, normalize));
    });
  });
  return canvas;
}

}  // namespace instantas
