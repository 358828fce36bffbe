// ---------------------------------------------------------------- products of matrices, a register tile at a time

enum class Into { store, add, add_weighted };

inline vector& at(real* memory) { return *reinterpret_cast<vector*>(memory); }
inline const vector& at(const real* memory) { return *reinterpret_cast<const vector*>(memory); }
inline lanes& at(lane_integer* memory) { return *reinterpret_cast<lanes*>(memory); }
inline const lanes& at(const lane_integer* memory) { return *reinterpret_cast<const lanes*>(memory); }

// a(i, k) = data[i * row + k * step]: rows by steps, or its transpose.
template <typename Entry>
struct Factors {
  const Entry* data;
  long row, step;

  Factors from(long i, long k) const { return {data + i * row + k * step, row, step}; }
};
using Factor = Factors<real>;

// Keeps a vector in a register: compilers would read one that serves several rows from memory again for each of them,
// and a core does as many loads in a cycle as multiply-adds.
template <typename Vector>
inline void keep([[maybe_unused]] Vector& x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
}

inline void add_product(vector& sum, real factor, const vector& column) { sum += factor * column; }

#if FASTGRAD_VARIANT == 2 && defined(__AVX512BF16__)
#define FASTGRAD_COUPLES
// Two steps of a product, the even one in the low half, rounded to bfloat16: one operation multiplies both and sums them
// in float32.
using couple = std::int32_t;

inline void add_product(vector& sum, couple factor, const lanes& column) {
  sum = (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(factor), (__m512bh)(__m512i)column);
}
#endif

// A number as products take it, so that everything made of it is made of the same.
inline vector as_factor(vector x) {
#ifdef FASTGRAD_COUPLES
  if constexpr (ROUNDED) return (vector)_mm512_cvtpbh_ps(_mm512_cvtneps_pbh((__m512)x));
#endif
  return x;
}

// c(i, :) (+)= [weight(i)] sum over k < depth of a(i, k) b(k, :), for ROWS rows and VECTORS vectors of columns.
template <int ROWS, int VECTORS, Into INTO, typename Entry>
inline void tile(long depth, Factors<Entry> a, const Entry* b, long b_row, real* c, long c_row, const real* weight) {
  vector sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = vector{};
#pragma GCC unroll 4
  for (long k = 0; k < depth; ++k) {
    std::decay_t<decltype(at(b))> column[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      column[j] = at(b + k * b_row + j * LANES);
      keep(column[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Entry factor = a.data[i * a.row + k * a.step];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) add_product(sum[i][j], factor, column[j]);
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
template <int ROWS, int WIDTH, Into INTO, int START = 0, typename Entry>
inline void row_of_tiles(long depth, Factors<Entry> a, const Entry* b, real* c, const real* weight, long from) {
  constexpr int LEFT = (WIDTH - START) / LANES, MOST = most_vectors(ROWS), PANELS = (LEFT + MOST - 1) / MOST;
  if constexpr (LEFT > 0) {
    constexpr int VECTORS = (LEFT + PANELS - 1) / PANELS, END = START + VECTORS * LANES;
    if (from < END) tile<ROWS, VECTORS, INTO>(depth, a, b + START, WIDTH, c + START, WIDTH, weight);
    row_of_tiles<ROWS, WIDTH, INTO, END>(depth, a, b, c, weight, from);
  }
}

// What is wanted of some rows of a product: the steps [from, to), and the columns from `column` on.
struct Span {
  long from, to, column = 0;
};

#ifdef FASTGRAD_COUPLES

constexpr long STEPS_AT_ONCE = 128, COUPLES = STEPS_AT_ONCE / 2;  // of a product: they stay in a near cache

// to (COUPLES, WIDTH) from the rows [0, depth) of (depth, WIDTH), two by two; a row of zeros follows an odd one.
template <int WIDTH>
inline void couple_rows(long depth, const real* from, couple* to) {
  alignas(64) static constexpr std::int16_t TURNS[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i turns = _mm512_load_si512(TURNS);
  for (long k = 0; k < depth; k += 2, from += 2 * WIDTH, to += WIDTH)
    for (int c = 0; c < WIDTH; c += LANES) {
      const vector low = at(from + c), high = k + 1 < depth ? at(from + WIDTH + c) : vector{};
      const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      at(to + c) = (lanes)_mm512_permutexvar_epi16(turns, halves);
    }
}

// to (COUPLES) from `depth` numbers in a row; zeros follow.
inline void couple_row(long depth, const real* from, couple* to) {
  const auto some = [&](long k) {
    const long left = std::clamp(depth - k, 0L, static_cast<long>(LANES));
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), from + k);
  };
  for (long k = 0; k < depth; k += 2 * LANES)
    at(to + k / 2) = (lanes)(__m512i)_mm512_cvtne2ps_pbh(some(k + LANES), some(k));
}

// `product` by couples; each span begins at an even step, and ends at one or with the last.
template <int ROWS, int WIDTH, Into INTO, typename Spans>
inline void product_of_couples(long rows, long depth, Factor a, const real* b, real* c, const real* weight, Spans span) {
  alignas(64) couple right[COUPLES * WIDTH], left[COUPLES * std::max(CHUNK, ROWS)];
  for (long start = 0; start < std::max(depth, 1L); start += STEPS_AT_ONCE) {
    const long stop = std::min(start + STEPS_AT_ONCE, depth);
    couple_rows<WIDTH>(stop - start, b + start * WIDTH, right);
    if (a.row == 1) couple_rows<CHUNK>(stop - start, a.data + start * CHUNK, left);
    for (long i = 0; i < rows; i += ROWS) {
      const Span s = span(i);
      const long from = std::max(s.from, start), to = std::min(s.to, stop), steps = (to - from + 1) / 2;
      const long skipped = (from - start) / 2;
      Factors<couple> some{left + skipped * CHUNK + i, 1, CHUNK};
      if (a.row != 1) {
        for (int r = 0; r < ROWS; ++r) couple_row(to - from, a.from(i + r, from).data, left + r * COUPLES);
        some = {left, COUPLES, 1};
      }
      const auto add = [&](auto into) {
        row_of_tiles<ROWS, WIDTH, into.value>(steps, some, right + skipped * WIDTH, c + i * WIDTH,
                                              weight ? weight + i : nullptr, s.column);
      };
      if (from == s.from)
        add(std::integral_constant<Into, INTO>{});
      else if (from < to)
        add(std::integral_constant<Into, INTO == Into::store ? Into::add : INTO>{});
    }
  }
}

#endif

// c (rows, WIDTH) (+)= a (rows, depth) b (depth, WIDTH), of which span(i) says what the rows from i on need; rows are
// handled ROWS at a time, and a and c have room for that.
template <int ROWS, int WIDTH, Into INTO, typename Spans>
inline void product(long rows, [[maybe_unused]] long depth, Factor a, const real* b, real* c, const real* weight,
                    Spans span) {
#ifdef FASTGRAD_COUPLES
  if constexpr (ROUNDED) return product_of_couples<ROWS, WIDTH, INTO>(rows, depth, a, b, c, weight, span);
#endif
  for (long i = 0; i < rows; i += ROWS) {
    const Span s = span(i);
    row_of_tiles<ROWS, WIDTH, INTO>(s.to - s.from, a.from(i, s.from), b + s.from * WIDTH, c + i * WIDTH,
                                    weight ? weight + i : nullptr, s.column);
  }
}

template <int ROWS, int WIDTH, Into INTO>
__attribute__((noinline)) void product(long rows, long depth, Factor a, const real* b, real* c,
                                       const real* weight = nullptr) {
  product<ROWS, WIDTH, INTO>(rows, depth, a, b, c, weight, [&](long) { return Span{0, depth}; });
}

// ---------------------------------------------------------------- sums of lanes, and squares of four numbers

typedef real four __attribute__((vector_size(4 * sizeof(real)), aligned(sizeof(real)), may_alias));

inline four& four_at(real* memory) { return *reinterpret_cast<four*>(memory); }
inline const four& four_at(const real* memory) { return *reinterpret_cast<const four*>(memory); }

// The transpose of four rows of four numbers.
struct Square {
  four rows[4];

  Square(four a, four b, four c, four d) {
    const four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const four AB = __builtin_shufflevector(a, b, 2, 6, 3, 7), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    rows[0] = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    rows[1] = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    rows[2] = __builtin_shufflevector(AB, CD, 0, 1, 4, 5);
    rows[3] = __builtin_shufflevector(AB, CD, 2, 3, 6, 7);
  }

  // Of rows that are `stride` apart.
  Square(const real* corner, long stride)
      : Square(four_at(corner), four_at(corner + stride), four_at(corner + 2 * stride), four_at(corner + 3 * stride)) {}
};

template <int BYTES>
struct Narrow {
  typedef real type __attribute__((vector_size(BYTES)));
};

// The sums of every COUNT-th lane, by halves.
template <int COUNT, int BYTES = VECTOR_BYTES>
inline typename Narrow<COUNT * sizeof(real)>::type totals(typename Narrow<BYTES>::type v) {
  if constexpr (BYTES == COUNT * sizeof(real)) {
    return v;
  } else {
    typename Narrow<BYTES / 2>::type low, high;
    std::memcpy(&low, &v, BYTES / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + BYTES / 2, BYTES / 2);
    return totals<COUNT, BYTES / 2>(low + high);
  }
}

// The sum of all lanes.
inline real total(vector v) {
  const auto pair = totals<2>(v);
  return pair[0] + pair[1];
}
