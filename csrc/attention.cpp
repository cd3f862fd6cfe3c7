// Rows of a tensor picked and put back by number: the queries of one region (instantas/ops/cpu.py).
#include "host.h"

namespace instantas {

namespace {

constexpr int64_t GRAIN = 1 << 16;  // bytes that are worth a thread

// copy(i) for every i, each of which moves `size` bytes.
template <class Copy>
void for_each_row(int64_t rows, int64_t size, const Copy& copy) {
  torch::stable::parallel_for(0, rows, GRAIN / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) copy(i);
  });
}

int64_t row_size(const Tensor& tensor) { return tensor.stride(0) * static_cast<int64_t>(tensor.element_size()); }

}  // namespace

Tensor take_rows(Tensor source, Tensor rows) {
  std::vector<int64_t> shape(source.sizes().begin(), source.sizes().end());
  shape[0] = rows.size(0);
  Tensor taken = torch::stable::new_empty(source, shape);
  const int64_t size = row_size(source), *row = data<int64_t>(rows);
  const char* from = data<char>(source);
  char* to = mutable_data<char>(taken);
  for_each_row(shape[0], size, [&](int64_t i) { std::memcpy(to + i * size, from + row[i] * size, size); });
  return taken;
}

void put_rows(Tensor target, Tensor rows, Tensor values) {
  const int64_t size = row_size(target), *row = data<int64_t>(rows);
  const char* from = data<char>(values);
  char* to = mutable_data<char>(target);
  for_each_row(rows.size(0), size, [&](int64_t i) { std::memcpy(to + row[i] * size, from + i * size, size); });
}

}  // namespace instantas
