// ---------------------------------------------------------------- products of matrices, a register tile at a time

enum class Into { store, add, add_weighted };

inline vector& at(real* memory) { return *reinterpret_cast<vector*>(memory); }
inline const vector& at(const real* memory) { return *reinterpret_cast<const vector*>(memory); }
inline lanes& at(lane_integer* memory) { return *reinterpret_cast<lanes*>(memory); }
inline const lanes& at(const lane_integer* memory) { return *reinterpret_cast<const lanes*>(memory); }

// a(i, k) = data[i * row + k * step]: rows by steps, or its transpose.
struct Factor {
  const real* data;
  long row, step;
};

// Keeps a vector in a register: compilers would read one that serves several rows from memory again for each of them,
// and a core does as many loads in a cycle as multiply-adds.
inline void keep([[maybe_unused]] vector& x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
}

// c(i, :) (+)= [weight(i)] sum over k < depth of a(i, k) b(k, :), for ROWS rows and VECTORS vectors of columns.
template <int ROWS, int VECTORS, Into INTO>
inline void tile(long depth, Factor a, const real* b, long b_row, real* c, long c_row, const real* weight) {
  vector sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = vector{};
#pragma GCC unroll 4
  for (long k = 0; k < depth; ++k) {
    vector column[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      column[j] = at(b + k * b_row + j * LANES);
      keep(column[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const real factor = a.data[i * a.row + k * a.step];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += factor * column[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      vector& target = at(c + i * c_row + j * LANES);
      if constexpr (INTO == Into::store) target = sum[i][j];
      if constexpr (INTO == Into::add) target += sum[i][j];
      if constexpr (INTO == Into::add_weighted) target += weight[i] * sum[i][j];
    }
}

// How many vectors wide a tile of some rows may be: its sums, a row of b and a factor stay in registers.
constexpr int most_vectors(int rows) { return std::clamp((REGISTERS - 1) / (rows + 1), 1, 4); }

// The columns [from, WIDTH) of ROWS rows, in panels of nearly equal width; columns before `from` may be written too.
template <int ROWS, int WIDTH, Into INTO, int START = 0>
inline void row_of_tiles(long depth, Factor a, const real* b, real* c, const real* weight, int from) {
  constexpr int LEFT = (WIDTH - START) / LANES, MOST = most_vectors(ROWS), PANELS = (LEFT + MOST - 1) / MOST;
  if constexpr (LEFT > 0) {
    constexpr int VECTORS = (LEFT + PANELS - 1) / PANELS, END = START + VECTORS * LANES;
    if (from < END) tile<ROWS, VECTORS, INTO>(depth, a, b + START, WIDTH, c + START, WIDTH, weight);
    row_of_tiles<ROWS, WIDTH, INTO, END>(depth, a, b, c, weight, from);
  }
}

// c (rows, WIDTH) (+)= a (rows, depth) b (depth, WIDTH); rows are handled ROWS at a time, and c has room for that.
template <int ROWS, int WIDTH, Into INTO>
__attribute__((noinline)) void product(long rows, long depth, Factor a, const real* b, real* c,
                                       const real* weight = nullptr) {
  for (long i = 0; i < rows; i += ROWS) {
    const Factor here{a.data + i * a.row, a.row, a.step};
    row_of_tiles<ROWS, WIDTH, INTO>(depth, here, b, c + i * WIDTH, weight ? weight + i : nullptr, 0);
  }
}

template <int BYTES>
struct Narrow {
  typedef real type __attribute__((vector_size(BYTES)));
};

// The sum of all lanes, by halves.
template <int BYTES = VECTOR_BYTES>
inline real total(typename Narrow<BYTES>::type v) {
  typename Narrow<BYTES / 2>::type low, high;
  std::memcpy(&low, &v, BYTES / 2);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + BYTES / 2, BYTES / 2);
  if constexpr (BYTES == 2 * sizeof(real)) {
    return low[0] + high[0];
  } else {
    return total<BYTES / 2>(low + high);
  }
}
