// Element types, their conversion to the type of the arithmetic, and what the device and the host call differently.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define INSTANTAS_INLINE __host__ __device__ __forceinline__
#else
#define INSTANTAS_INLINE inline
#endif

namespace instantas {

// float64 is computed in float64, everything else in float32.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

#ifdef __CUDACC__

using Half = __half;
using BFloat16 = __nv_bfloat16;

INSTANTAS_INLINE float widen(Half value) { return __half2float(value); }
INSTANTAS_INLINE float widen(BFloat16 value) { return __bfloat162float(value); }
template <class T>
INSTANTAS_INLINE T narrow(float value);
template <>
INSTANTAS_INLINE Half narrow<Half>(float value) { return __float2half_rn(value); }
template <>
INSTANTAS_INLINE BFloat16 narrow<BFloat16>(float value) { return __float2bfloat16_rn(value); }

#else

// Without a branch, so that loops over them are vectorised on any processor.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  return no ^ ((yes ^ no) & (0u - static_cast<uint32_t>(condition)));  // a ternary would become a branch
}

inline float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t rebias = 112u << 23;  // from exponent bias 15 to 127
  const uint32_t normal = (magnitude << 13) + rebias + select(magnitude >= 0x7c00u, rebias, 0u);
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  return float_of(select(magnitude < 0x400u, subnormal, normal) | sign);
}

inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

template <class T>
inline T narrow(float value);

template <>
inline Half narrow<Half>(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  // to nearest, ties to even; a carry out of the mantissa ends at infinity by itself
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // the adder rounds to 2^-24
  const uint32_t huge = select(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
  const uint32_t finite = select(magnitude < (113u << 23), subnormal, normal);
  return {static_cast<uint16_t>(select(magnitude >= (143u << 23), huge, finite) | ((bits >> 16) & 0x8000u))};
}

template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(select((bits & 0x7fffffffu) > 0x7f800000u, 0x7fc0u, rounded))};
}

#endif

INSTANTAS_INLINE float widen(float value) { return value; }
INSTANTAS_INLINE double widen(double value) { return value; }
template <>
INSTANTAS_INLINE float narrow<float>(float value) { return value; }
template <class T>
INSTANTAS_INLINE T narrow(double value) { return static_cast<T>(value); }

}  // namespace instantas
