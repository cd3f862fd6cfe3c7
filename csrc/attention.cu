// regional_attention and its backward pass on the device.
#include <algorithm>
#include <cmath>

#include "attention.cuh"
#include "attention_backward.cuh"
#include "attention_fma.cuh"
#include "stream.h"

namespace instantas {

namespace {

constexpr double LOG2_E = 1.4426950408889634;

// What both passes make of their arguments: inputs that are contiguous.
struct AttentionCall {
  Tensor query, key, value, prompt_ids, weights;
  OptionalTensor order, lengths;
  bool joint;
  double scale;

  AttentionCall(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& prompt_ids,
                const Tensor& weights, bool joint, double scale, const OptionalTensor& order,
                const OptionalTensor& lengths)
      : query(packed(query)),
        key(packed(key)),
        value(packed(value)),
        prompt_ids(packed(prompt_ids)),
        weights(*packed_arithmetic(weights, query)),
        order(order ? OptionalTensor(packed(*order)) : std::nullopt),
        lengths(lengths ? OptionalTensor(packed(*lengths)) : std::nullopt),
        joint(joint),
        scale(scale) {}

  template <class T>
  Attention<T> attention(const Tensor& out) const {
    bool aligned = query.size(3) % 8 == 0;
    for (const Tensor& tensor : {query, key, value, out})
      aligned = aligned && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
    return {data<T>(query),
            data<T>(key),
            data<T>(value),
            mutable_data<T>(out),
            data<int32_t>(prompt_ids),
            data<float>(weights),
            data<int32_t>(order),
            data<int32_t>(lengths),
            static_cast<int>(query.size(1)),
            static_cast<int>(query.size(2)),
            static_cast<int>(query.size(3)),
            static_cast<int>(key.size(0)),
            static_cast<int>(key.size(1)),
            static_cast<int>(prompt_ids.size(1)),
            static_cast<float>(scale),
            static_cast<float>(scale * LOG2_E),
            joint,
            aligned};
  }
};

int64_t tiles_of(const Tensor& query, int rows) {
  return query.size(0) * query.size(2) * ((query.size(1) + rows - 1) / rows);
}

// A block computes one tile after the other, so that it stages a prompt's keys and values once for many.
template <class T, int DEPTH>
void run(const Attention<T>& attention, const Tensor& query, const Stream& stream) {
  using Shape = MmaShape<DEPTH>;
  Multiprocessors gpu;
  check(find_multiprocessors(gpu));
  const auto fit = [&](int shared) {
    return std::min(Shape::BLOCKS, gpu.shared / (shared + Multiprocessors::RESERVED));
  };
  const int matrices = Shape::MATRICES + (ActiveRows<Shape::ROWS, 2>::size(attention.slots) + 15) / 16 * 16;
  const int second = matrices + Shape::QUERIES;

  // As many blocks as run at once, where one prompt makes tiles alike. With several prompts some take longer: then there
  // are four times as many blocks, which start as others end. The launch refuses more than 2^31 - 1 tiles.
  const int64_t tiles = tiles_of(query, Shape::ROWS), rounds = attention.slots == 1 ? 1 : 4;
  const int64_t running = int64_t{gpu.count} * std::max(fit(matrices), 1);
  const int64_t blocks = tiles > 0x7fffffff ? tiles : std::min(tiles, running * rounds);
  // a second buffer for queries, where it costs no block its place
  const bool ahead = blocks < tiles && fit(second) == fit(matrices);
  const Walk walk{Divisor((query.size(1) + Shape::ROWS - 1) / Shape::ROWS), Divisor(query.size(2)),
                  static_cast<int>(tiles / blocks), static_cast<int>(tiles % blocks), matrices / 2, ahead};
  check(launch(attention_kernel<T, DEPTH>, blocks, Shape::WARPS * WARP, ahead ? second : matrices, stream, attention,
               walk));
}

void forward(const Attention<float>& attention, const Tensor& query, const Stream& stream) {
  const int shared = fma_shared(FMA_ROWS, attention.depth) + ActiveRows<FMA_ROWS>::size(attention.slots);
  check(launch(attention_fma_kernel, tiles_of(query, FMA_ROWS), FMA_THREADS, shared, stream, attention));
}

template <class T>
void forward(const Attention<T>& attention, const Tensor& query, const Stream& stream) {
  if (attention.depth <= 32) return run<T, 32>(attention, query, stream);
  if (attention.depth <= 48) return run<T, 48>(attention, query, stream);
  if (attention.depth <= 64) return run<T, 64>(attention, query, stream);
  if (attention.depth <= 80) return run<T, 80>(attention, query, stream);
  if (attention.depth <= 96) return run<T, 96>(attention, query, stream);
  if (attention.depth <= 128) return run<T, 128>(attention, query, stream);
  if (attention.depth <= 160) return run<T, 160>(attention, query, stream);
  return run<T, 256>(attention, query, stream);
}

}  // namespace

Tensor regional_attention(Tensor query, Tensor key, Tensor value, Tensor prompt_ids, Tensor weights, bool joint,
                          double scale, OptionalTensor order, OptionalTensor lengths) {
  const Stream stream(query);
  const AttentionCall call(query, key, value, prompt_ids, weights, joint, scale, order, lengths);
  Tensor out = uninitialized(query, query.sizes());
  if (query.numel() == 0) return out;
  with_device_element(query, [&](auto element) {
    using T = decltype(element);
    forward(call.attention<T>(out), query, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> regional_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                               Tensor prompt_ids, Tensor weights, bool joint,
                                                               double scale, OptionalTensor order,
                                                               OptionalTensor lengths) {
  constexpr int64_t QUERIES_OF_SPLIT = 2048, MOST_SPLITS = 32, THREADS = 256;
  const Stream stream(query);
  grad = packed(grad);
  const AttentionCall call(query, key, value, prompt_ids, weights, joint, scale, order, lengths);
  const int64_t images = query.size(0), queries = query.size(1), heads = query.size(2), slots = prompt_ids.size(1);
  const int64_t prompts = key.size(0), tokens = key.size(1), bank = key.numel();
  const int64_t splits = std::min(MOST_SPLITS, (images * queries + QUERIES_OF_SPLIT - 1) / QUERIES_OF_SPLIT);
  Tensor grad_query = torch::stable::new_zeros(query, query.sizes());
  Tensor grad_key = torch::stable::new_zeros(key, key.sizes());
  Tensor grad_value = torch::stable::new_zeros(value, value.sizes());
  if (query.numel() == 0 || bank == 0) return {grad_query, grad_key, grad_value};
  Tensor statistics = uninitialized(query, {images, slots, heads, queries, 3}, ScalarType::Float);
  Tensor partial =
      uninitialized(query, {splits, 2, prompts, tokens, heads, query.size(3)}, ScalarType::Float);
  with_device_element(query, [&](auto element) {
    using T = decltype(element);
    const auto attention = call.attention<T>(grad_query);
    const Backward<T> backward{data<T>(grad), mutable_data<RowStatistics>(statistics), mutable_data<float>(partial),
                               static_cast<int>(images), static_cast<int>(splits)};
    const int shared = fma_shared(2 * FMA_ROWS, attention.depth) + ActiveRows<FMA_ROWS>::size(attention.slots);
    const int64_t bank_blocks = prompts * heads * ((tokens + FMA_TOKENS - 1) / FMA_TOKENS) * splits;
    check(launch(grad_query_kernel<T>, tiles_of(query, FMA_ROWS), FMA_THREADS, shared, stream, attention, backward));
    check(launch(grad_key_value_kernel<T>, bank_blocks, BANK_THREADS, bank_shared(attention.depth), stream, attention,
                 backward));
    check(launch(sum_splits_kernel<T>, (2 * bank + THREADS - 1) / THREADS, THREADS, 0, stream,
                 data<float>(partial), mutable_data<T>(grad_key), mutable_data<T>(grad_value), bank, splits));
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace instantas
