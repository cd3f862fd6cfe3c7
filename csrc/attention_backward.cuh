// Device kernels of the backward pass of regional attention, in float32 arithmetic. Free of torch.
//
// Probabilities are computed again. Gradients of keys and values are sums over queries: each is added up by one thread,
// over splits of the queries whose number does not depend on the device, then over the splits: no atomics.
#pragma once

#include "attention_fma.cuh"

namespace instantas {

// What the gradients of keys and values need of a row and slot: probability = factor 2^(logit - largest), logits being in
// base 2, and the mean of grad . value over the softmax that the probabilities belong to.
struct RowStatistics {
  float largest, factor, mean;
};

// The gradient of the queries goes where the result went: attention.out.
template <class T>
struct Backward {
  const T* grad;
  RowStatistics* statistics;  // (B, R, heads, N), where a row has weight for the slot
  float* partial;             // (splits, 2, P, L, heads, D): gradients of keys, then of values
  int images, splits;

  __device__ __forceinline__ RowStatistics& statistics_of(const Attention<T>& attention, int64_t image, int slot,
                                                          int head, int row) const {
    return statistics[((image * attention.slots + slot) * attention.heads + head) * attention.queries + row];
  }
};

template <class T>
__global__ void __launch_bounds__(FMA_THREADS) grad_query_kernel(Attention<T> attention, Backward<T> backward) {
  constexpr int ROWS = FMA_ROWS_OF_WARP;
  const FmaTile<T, ROWS> tile(attention, reinterpret_cast<float*>(shared_memory()));
  float* const grads = tile.end();
  tile.stage_rows(grads, backward.grad);
  ActiveRows<FMA_ROWS> active(reinterpret_cast<char*>(grads + FMA_ROWS * attention.depth));
  active.find(attention, tile.image, tile.first);
  sync_block();

  const int lane = threadIdx.x % WARP;
  float result[ROWS][FMA_CHUNKS] = {}, mean[ROWS] = {};
  RunningSoftmax softmax[ROWS];

  // First the softmax and the mean of grad . value, then, `final`, the gradient.
  const auto visit = [&](int slot, bool final) {
    const bool warp_active = active.template among<ROWS>(slot, tile.warp_row);
    float share[ROWS];
    tile.find_shares(share, active, slot);
    const int prompt = attention.prompt(tile.image, slot), tokens = attention.length(prompt);
    for (int start = 0; start < tokens; start += FMA_TOKENS) {
      tile.stage_tokens(prompt, start, tokens - start);
      if (!warp_active) continue;
      float logit_grads[ROWS], grad_dots[ROWS];
      tile.find_key_dots(logit_grads);
      find_dots(grad_dots, grads + tile.warp_row * attention.depth, tile.values + lane * tile.pitch, attention.depth);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const bool counts = tile.counts(tokens - start, share[r]);
        if (final) {
          const float exponential = exp2f(fmaf(logit_grads[r], attention.scale_base2, -softmax[r].largest));
          const float probability = counts ? share[r] / softmax[r].sum * exponential : 0.0f;
          logit_grads[r] = probability * (grad_dots[r] - mean[r]) * attention.scale;
        } else {
          const float weight = attention.joint ? share[r] : 1.0f;
          float factor;
          const float term = softmax[r].add(logit_grads[r], counts, attention.scale_base2, weight, factor);
          mean[r] = mean[r] * factor + warp_sum(term * grad_dots[r]);
        }
      }
      if (final) add_rows(result, logit_grads, tile.keys, tokens - start, tile.pitch, attention.depth);
    }
    if (!final || !warp_active) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int number = active.number(tile.warp_row + r);
      if (lane == 0 && number < attention.queries)
        backward.statistics_of(attention, tile.image, slot, tile.head, number) = {
            softmax[r].largest, share[r] > 0.0f ? share[r] / softmax[r].sum : 0.0f, mean[r]};
    }
  };
  const auto finish_means = [&] {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) mean[r] = softmax[r].sum == 0.0f ? 0.0f : mean[r] / softmax[r].sum;
  };

  if (attention.joint) {
    for (int slot = 0; slot < attention.slots; ++slot)
      if (active.anywhere(slot)) visit(slot, false);
    finish_means();
  }
  for (int slot = 0; slot < attention.slots; ++slot) {
    if (!active.anywhere(slot)) continue;
    if (!attention.joint) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) softmax[r] = RunningSoftmax(), mean[r] = 0.0f;
      visit(slot, false);
      finish_means();
    }
    visit(slot, true);
  }
  tile.store_rows(attention.out, active, result);
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
__device__ __forceinline__ void add_and_clear(float (&sums)[BANK_TOKENS][FMA_CHUNKS],
                                              float (&added)[BANK_TOKENS][FMA_CHUNKS]) {
#pragma unroll
  for (int t = 0; t < BANK_TOKENS; ++t)
#pragma unroll
    for (int i = 0; i < FMA_CHUNKS; ++i) {
      sums[t][i] += added[t][i];
      added[t][i] = 0.0f;
    }
}

// A block sums over one split of the queries, for 32 tokens of one prompt and head (the bank: all keys and values).
template <class T>
__global__ void __launch_bounds__(BANK_THREADS) grad_key_value_kernel(Attention<T> attention, Backward<T> backward) {
  const int blocks = (attention.tokens + FMA_TOKENS - 1) / FMA_TOKENS;
  const int split = blockIdx.x % backward.splits, start = blockIdx.x / backward.splits % blocks * FMA_TOKENS;
  const int head = blockIdx.x / backward.splits / blocks % attention.heads;
  const int prompt = blockIdx.x / backward.splits / blocks / attention.heads;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int depth = attention.depth, pitch = pitch_of(depth);
  const int count = attention.tokens - start, present = attention.length(prompt) - start;  // of the block's tokens
  const int64_t stride = int64_t{attention.heads} * depth, offset = attention.key_offset(prompt, start, head);

  float* const queries = reinterpret_cast<float*>(shared_memory());
  float* const grads = queries + BANK_ROWS * depth;
  float* const keys = grads + BANK_ROWS * depth;
  float* const values = keys + FMA_TOKENS * pitch;
  float* const probabilities = values + FMA_TOKENS * pitch;
  float* const logit_grads = probabilities + BANK_ROWS * BANK_PITCH;
  stage_tokens(keys, pitch, attention.key + offset, present, stride, depth);
  stage_tokens(values, pitch, attention.value + offset, present, stride, depth);

  float of_keys[BANK_TOKENS][FMA_CHUNKS] = {}, of_values[BANK_TOKENS][FMA_CHUNKS] = {};
  float new_keys[BANK_TOKENS][FMA_CHUNKS] = {}, new_values[BANK_TOKENS][FMA_CHUNKS] = {};
  int visited = 0;
  const int64_t tiles = (attention.queries + BANK_ROWS - 1) / BANK_ROWS, all = tiles * backward.images;
  const int64_t last = all * (split + 1) / backward.splits;
  for (int64_t tile = all * split / backward.splits; tile < last; ++tile) {
    const int64_t image = tile / tiles;
    const int first = static_cast<int>(tile % tiles) * BANK_ROWS, number = attention.row(image, first + warp);
    const auto stage_rows = [&](float* shared, const T* source) {
      stage_floats(shared, BANK_ROWS, depth, source + attention.query_offset(image, 0, head),
                   [&](int row) { return attention.row(image, first + row); }, attention.queries, stride, depth);
    };
    for (int slot = 0; slot < attention.slots; ++slot) {
      if (attention.prompt(image, slot) != prompt) continue;
      const bool weighted = attention.weight(image, slot, number) > 0.0f;
      if (!any_of_block(weighted)) continue;
      stage_rows(queries, attention.query);
      stage_rows(grads, backward.grad);
      sync_block();
      float dot[1], grad_dots[1], probability = 0.0f, logit_grad = 0.0f;
      find_dots(dot, queries + warp * depth, keys + lane * pitch, depth);
      find_dots(grad_dots, grads + warp * depth, values + lane * pitch, depth);
      if (lane < present && weighted) {
        const RowStatistics row = backward.statistics_of(attention, image, slot, head, number);
        if (row.factor != 0.0f) {  // a weight may be too small to count
          probability = row.factor * exp2f(fmaf(dot[0], attention.scale_base2, -row.largest));
          logit_grad = probability * (grad_dots[0] - row.mean) * attention.scale;
        }
      }
      probabilities[warp * BANK_PITCH + lane] = probability;
      logit_grads[warp * BANK_PITCH + lane] = logit_grad;
      sync_block();
      for (int row = 0; row < BANK_ROWS; ++row) {
        float probability[BANK_TOKENS], logit_grad[BANK_TOKENS];
#pragma unroll
        for (int t = 0; t < BANK_TOKENS; ++t) {
          probability[t] = probabilities[row * BANK_PITCH + warp * BANK_TOKENS + t];
          logit_grad[t] = logit_grads[row * BANK_PITCH + warp * BANK_TOKENS + t];
        }
#pragma unroll
        for (int i = 0; i < FMA_CHUNKS; ++i) {
          const int d = i * WARP + lane;
          if (d >= depth) break;
          const float query = queries[row * depth + d], grad = grads[row * depth + d];
#pragma unroll
          for (int t = 0; t < BANK_TOKENS; ++t) {
            new_keys[t][i] += logit_grad[t] * query;
            new_values[t][i] += probability[t] * grad;
          }
        }
      }
      if (++visited % BANK_TILES == 0) add_and_clear(of_keys, new_keys), add_and_clear(of_values, new_values);
    }
  }
  add_and_clear(of_keys, new_keys), add_and_clear(of_values, new_values);
  const int64_t bank = int64_t{attention.prompts} * attention.tokens * stride;
  float* const target = backward.partial + 2 * split * bank + offset;
#pragma unroll
  for (int t = 0; t < BANK_TOKENS; ++t) {
    const int token = warp * BANK_TOKENS + t;
    if (token >= count) break;
#pragma unroll
    for (int i = 0; i < FMA_CHUNKS; ++i) {
      const int d = i * WARP + lane;
      if (d >= depth) break;
      target[token * stride + d] = of_keys[t][i];
      target[bank + token * stride + d] = of_values[t][i];
    }
  }
}

// The gradients of keys, then of values: sums over the splits.
template <class T>
__global__ void sum_splits_kernel(const float* partial, T* grad_key, T* grad_value, int64_t bank, int splits) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= 2 * bank) return;
  float sum = 0.0f;
  for (int split = 0; split < splits; ++split) sum += partial[2 * split * bank + i];
  (i < bank ? grad_key[i] : grad_value[i - bank]) = narrow<T>(sum);
}

}  // namespace instantas
