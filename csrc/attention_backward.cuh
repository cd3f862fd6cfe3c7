// Device kernels of the backward pass of regional attention, in float32 arithmetic. Free of torch.
//
// Probabilities are computed again. Gradients of keys and values are sums over queries: each is added up by one thread,
// in parts whose number does not depend on the device, then over the parts: no atomics.
#pragma once

#include "attention_fma.cuh"

namespace instantas {

// What the gradients of keys and values need of a row and slot: probability = factor 2^(logit - largest), logits being in
// base 2, and the sum of the probabilities times what is wanted of them, relative to the softmax they belong to.
struct RowStatistics {
  float largest, factor, mean;
};

// The gradient of the queries goes where the result went: attention.out.
template <class T>
struct Backward {
  const T* grad;
  RowStatistics* statistics;  // (B, R, heads, N), where a row has weight for the slot
  float* partial;             // (parts, 2, P, L, heads, D): gradients of keys, then of values
  int images, parts;

  __device__ __forceinline__ RowStatistics& of(const Attention<T>& attention, int64_t image, int slot, int head,
                                               int row) const {
    return statistics[((image * attention.slots + slot) * attention.heads + head) * attention.queries + row];
  }
};

template <class T>
__global__ void __launch_bounds__(FMA_THREADS) grad_query_kernel(Attention<T> attention, Backward<T> backward) {
  constexpr int ROWS = FMA_ROWS_OF_WARP;
  const FmaTile<T, ROWS> tile(attention, reinterpret_cast<float*>(shared_memory()));
  float* const grads = tile.end();
  stage_floats(grads, FMA_ROWS, attention.depth,
               backward.grad + attention.query_offset(tile.image, tile.first, tile.head), attention.queries - tile.first,
               tile.stride, attention.depth);
  Present<FMA_ROWS> present(reinterpret_cast<char*>(grads + FMA_ROWS * attention.depth));
  present.find(attention, tile.image, tile.first);
  sync_block();

  const int lane = threadIdx.x % WARP;
  float result[ROWS][FMA_PARTS] = {}, mean[ROWS] = {};
  RunningSoftmax softmax[ROWS];

  // First the softmax and the mean of what is wanted of its probabilities, then, `final`, the gradient.
  const auto visit = [&](int slot, bool final) {
    const bool concerned = present.template among<ROWS>(slot, tile.own);
    float share[ROWS];
    tile.find_shares(share, present, slot);
    for (int start = 0; start < attention.tokens; start += FMA_TOKENS) {
      tile.stage_tokens(attention.prompt(tile.image, slot), start);
      if (!concerned) continue;
      float slopes[ROWS], wanted[ROWS];
      tile.find_key_dots(slopes);
      find_dots(wanted, grads + tile.own * attention.depth, tile.values + lane * tile.pitch, attention.depth);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const bool counts = tile.counts(start, share[r]);
        if (final) {
          const float exponential = exp2f(fmaf(slopes[r], attention.scale2, -softmax[r].largest));
          const float probability = counts ? share[r] / softmax[r].sum * exponential : 0.0f;
          slopes[r] = probability * (wanted[r] - mean[r]) * attention.scale;
        } else {
          const float weight = attention.joint ? share[r] : 1.0f;
          float factor;
          const float term = softmax[r].add(slopes[r], counts, attention.scale2, weight, factor);
          mean[r] = mean[r] * factor + warp_sum(term * wanted[r]);
        }
      }
      if (final) add_rows(result, slopes, tile.keys, attention.tokens - start, tile.pitch, attention.depth);
    }
    if (!final || !concerned) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (lane == 0 && tile.first + tile.own + r < attention.queries)
        backward.of(attention, tile.image, slot, tile.head, tile.first + tile.own + r) = {
            softmax[r].largest, share[r] > 0.0f ? share[r] / softmax[r].sum : 0.0f, mean[r]};
  };
  const auto settle = [&] {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) mean[r] = softmax[r].sum == 0.0f ? 0.0f : mean[r] / softmax[r].sum;
  };

  if (attention.joint) {
    for (int slot = 0; slot < attention.slots; ++slot)
      if (present.anywhere(slot)) visit(slot, false);
    settle();
  }
  for (int slot = 0; slot < attention.slots; ++slot) {
    if (!present.anywhere(slot)) continue;
    if (!attention.joint) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) softmax[r] = RunningSoftmax(), mean[r] = 0.0f;
      visit(slot, false);
      settle();
    }
    visit(slot, true);
  }
  tile.store_rows(attention.out, result);
}

constexpr int BANK_WARPS = 8;
constexpr int BANK_THREADS = BANK_WARPS * WARP;
constexpr int BANK_ROWS = BANK_WARPS;                 // queries staged at a time, one for each warp
constexpr int BANK_TOKENS = FMA_TOKENS / BANK_WARPS;  // for which one warp sums
constexpr int BANK_PITCH = FMA_TOKENS + 1;
constexpr int BANK_TILES = 4;  // whose sums are added up by themselves first: long sums keep their digits

inline int bank_shared(int depth) {
  return (2 * BANK_ROWS * depth + 2 * FMA_TOKENS * pitch_of(depth) + 2 * BANK_ROWS * BANK_PITCH) * 4;
}

// sums += added, which start again at zero.
__device__ __forceinline__ void take_in(float (&sums)[BANK_TOKENS][FMA_PARTS], float (&added)[BANK_TOKENS][FMA_PARTS]) {
#pragma unroll
  for (int t = 0; t < BANK_TOKENS; ++t)
#pragma unroll
    for (int i = 0; i < FMA_PARTS; ++i) {
      sums[t][i] += added[t][i];
      added[t][i] = 0.0f;
    }
}

// A block sums over one part of the queries, for 32 tokens of one prompt and head.
template <class T>
__global__ void __launch_bounds__(BANK_THREADS) grad_bank_kernel(Attention<T> attention, Backward<T> backward) {
  const int blocks = (attention.tokens + FMA_TOKENS - 1) / FMA_TOKENS;
  const int part = blockIdx.x % backward.parts, start = blockIdx.x / backward.parts % blocks * FMA_TOKENS;
  const int head = blockIdx.x / backward.parts / blocks % attention.heads;
  const int prompt = blockIdx.x / backward.parts / blocks / attention.heads;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int depth = attention.depth, pitch = pitch_of(depth), count = attention.tokens - start;
  const int64_t stride = int64_t{attention.heads} * depth, offset = attention.key_offset(prompt, start, head);

  float* const queries = reinterpret_cast<float*>(shared_memory());
  float* const grads = queries + BANK_ROWS * depth;
  float* const keys = grads + BANK_ROWS * depth;
  float* const values = keys + FMA_TOKENS * pitch;
  float* const probabilities = values + FMA_TOKENS * pitch;
  float* const slopes = probabilities + BANK_ROWS * BANK_PITCH;
  stage_floats(keys, FMA_TOKENS, pitch, attention.key + offset, count, stride, depth);
  stage_floats(values, FMA_TOKENS, pitch, attention.value + offset, count, stride, depth);

  float of_keys[BANK_TOKENS][FMA_PARTS] = {}, of_values[BANK_TOKENS][FMA_PARTS] = {};
  float new_keys[BANK_TOKENS][FMA_PARTS] = {}, new_values[BANK_TOKENS][FMA_PARTS] = {};
  int visited = 0;
  const int64_t tiles = (attention.queries + BANK_ROWS - 1) / BANK_ROWS, all = tiles * backward.images;
  const int64_t last = all * (part + 1) / backward.parts;
  for (int64_t tile = all * part / backward.parts; tile < last; ++tile) {
    const int64_t image = tile / tiles;
    const int first = static_cast<int>(tile % tiles) * BANK_ROWS;
    for (int slot = 0; slot < attention.slots; ++slot) {
      if (attention.prompt(image, slot) != prompt) continue;
      const bool weighted = threadIdx.x < BANK_ROWS && attention.weight(image, slot, first + threadIdx.x) > 0.0f;
      if (!any_of_block(weighted)) continue;
      const int64_t rows = attention.query_offset(image, first, head);
      stage_floats(queries, BANK_ROWS, depth, attention.query + rows, attention.queries - first, stride, depth);
      stage_floats(grads, BANK_ROWS, depth, backward.grad + rows, attention.queries - first, stride, depth);
      sync_block();
      float dot[1], wanted[1], probability = 0.0f, slope = 0.0f;
      find_dots(dot, queries + warp * depth, keys + lane * pitch, depth);
      find_dots(wanted, grads + warp * depth, values + lane * pitch, depth);
      if (lane < count && attention.weight(image, slot, first + warp) > 0.0f) {
        const RowStatistics row = backward.of(attention, image, slot, head, first + warp);
        if (row.factor != 0.0f) {  // a weight may be too small to count
          probability = row.factor * exp2f(fmaf(dot[0], attention.scale2, -row.largest));
          slope = probability * (wanted[0] - row.mean) * attention.scale;
        }
      }
      probabilities[warp * BANK_PITCH + lane] = probability;
      slopes[warp * BANK_PITCH + lane] = slope;
      sync_block();
      for (int row = 0; row < BANK_ROWS; ++row) {
        float probability[BANK_TOKENS], slope[BANK_TOKENS];
#pragma unroll
        for (int t = 0; t < BANK_TOKENS; ++t) {
          probability[t] = probabilities[row * BANK_PITCH + warp * BANK_TOKENS + t];
          slope[t] = slopes[row * BANK_PITCH + warp * BANK_TOKENS + t];
        }
#pragma unroll
        for (int i = 0; i < FMA_PARTS; ++i) {
          const int d = i * WARP + lane;
          if (d >= depth) break;
          const float query = queries[row * depth + d], grad = grads[row * depth + d];
#pragma unroll
          for (int t = 0; t < BANK_TOKENS; ++t) {
            new_keys[t][i] += slope[t] * query;
            new_values[t][i] += probability[t] * grad;
          }
        }
      }
      if (++visited % BANK_TILES == 0) take_in(of_keys, new_keys), take_in(of_values, new_values);
    }
  }
  take_in(of_keys, new_keys), take_in(of_values, new_values);
  const int64_t bank = int64_t{attention.prompts} * attention.tokens * stride;
  float* const target = backward.partial + 2 * part * bank + offset;
#pragma unroll
  for (int t = 0; t < BANK_TOKENS; ++t) {
    const int token = warp * BANK_TOKENS + t;
    if (token >= count) break;
#pragma unroll
    for (int i = 0; i < FMA_PARTS; ++i) {
      const int d = i * WARP + lane;
      if (d >= depth) break;
      target[token * stride + d] = of_keys[t][i];
      target[bank + token * stride + d] = of_values[t][i];
    }
  }
}

// grads = the sum of the parts, first of the keys, then of the values.
template <class T>
__global__ void sum_parts_kernel(const float* partial, T* grad_key, T* grad_value, int64_t bank, int parts) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= 2 * bank) return;
  float sum = 0.0f;
  for (int part = 0; part < parts; ++part) sum += partial[2 * part * bank + i];
  (i < bank ? grad_key[i] : grad_value[i - bank]) = narrow<T>(sum);
}

}  // namespace instantas
