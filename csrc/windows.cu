// gather_windows and scatter_windows on the device.
#include "cells.h"
#include "stream.h"
#include "windows.cuh"

namespace instantas {

namespace {

template <class T>
void gather(const GatherCall& call, const Stream& stream) {
  with_width<T>(call.plan, {call.canvas.data_ptr(), call.windows.data_ptr()}, [&](auto width) {
    constexpr int WIDTH = decltype(width)::value;
    const Plan& plan = call.plan;
    const int64_t packs = plan.window_plane() / WIDTH, packs_of_block = GATHER_THREADS * GATHER_PACKS;
    const int64_t blocks = (packs + packs_of_block - 1) / packs_of_block;
    const GatherDivisors by{Divisor(blocks), Divisor(plan.channels), Divisor(plan.windows), Divisor(plan.w / WIDTH)};
    check(launch(gather_kernel<T, WIDTH>, call.planes() * blocks, GATHER_THREADS, 0, stream, data<T>(call.canvas),
                 mutable_data<T>(call.windows), plan, by));
  });
}

}  // namespace

Tensor gather_windows(Tensor canvas, Tensor origins, Tensor cover_start, Tensor cover_index, Geometry geometry) {
  const Stream stream(canvas);
  const GatherCall call(canvas, make_plan(origins, cover_start, cover_index, geometry, canvas.size(1)));
  if (call.windows.numel() == 0) return call.windows;
  canvas.element_size() == 2 ? gather<uint16_t>(call, stream) : gather<uint32_t>(call, stream);
  return call.windows;
}

Tensor scatter_windows(Tensor windows, OptionalTensor weight, Tensor origins, Tensor cover_start, Tensor cover_index,
                       Geometry geometry, bool normalize) {
  const Stream stream(windows);
  const Plan plan = make_plan(origins, cover_start, cover_index, geometry, windows.size(2));
  const ScatterCall call(windows, weight, plan);
  if (call.canvas.numel() == 0) return call.canvas;
  with_device_element(windows, [&](auto element) {
    using T = decltype(element);
    const T* source = data<T>(call.windows);
    const float* weights = data<float>(call.weight);
    T* target = mutable_data<T>(call.canvas);
    with_width<T>(plan, {source, target, weights}, [&](auto width) {
      constexpr int WIDTH = decltype(width)::value;
      check(launch(scatter_kernel<T, WIDTH>, blocks_of_cells<WIDTH>(plan, windows.size(0)),
                   plan.tile_y * plan.tile_x / WIDTH, 0, stream, source, weights, weight_stride(call.weight), target,
                   plan, CellDivisors<WIDTH>(plan), normalize));
    });
  });
  return call.canvas;
}

}  // namespace instantas
