// ---------------------------------------------------------------- exponentials, and the decay of weights by gates

constexpr real LEAST = sizeof(real) == 8 ? -708 : -87;  // the exponential of less is 0

// e^x for x <= 0, to rounding: 2^k e^r with |r| <= ln(2) / 2 and a Taylor polynomial of e^r.
inline vector exponential(vector x) {
  constexpr bool DOUBLE = sizeof(real) == 8;
  constexpr int TERMS = DOUBLE ? 13 : 7, FRACTION = DOUBLE ? 52 : 23, BIAS = DOUBLE ? 1023 : 127;
  constexpr real HIGH = DOUBLE ? 0x1.62e42feep-1 : 0x1.62e4p-1;
  constexpr real LOW = DOUBLE ? 1.90821492927058770002e-10 : 1.42860677e-6, SHIFT = DOUBLE ? 0x1.8p52 : 0x1.8p23;
  const lanes vanishes = x < LEAST;
  x = vanishes ? vector{} : x;
  const vector k = (x * real(1.44269504088896340736) + SHIFT) - SHIFT;
  const vector r = (x - k * HIGH) - k * LOW;
  vector sum = vector{} + real(1) / TERMS;
#pragma GCC unroll 16
  for (int term = TERMS - 1; term >= 1; --term) sum = (sum * r + real(1)) * (real(1) / term);
  sum = sum * r + real(1);  // 1 + r (1 + r/2 (1 + r/3 ...))
  const lanes power = (__builtin_convertvector(k, lanes) + BIAS) << FRACTION;
  vector scale;
  std::memcpy(&scale, &power, sizeof scale);
  return vanishes ? vector{} : sum * scale;
}

// FORGET: the weight of a pair is times e^(G_i - G_j), where the sums G of log_decay do not rise within a document, and
// begin anew with each. An exponent is a difference of float64, of a later token less an earlier one of its document.

// G of the last token before `edge`. Before the first token there is nothing to decay, and it stands for itself.
inline double sum_before(const Problem& p, long b, long h, long edge) {
  return p.sums(b, h)[std::min(std::max(edge - 1, 0L), p.keys - 1)];
}

// The decay of a state of the keys before the edge `from`, or of what is added to them, when it moves between two edges.
inline real decay_between(const Problem& p, long b, long h, long from, long to) {
  const double exponent = sum_before(p, b, h, to) - sum_before(p, b, h, from);
  return exponent < LEAST ? 0 : exponent > 0 ? 1 : static_cast<real>(std::exp(exponent));
}

// Numbers of float64, one for each token of a chunk, as high + low: their differences are as exact as in float64.
struct Exponents {
  real *high, *low;  // (CHUNK)

  static constexpr long EACH = FORGET ? round_up(CHUNK, 32) : 0, SIZE = 2 * EACH;

  explicit Exponents(Arena& memory) : high(memory.take(EACH)), low(memory.take(EACH)) {}

  // Those beyond `count` are as the last.
  template <typename Exponent>
  void load(int count, Exponent exponent) const {
    for (int t = 0; t < CHUNK; ++t) {
      const double value = exponent(std::min(t, count - 1));
      high[t] = static_cast<real>(value);
      low[t] = static_cast<real>(value - high[t]);
    }
  }

  void exponentiate(real* to) const {
    for (int t = 0; t < CHUNK; t += LANES) at(to + t) = exponential(at(high + t)) * (real(1) + at(low + t));
  }
};

// What gates do to the queries of a chunk, and to the keys that they meet one by one.
struct Decay {
  Exponents queries, keys;     // G
  real *factors, *inverses;    // (CHUNK): of queries since the window began, or the document if later; and 1 over them
  real *of_queries, *of_keys;  // (CHUNK): gradients of G, see `weigh_again`
  bool mild[CHUNK / LANES];    // whether the factors of these queries all are MILD or more

  // From here on a query's factor times a key's inverse is as good as the exponential of a difference.
  static constexpr real MILD = sizeof(real) == 8 ? 1e-200 : 1e-25;
  static constexpr long EACH = Exponents::EACH, SIZE = 2 * Exponents::SIZE + 4 * EACH;

  explicit Decay(Arena& memory)
      : queries(memory), keys(memory), factors(memory.take(EACH)), inverses(memory.take(EACH)),
        of_queries(memory.take(EACH)), of_keys(memory.take(EACH)) {}

  void load_queries(const Problem& p, long b, long h, long first, int count) {
    const double* sums = p.sums(b, h);
    const std::int64_t* ids = DOCUMENTS ? p.documents + b * p.keys : nullptr;
    double origin = sum_before(p, b, h, window_low(first, p.keys));
    queries.load(count, [&](int t) {
      const long token = first + t;
      if (DOCUMENTS && token > 0 && ids[token] != ids[token - 1]) origin = sums[token];
      return sums[token] - origin;
    });
    queries.exponentiate(factors);
    std::fill(factors + count, factors + CHUNK, real(0));  // none meets the infinite inverse of another document's key
    for (int t = 0; t < CHUNK; t += LANES) {
      at(inverses + t) = real(1) / at(factors + t);
      mild[t / LANES] = *std::min_element(factors + t, factors + t + LANES) >= MILD;
    }
    queries.load(count, [&](int t) { return sums[first + t]; });
  }

  void load_keys(const Problem& p, long b, long h, long start, int count) const {
    keys.load(count, [&, sums = p.sums(b, h)](int t) { return sums[start + t]; });
  }

  // G_i - G_j of key j and LANES queries from i on; 0 where that would be more.
  vector exponent(int j, int i) const {
    const vector difference = (at(queries.high + i) - keys.high[j]) + (at(queries.low + i) - keys.low[j]);
    return difference > 0 ? vector{} : difference;
  }

  // e^(G_i - G_j); anything for a pair that is hidden. How it is found depends on what the query sees alone.
  vector factor(int j, int i) const {
    if constexpr (!FUSED) return exponential(exponent(j, i));
    const vector product = at(factors + i) * inverses[j];
    if (mild[i / LANES]) return product;
    return at(factors + i) >= MILD ? product : exponential(exponent(j, i));
  }
};
