// The device's operations for tensors on the CPU.
#include "attention.cuh"
#include "device.cuh"
#include "divisor.cuh"
#include "host.h"

namespace {

void set_order(int64_t seed) { instantas::emulation::seed = static_cast<unsigned>(seed); }

int64_t copied() { return instantas::emulation::copied; }

// Queries of a tile of the attention kernel in half precision.
int64_t attention_rows(int64_t depth) {
  return depth <= 64 ? instantas::MmaShape<64>::ROWS : instantas::MmaShape<256>::ROWS;
}

int64_t quotient(int64_t dividend, int64_t divisor) {
  return instantas::Divisor(divisor).quotient(static_cast<int>(dividend));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(instantas_cuda, CPU, library) {
  library.impl("gather_windows", TORCH_BOX(&instantas::gather_windows));
  library.impl("scatter_windows", TORCH_BOX(&instantas::scatter_windows));
  library.impl("guided_step", TORCH_BOX(&instantas::guided_step));
  library.impl("regional_attention", TORCH_BOX(&instantas::regional_attention));
  library.impl("regional_attention_backward", TORCH_BOX(&instantas::regional_attention_backward));
}

STABLE_TORCH_LIBRARY(instantas_emulation, library) {
  library.def("set_order(int seed) -> ()");
  library.def("copied() -> int");
  library.def("attention_rows(int depth) -> int");
  library.def("quotient(int dividend, int divisor) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(instantas_emulation, CompositeExplicitAutograd, library) {
  library.impl("set_order", TORCH_BOX(&set_order));
  library.impl("copied", TORCH_BOX(&copied));
  library.impl("attention_rows", TORCH_BOX(&attention_rows));
  library.impl("quotient", TORCH_BOX(&quotient));
}
