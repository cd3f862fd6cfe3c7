// Elements that move between memory and registers as one. Free of torch.
#pragma once

#include "device.cuh"

namespace instantas {

template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Pack {
  T element[WIDTH];
};

template <int WIDTH, class T>
__device__ __forceinline__ Pack<T, WIDTH> load(const T* address) {
  return *reinterpret_cast<const Pack<T, WIDTH>*>(address);
}

template <int WIDTH, class T>
__device__ __forceinline__ void store(T* address, const Pack<T, WIDTH>& pack) {
  *reinterpret_cast<Pack<T, WIDTH>*>(address) = pack;
}

// The elements of a word that pack_pair made.
template <class T>
__device__ __forceinline__ float widen_low(unsigned word) {
  T pair[2];
  memcpy(pair, &word, sizeof word);
  return widen(pair[0]);
}
template <class T>
__device__ __forceinline__ float widen_high(unsigned word) {
  T pair[2];
  memcpy(pair, &word, sizeof word);
  return widen(pair[1]);
}

// WIDTH consecutive numbers, by 16 bytes at most.
template <int WIDTH>
__device__ __forceinline__ void load_floats(float (&values)[WIDTH], const float* address) {
  constexpr int SIZE = WIDTH < 4 ? WIDTH : 4;
#pragma unroll
  for (int i = 0; i < WIDTH; i += SIZE) {
    const Pack<float, SIZE> pack = load<SIZE>(address + i);
#pragma unroll
    for (int e = 0; e < SIZE; ++e) values[i + e] = pack.element[e];
  }
}

}  // namespace instantas
