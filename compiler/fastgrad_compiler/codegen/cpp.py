# ruff: noqa: E501
"""Stand-in until the real emitter is merged: attention by its definition, O(n^2), as C++."""

from __future__ import annotations

from fastgrad_compiler.codegen.kernel import KernelSpec

_BODY = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <optional>
#include <vector>

#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define STRING_(x) #x
#define STRING(x) STRING_(x)

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

#if FASTGRAD_VARIANT == 1
using Real = double;
#else
using Real = float;
#endif
#if FASTGRAD_VARIANT == 2
struct Stored {
  uint16_t bits;
  operator float() const {
    union { uint32_t i; float f; } x{uint32_t(bits) << 16};
    return x.f;
  }
  static Stored of(float value) {
    union { float f; uint32_t i; } x{value};
    return {uint16_t((x.i + 0x7fff + ((x.i >> 16) & 1)) >> 16)};
  }
};
Stored stored(Real x) { return Stored::of(x); }
#else
using Stored = Real;
Stored stored(Real x) { return x; }
#endif

struct Rows {
  Stored* data;
  int64_t strides[3];
  explicit Rows(const Tensor& t) : data(static_cast<Stored*>(t.data_ptr())) {
    for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
  }
  Stored* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * strides[0] + h * strides[1] + i * strides[2];
  }
};

Real dot(const Stored* a, const Stored* b, int n) {
  Real sum = 0;
  for (int c = 0; c < n; ++c) sum += Real(a[c]) * Real(b[c]);
  return sum;
}

Real polynomial(Real s, int derivative) {
  Real value = 0;
  for (int j = DEGREE; j >= derivative; --j) value = value * s + (derivative ? j : 1) * Real(COEFFICIENTS[j]);
  return value;
}

bool is_near(int64_t i, int64_t j) { return NEAR > 0 && std::llabs(i / std::max<int64_t>(NEAR, 1) - j / std::max<int64_t>(NEAR, 1)) <= 1; }

void forward(const Tensor q, const Tensor k, const Tensor v, const Optional near_q, const Optional near_k,
             const Optional mask, const Optional documents, Tensor out, Tensor denominator, Tensor maximum,
             int64_t threads) {
  const int64_t B = q.size(0), H = q.size(1), n = q.size(2), Hk = k.size(1), m = k.size(2), G = H / Hk;
  const Rows Q(q), K(k), V(v), O(out), NQ(near_q ? *near_q : q), NK(near_k ? *near_k : k);
  const bool* seen = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
  Real* D = static_cast<Real*>(denominator.data_ptr());
  Real* M = NEAR ? static_cast<Real*>(maximum.data_ptr()) : nullptr;
#pragma omp parallel for num_threads(threads) collapse(2)
  for (int64_t bh = 0; bh < B * H; ++bh)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t b = bh / H, h = bh % H;
      Real top = -std::numeric_limits<Real>::infinity(), total = 0;
      std::vector<Real> sum(DV, Real(0));
      bool far = false;
      const int64_t last = CAUSAL ? i + 1 : m;
      auto local = [&](int64_t j) {
        return NEAR_D ? dot(NQ.at(b, h, i), NK.at(b, h / G, j), NEAR_D) : Real(SCALE) * dot(Q.at(b, h, i), K.at(b, h / G, j), WIDTH);
      };
      for (int64_t j = 0; j < last; ++j) {
        if (seen && !seen[b * m + j]) continue;
        if (is_near(i, j)) top = std::max(top, local(j)); else far = true;
      }
      if (far) top = std::max(top, Real(0));
      if (!std::isfinite(top)) top = 0;
      const Real decay = std::exp(-std::max(top, Real(0)));
      for (int64_t j = 0; j < last; ++j) {
        if (seen && !seen[b * m + j]) continue;
        const Real w = is_near(i, j) ? std::exp(local(j) - top) : (NEAR ? decay : Real(1)) * polynomial(dot(Q.at(b, h, i), K.at(b, h / G, j), WIDTH), 0);
        total += w;
        for (int c = 0; c < DV; ++c) sum[c] += w * Real(V.at(b, h / G, j)[c]);
      }
      D[bh * n + i] = total;
      if (M) M[bh * n + i] = top;
      for (int c = 0; c < DV; ++c) O.at(b, h, i)[c] = stored(total == 0 ? Real(0) : sum[c] / total);
    }
}

void backward(const Tensor gradient, const Tensor q, const Tensor k, const Tensor v, const Optional near_q,
              const Optional near_k, const Optional mask, const Optional documents, const Tensor out,
              const Tensor denominator, const Tensor maximum, Tensor dq, Tensor dk, Tensor dv, Optional dnear_q,
              Optional dnear_k, int64_t threads) {
  const int64_t B = q.size(0), H = q.size(1), n = q.size(2), Hk = k.size(1), m = k.size(2), G = H / Hk;
  const Rows Q(q), K(k), V(v), O(out), DO(gradient), NQ(near_q ? *near_q : q), NK(near_k ? *near_k : k);
  const bool* seen = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
  const Real* D = static_cast<const Real*>(denominator.data_ptr());
  const Real* M = NEAR ? static_cast<const Real*>(maximum.data_ptr()) : nullptr;
  Real *gq = static_cast<Real*>(dq.data_ptr()), *gk = static_cast<Real*>(dk.data_ptr()), *gv = static_cast<Real*>(dv.data_ptr());
  Real* gnq = dnear_q ? static_cast<Real*>(dnear_q->data_ptr()) : nullptr;
  Real* gnk = dnear_k ? static_cast<Real*>(dnear_k->data_ptr()) : nullptr;
  std::fill_n(gq, dq.numel(), Real(0));
  std::fill_n(gk, dk.numel(), Real(0));
  std::fill_n(gv, dv.numel(), Real(0));
  if (gnq) std::fill_n(gnq, dnear_q->numel(), Real(0));
  if (gnk) std::fill_n(gnk, dnear_k->numel(), Real(0));
#pragma omp parallel for num_threads(threads)
  for (int64_t bk = 0; bk < B * Hk; ++bk)
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t b = bk / Hk, hk = bk % Hk, h = hk * G + g, row = (b * H + h) * n + i;
        const Real inverse = D[row] == 0 ? Real(0) : 1 / D[row];
        const Real delta = dot(DO.at(b, h, i), O.at(b, h, i), DV) * inverse;
        const Real top = M ? M[row] : Real(0), decay = std::exp(-std::max(top, Real(0)));
        for (int64_t j = 0; j < (CAUSAL ? i + 1 : m); ++j) {
          if (seen && !seen[b * m + j]) continue;
          const int64_t column = bk * m + j;
          const bool near = is_near(i, j);
          const Real s = dot(Q.at(b, h, i), K.at(b, hk, j), WIDTH);
          const Real t = NEAR_D ? dot(NQ.at(b, h, i), NK.at(b, hk, j), NEAR_D) : Real(SCALE) * s;
          const Real w = near ? std::exp(t - top) : (NEAR ? decay : Real(1)) * polynomial(s, 0);
          const Real dw = dot(DO.at(b, h, i), V.at(b, hk, j), DV) * inverse - delta;
          for (int c = 0; c < DV; ++c) gv[column * DV + c] += w * inverse * Real(DO.at(b, h, i)[c]);
          if (near && NEAR_D) {
            for (int c = 0; c < NEAR_D; ++c) {
              gnq[row * NEAR_D + c] += dw * w * Real(NK.at(b, hk, j)[c]);
              gnk[column * NEAR_D + c] += dw * w * Real(NQ.at(b, h, i)[c]);
            }
            continue;
          }
          const Real ds = dw * (near ? Real(SCALE) * w : (NEAR ? decay : Real(1)) * polynomial(s, 1));
          for (int c = 0; c < WIDTH; ++c) {
            gq[row * WIDTH + c] += ds * Real(K.at(b, hk, j)[c]);
            gk[column * WIDTH + c] += ds * Real(Q.at(b, h, i)[c]);
          }
        }
      }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgrad, library) {
  library.def(STRING(FASTGRAD_KERNEL) "_forward(Tensor q, Tensor k, Tensor v, Tensor? near_q, Tensor? near_k, "
              "Tensor? mask, Tensor? documents, Tensor(a!) out, Tensor(b!) denominator, Tensor(c!) maximum, "
              "int threads) -> ()");
  library.def(STRING(FASTGRAD_KERNEL) "_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor? near_q, "
              "Tensor? near_k, Tensor? mask, Tensor? documents, Tensor out, Tensor denominator, Tensor maximum, "
              "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dnear_q, Tensor(e!)? dnear_k, int threads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastgrad, CPU, library) {
  library.impl(STRING(FASTGRAD_KERNEL) "_forward", TORCH_BOX(&forward));
  library.impl(STRING(FASTGRAD_KERNEL) "_backward", TORCH_BOX(&backward));
}
"""


def emit_cpp(spec: KernelSpec) -> str:
    """The C++ source of a kernel."""
    folded = [c * spec.scale**power for power, c in enumerate(spec.coefficients)]
    constants = {
        "WIDTH": spec.d,
        "DV": spec.dv,
        "DEGREE": spec.degree,
        "NEAR": spec.near or 0,
        "NEAR_D": spec.near_d or 0,
    }
    lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    lines.append(f"constexpr bool CAUSAL = {str(spec.causal).lower()};")
    lines.append(
        f"constexpr double SCALE = {spec.scale!r}, COEFFICIENTS[] = {{{', '.join(map(repr, folded))}}};"
    )
    return "\n".join(["// A stand-in.", *lines, _BODY])
