#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <omp.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace rows {
namespace {

using torch::stable::Tensor;

constexpr long D = WIDTH_OF_ROWS;  // entries of a row
constexpr long BLOCK = 64;         // rows whose sums are added up before they go into float64

// NUMBERS

inline const input* read(const Tensor& x) { return static_cast<const input*>(x.data_ptr()); }

template <typename Element>
inline Element* write(const Tensor& x) {
  return static_cast<Element*>(x.data_ptr());
}

// Sums over all rows, a part of the rows for each thread: `count` of D entries.
struct Totals {
  long count, rows, parts;
  std::vector<double> sums;  // (parts, count, D)

  Totals(long count, long rows, long threads)
      : count(count), rows(rows), parts(std::max(1L, std::min(rows, threads))), sums(parts * count * D) {}

  template <typename Row>
  void run(long part, Row each) {
    std::vector<real> block(count * D);
    double* const total = sums.data() + part * count * D;
    const long end = rows * (part + 1) / parts;
    for (long first = rows * part / parts; first < end; first += BLOCK) {
      for (long row = first; row < std::min(first + BLOCK, end); ++row) each(row, block.data());
      for (long i = 0; i < count * D; ++i) total[i] += block[i], block[i] = 0;
    }
  }

  double entry(long which, long i) const {
    double total = 0;
    for (long part = 0; part < parts; ++part) total += sums[(part * count + which) * D + i];
    return total;
  }

  void column(long which, real* to) const {
    for (long i = 0; i < D; ++i) to[i] = static_cast<real>(entry(which, i));
  }

  void number(long which, real* to) const {
    double total = 0;
    for (long i = 0; i < D; ++i) total += entry(which, i);
    *to = static_cast<real>(total);
  }
};
