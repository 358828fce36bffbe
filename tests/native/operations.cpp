// The operations of a kernel, as `native_attention.py` calls them, with next to nothing in them: quick to compile.

#include <cstdint>
#include <optional>

#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define STRING_(x) #x
#define STRING(x) STRING_(x)

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Fills out, which is float32, with the number of threads that took part.
void forward(const Tensor, const Tensor, const Tensor, const Optional, const Optional, const Optional, const Optional,
             const Optional, Tensor out, Tensor, Tensor, int64_t threads) {
  auto* data = static_cast<float*>(out.data_ptr());
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < out.numel(); ++i) data[i] = static_cast<float>(omp_get_num_threads());
}

void backward(const Tensor, const Tensor, const Tensor, const Tensor, const Optional, const Optional, const Optional,
              const Optional, const Optional, const Tensor, const Tensor, const Tensor, Tensor, Tensor, Tensor,
              Optional, Optional, Optional, int64_t) {}

}  // namespace

#define INPUTS \
  "Tensor q, Tensor k, Tensor v, Tensor? near_q, Tensor? near_k, Tensor? log_decay, Tensor? mask, " \
  "Tensor? documents, "

STABLE_TORCH_LIBRARY_FRAGMENT(fastgrad, library) {
  library.def(STRING(FASTGRAD_KERNEL) "_forward(" INPUTS
              "Tensor(a!) out, Tensor(b!) denominator, Tensor(c!) maximum, int threads) -> ()");
  library.def(STRING(FASTGRAD_KERNEL) "_backward(Tensor gradient, " INPUTS
              "Tensor out, Tensor denominator, Tensor maximum, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
              "Tensor(d!)? dnear_q, Tensor(e!)? dnear_k, Tensor(f!)? dlog_decay, int threads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgrad, CPU, library) {
  library.impl(STRING(FASTGRAD_KERNEL) "_forward", TORCH_BOX(&forward));
  library.impl(STRING(FASTGRAD_KERNEL) "_backward", TORCH_BOX(&backward));
}
