// Registration of the host's operations; their schemas are those of instantas/ops/schemas.py.
#include "host.h"

STABLE_TORCH_LIBRARY_IMPL(instantas_cpp, CPU, library) {
  library.impl("gather_windows", TORCH_BOX(&instantas::gather_windows));
  library.impl("scatter_windows", TORCH_BOX(&instantas::scatter_windows));
  library.impl("guided_step", TORCH_BOX(&instantas::guided_step));
  library.impl("regional_attention", TORCH_BOX(&instantas::regional_attention));
}
