// ---------------------------------------------------------------- monomials (docs/mathematics.md, section 2)

// Calls step(level, index, source, target, size) for phi[target + k] = x[index] * phi[source + k], k < size, in order.
template <typename Step>
inline void each_block(Step step) {
  long size[D], row = 1 + D;
  std::fill_n(size, D, 1);
  for (int level = 2; level <= DEGREE; ++level) {
    const long start = row;
    long suffix = 0;
    for (int index = D - 1; index >= 0; --index) size[index] = suffix += size[index];
    for (int index = 0; index < D; ++index) {
      step(level, index, start - size[index], row, size[index]);
      row += size[index];
    }
  }
}

struct Block {
  int index;
  long source, target, size;
};

// The blocks, and the diagonal of W: c_|a| times the multinomial coefficient of each monomial a.
struct Table {
  Block blocks[DEGREE > 1 ? D * (DEGREE - 1) : 1];
  int count = 0;
  real weights[FEATURES] = {};

  Table() {
    double* counts = new double[RANK];
    int* leading = new int[RANK];  // the exponent of a monomial's smallest index
    long own[DEGREE + 1][D + 1];   // where the monomials with a smallest index begin in a level
    std::fill_n(counts, RANK, 1.0);
    std::fill_n(leading, RANK, 1);
    for (int index = 0; index <= D; ++index) own[1][index] = 1 + index;
    for (int row = 0; row < 1 + D; ++row) weights[row] = static_cast<real>(COEFFICIENTS[row > 0]);
    each_block([&](int level, int index, long source, long target, long size) {
      blocks[count++] = {index, source, target, size};
      own[level][index] = target;
      own[level][index + 1] = target + size;
      const long other = own[level - 1][index + 1];  // from here on a source row does not start with `index`
      for (long k = 0; k < size; ++k) {
        leading[target + k] = source + k < other ? leading[source + k] + 1 : 1;
        counts[target + k] = counts[source + k] * level / leading[target + k];
        weights[target + k] = static_cast<real>(COEFFICIENTS[level] * counts[target + k]);
      }
    });
    delete[] counts;
    delete[] leading;
  }
};

const Table TABLE;

// phi (FEATURES, CHUNK) of tokens whose x already is in rows 1 to D.
inline void features(real* phi) {
  for (int t = 0; t < CHUNK; ++t) phi[t] = 1;
  for (int b = 0; b < TABLE.count; ++b) {
    const Block& block = TABLE.blocks[b];
    const real* x = phi + (1 + block.index) * CHUNK;
    const real* source = phi + block.source * CHUNK;
    real* target = phi + block.target * CHUNK;
    vector factor[CHUNK / LANES];
    for (int t = 0; t < CHUNK; t += LANES) factor[t / LANES] = at(x + t);
    for (long k = 0; k < block.size; ++k, source += CHUNK, target += CHUNK)
#pragma GCC unroll 8
      for (int t = 0; t < CHUNK; t += LANES) at(target + t) = factor[t / LANES] * at(source + t);
  }
}

// The gradient dx (D, CHUNK) += J_phi^T upstream: the blocks walked backwards. Overwrites upstream (FEATURES, CHUNK).
inline void pull(const real* phi, real* upstream, real* dx) {
  for (int b = TABLE.count - 1; b >= 0; --b) {
    const Block& block = TABLE.blocks[b];
    const real* x = phi + (1 + block.index) * CHUNK;
    const real* source = phi + block.source * CHUNK;
    const real* above = upstream + block.target * CHUNK;
    real* below = upstream + block.source * CHUNK;
    vector factor[CHUNK / LANES], sum[CHUNK / LANES];
    for (int t = 0; t < CHUNK; t += LANES) {
      factor[t / LANES] = at(x + t);
      sum[t / LANES] = at(dx + block.index * CHUNK + t);
    }
    for (long k = 0; k < block.size; ++k, source += CHUNK, above += CHUNK, below += CHUNK)
#pragma GCC unroll 8
      for (int t = 0; t < CHUNK; t += LANES) {
        sum[t / LANES] += at(above + t) * at(source + t);
        at(below + t) += factor[t / LANES] * at(above + t);
      }
    for (int t = 0; t < CHUNK; t += LANES) at(dx + block.index * CHUNK + t) = sum[t / LANES];
  }
  for (int t = 0; t < D * CHUNK; t += LANES) at(dx + t) += at(upstream + CHUNK + t);
}

// ---------------------------------------------------------------- running states

// W Z, Z = sum of phi(x_j) values_j^T, with the last column of values, `extra`, apart; it is summed with compensation,
// because the denominators of a million tokens come from it.
struct State {
  real *values, *extra, *lost;  // (FEATURES, VALUES), (FEATURES), (FEATURES)

  static constexpr long EXTRA = round_up(FEATURES, LANES), SIZE = FEATURES * VALUES + 2 * EXTRA;

  explicit State(real* memory)
      : values(memory), extra(memory + FEATURES * VALUES), lost(extra + EXTRA) {}

  void clear() { std::memset(values, 0, SIZE * sizeof(real)); }

  // += W phi [values, extra] over `count` tokens; phi (FEATURES, CHUNK), values (CHUNK, VALUES), extra (CHUNK).
  void absorb(const real* phi, const real* rows, const real* column, int count) {
    product<FEATURE_ROWS, VALUES, Into::add_weighted>(FEATURES, count, {phi, CHUNK, 1}, rows, values, TABLE.weights);
    vector factor[CHUNK / LANES];
    for (int t = 0; t < CHUNK; t += LANES) factor[t / LANES] = at(column + t);
    const auto sum_of = [&](long f) {
      vector sum{};
#pragma GCC unroll 8
      for (int t = 0; t < CHUNK; t += LANES) sum += factor[t / LANES] * at(phi + f * CHUNK + t);
      return sum;
    };
    long f = 0;
    if constexpr (LANES >= 4)
      for (; f + 4 <= RANK; f += 4) {
        const auto quarters = [&](int k) { return totals<4>(sum_of(f + k)); };
        const Square sums(quarters(0), quarters(1), quarters(2), quarters(3));
        const four sum = (sums.rows[0] + sums.rows[2]) + (sums.rows[1] + sums.rows[3]);
        add(four_at(extra + f), four_at(lost + f), four_at(TABLE.weights + f) * sum);
      }
    for (; f < RANK; ++f) add(extra[f], lost[f], TABLE.weights[f] * total(sum_of(f)));
  }

  // sum += value, less what former sums were off by.
  template <typename Number>
  static void add(Number& sum, Number& lost, Number value) {
    const Number corrected = value - lost, longer = sum + corrected;
    lost = (longer - sum) - corrected;
    sum = longer;
  }

  // += another, times a factor (FORGET); 0 makes that void, whatever is in it
  void add(const State& other, real factor = 1) {
    if (FORGET && factor == 0) return;
    if constexpr (!FORGET) factor = 1;
    for (long k = 0; k < FEATURES * VALUES; k += LANES) at(values + k) += factor * at(other.values + k);
    for (long f = 0; f < FEATURES; ++f) add(extra[f], lost[f], factor * other.extra[f]);
  }

  // Times a factor; 0 makes it void, whatever is in it.
  void scale(real factor) {
    if (factor == 0) return clear();
    if (factor != 1)
      for (long k = 0; k < SIZE; k += LANES) at(values + k) *= factor;
  }

  // rows (CHUNK, VALUES) += phi^T W Z and column (CHUNK) += phi^T of its extra part.
  void read(const real* phi, real* rows, real* column, int count) const {
    constexpr long DEPTH = 128;  // a part of the state that stays in the first-level cache
    for (long f = 0; f < RANK; f += DEPTH)
      product<TOKEN_ROWS, VALUES, Into::add>(count, std::min<long>(DEPTH, RANK - f), {phi + f * CHUNK, 1, CHUNK},
                                             values + f * VALUES, rows);
    if (column == nullptr) return;
    for (long start = 0; start < RANK; start += DEPTH) {
      vector sum[CHUNK / LANES] = {};
      for (long f = start; f < std::min<long>(start + DEPTH, RANK); ++f)
#pragma GCC unroll 8
        for (int t = 0; t < CHUNK; t += LANES) sum[t / LANES] += extra[f] * at(phi + f * CHUNK + t);
      for (int t = 0; t < CHUNK; t += LANES) at(column + t) += sum[t / LANES];
    }
  }

  // dphi (FEATURES, CHUNK) = W Z [values, extra]^T; transposed (VALUES, CHUNK), column (CHUNK).
  void upstream(const real* transposed, const real* column, real* dphi) const {
    vector factor[CHUNK / LANES];
    for (int t = 0; t < CHUNK; t += LANES) factor[t / LANES] = at(column + t);
    for (long f = 0; f < FEATURES; ++f)
#pragma GCC unroll 8
      for (int t = 0; t < CHUNK; t += LANES) at(dphi + f * CHUNK + t) = extra[f] * factor[t / LANES];
    product<FEATURE_ROWS, CHUNK, Into::add>(FEATURES, DV, {values, VALUES, 1}, transposed, dphi);
  }
};
