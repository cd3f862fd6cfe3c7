// How the kernels of windows.cuh and step.cuh are launched: packs of which width, and how many blocks.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "plan.cuh"

namespace instantas {

// The widest packs for rows of these lengths at these addresses: 16 bytes, 4 bytes or one element.
// run(std::integral_constant<int, WIDTH>{}).
template <class T, class Run>
void with_width(const Plan& plan, std::initializer_list<const void*> addresses, const Run& run) {
  const auto fits = [&](int width) {
    bool fit = plan.width % width == 0 && plan.w % width == 0;
    for (const void* address : addresses) fit = fit && reinterpret_cast<uintptr_t>(address) % 16 == 0;
    return fit;
  };
  constexpr int WIDE = 16 / sizeof(T), NARROW = 4 / sizeof(T);
  if (fits(WIDE)) return run(std::integral_constant<int, WIDE>{});
  if (NARROW > 1 && fits(NARROW)) return run(std::integral_constant<int, NARROW>{});
  run(std::integral_constant<int, 1>{});
}

// Blocks for all the cells of a canvas: see Cells.
template <int WIDTH>
int64_t blocks_of_cells(const Plan& plan, int64_t images) {
  constexpr int CHANNELS = CHANNELS_OF_THREAD<WIDTH>;
  return images * ((plan.channels + CHANNELS - 1) / CHANNELS) * plan.tiles_y() * plan.tiles_x();
}

}  // namespace instantas
