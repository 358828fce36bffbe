// Which keys each query of a chunk sees, counted from `base`; queries beyond the chunk see all, to no effect.
struct Reach {
  long base, least_low, most_low, least_high, most_high;
  alignas(VECTOR_BYTES) lane_integer low[CHUNK], high[CHUNK];
  alignas(VECTOR_BYTES) lane_integer near_low[MIXED ? CHUNK : 1], near_high[MIXED ? CHUNK : 1];  // e^t within, p(s) beyond

  Reach(const Problem& p, long b, long first, long last, long from, long to) : base(from) {
    std::fill_n(low, CHUNK, 0);
    std::fill_n(high, CHUNK, static_cast<lane_integer>(to - from));
    const std::int64_t* ids = DOCUMENTS ? p.documents + b * p.keys : nullptr;
    long start = from, stop = to;  // of the document of i
    if constexpr (DOCUMENTS) start = document_start(ids, first, from), stop = document_stop(ids, first, to);
    for (long i = first; i < last; ++i) {
      if constexpr (DOCUMENTS)
        if (i >= stop) start = i, stop = document_stop(ids, i, to);
      long lowest = start, highest = CAUSAL ? std::min(i + 1, stop) : stop;
      if constexpr (WINDOW > 0) {
        lowest = std::max(lowest, i - WINDOW + 1);
        highest = std::min(highest, i + WINDOW);
      }
      low[i - first] = static_cast<lane_integer>(lowest - from);
      high[i - first] = static_cast<lane_integer>(highest - from);
      if constexpr (MIXED) {
        near_low[i - first] = static_cast<lane_integer>((i / NEAR_BLOCK - 1) * NEAR - from);
        near_high[i - first] = static_cast<lane_integer>((i / NEAR_BLOCK + 2) * NEAR - from);
      }
    }
    least_low = most_low = low[0];
    least_high = most_high = high[0];
    for (long t = 1; t < last - first; ++t) {
      least_low = std::min<long>(least_low, low[t]);
      most_low = std::max<long>(most_low, low[t]);
      least_high = std::min<long>(least_high, high[t]);
      most_high = std::max<long>(most_high, high[t]);
    }
  }

  bool none(long start, long stop) const { return stop - base <= least_low || start - base >= most_high; }
  bool all(long start, long stop) const { return start - base >= most_low && stop - base <= least_high; }
  lanes sees(long key, int t) const {
    const lane_integer j = static_cast<lane_integer>(key - base);
    return (at(low + t) <= j) & (at(high + t) > j);
  }
  lanes sees_beyond(long key, int t) const { return at(high + t) > static_cast<lane_integer>(key + 1 - base); }
  lanes near(long key, int t) const {  // MIXED
    const lane_integer j = static_cast<lane_integer>(key - base);
    return (at(near_low + t) <= j) & (at(near_high + t) > j);
  }
};

// The keys [start, stop) of a window, and the products with the queries of a chunk that come from them.
struct Pairs {
  long start = 0, stop = 0, b = -1, h = -1;
  bool diagonal = false;  // the keys are the queries, and see no later ones
  real *k, *kx, *values, *ones;  // (CHUNK, COLUMNS), (D, CHUNK), (CHUNK, VALUES), (CHUNK)
  real *scores, *weights;        // (CHUNK keys, CHUNK queries)
  real *near_k, *near_kx, *local;  // SEPARATE: (CHUNK, NEAR_COLUMNS), (NEAR_D, CHUNK), as scores
  Decay decay;                     // FORGET

  static constexpr long SQUARE = static_cast<long>(CHUNK) * CHUNK;
  static constexpr long LOCAL = SEPARATE ? SQUARE : 0;
  static constexpr long SIZE =
      CHUNK * (COLUMNS + D + VALUES + 1L + NEAR_COLUMNS + NEAR_D) + 2 * SQUARE + LOCAL + 320 + Decay::SIZE;

  explicit Pairs(Arena& memory)
      : k(memory.take(CHUNK * COLUMNS)), kx(memory.take(D * CHUNK)), values(memory.take(CHUNK * VALUES)),
        ones(memory.take(CHUNK)), scores(memory.take(SQUARE)), weights(memory.take(SQUARE)),
        near_k(memory.take(CHUNK * NEAR_COLUMNS)), near_kx(memory.take(NEAR_D * CHUNK)), local(memory.take(LOCAL)),
        decay(memory) {}

  int count() const { return static_cast<int>(stop - start); }

  // x (D, CHUNK) and near_x (NEAR_D, CHUNK): the queries [first, ..) of the chunk.
  void load(const Problem& p, long batch, long head, long from, long to, long first, const real* x, const real* near_x) {
    load_keys(p, batch, head, from, to, 0);
    if constexpr (FORGET) decay.load_keys(p, b, h, start, count());  // a state of other keys may have used its place
    diagonal = CAUSAL && start == first;
    if constexpr (SCORED) by_key(D, {kx, 1, CHUNK}, x, scores);
    if constexpr (SEPARATE) by_key(NEAR_D, {near_kx, 1, CHUNK}, near_x, local);
  }

  // Loads the keys, unless they were the last to be loaded.
  void load_keys(const Problem& p, long batch, long head, long from, long to, long ahead) {
    if (b == batch && h == head && start == from && stop == to) return;
    b = batch, h = head, start = from, stop = to;
    load_values(p, b, p.v.rows(b, h), start, count(), values, ones, ahead);
    if constexpr (SCORED) {
      attention::load<D, COLUMNS>(p.k.rows(b, h), start, count(), k, ahead);
      transpose<D, COLUMNS>(k, kx);
    }
    if constexpr (SEPARATE) {
      attention::load<NEAR_D, NEAR_COLUMNS>(p.near_k.rows(b, h), start, count(), near_k, 0);
      transpose<NEAR_D, NEAR_COLUMNS>(near_k, near_kx);
    }
  }

  // square (keys, queries) = a (keys, depth) b (depth, queries); the part above a diagonal is left as it is.
  void by_key(long depth, Factor a, const real* b, real* square) const {
    product<TOKEN_ROWS, CHUNK, Into::store>(count(), depth, a, b, square, nullptr,
                                            [&](long j) { return Span{0, depth, diagonal ? j : 0}; });
  }

  // rows (queries, VALUES) += square^T (keys, queries) of right (keys, VALUES)
  void to_queries(const real* square, const real* right, real* rows, int queries) const {
    product<TOKEN_ROWS, VALUES, Into::add>(queries, count(), {square, 1, CHUNK}, right, rows, nullptr, [&](long i) {
      return Span{0, diagonal ? std::min<long>(count(), i + TOKEN_ROWS) : count()};
    });
  }

  // rows (keys, WIDTH) = square (keys, queries) of right (queries, WIDTH)
  template <int WIDTH>
  void to_keys(const real* square, const real* right, real* rows, int queries) const {
    product<TOKEN_ROWS, WIDTH, Into::store>(count(), queries, {square, CHUNK, 1}, right, rows, nullptr,
                                            [&](long j) { return Span{diagonal ? j : 0, queries}; });
  }

  // dx (WIDTH, queries) += a (WIDTH, keys) of square (keys, queries)
  template <int WIDTH>
  void to_transposed(const real* a, const real* square, real* dx) const {
    constexpr int WHOLE = WIDTH / TOKEN_ROWS * TOKEN_ROWS;
    if constexpr (WHOLE > 0) product<TOKEN_ROWS, CHUNK, Into::add>(WHOLE, count(), {a, CHUNK, 1}, square, dx);
    if constexpr (WHOLE < WIDTH)
      product<WIDTH - WHOLE, CHUNK, Into::add>(WIDTH - WHOLE, count(), {a + WHOLE * CHUNK, CHUNK, 1}, square,
                                               dx + WHOLE * CHUNK);
  }

  bool hidden(int key) const { return PADDING && ones[key] == 0; }
};

constexpr real NOTHING = -std::numeric_limits<real>::infinity();

// t of a key for LANES queries from i on, NOTHING where it is hidden or far, and the row maxima that take it in.
inline vector near_logit(const Pairs& pairs, const Reach& reach, bool all, int j, int i, vector& largest) {
  vector local = SEPARATE ? at(pairs.local + j * CHUNK + i) : SCALE * at(pairs.scores + j * CHUNK + i);
  if constexpr (FORGET) local += pairs.decay.exponent(j, i);
  if (!MIXED && !all) local = reach.sees(pairs.start + j, i) ? local : vector{} + NOTHING;
  if (pairs.hidden(j)) {
    local = vector{} + NOTHING;
  } else if constexpr (MIXED) {
    const lanes sees = reach.sees(pairs.start + j, i), near = reach.near(pairs.start + j, i);
    local = sees & near ? local : vector{} + NOTHING;
    largest = (sees & ~near) & (largest < 0) ? vector{} : largest;
  }
  largest = local > largest ? local : largest;
  return local;
}

// Adds pairs that weigh exp(t), or p(s) where they are far, to rows N (CHUNK, VALUES) and column D (CHUNK), both in
// units of e^m, m (CHUNK) = maximum, which they may raise.
inline void add_exponential_pairs(Pairs& pairs, const Reach& reach, bool all, int queries, real* rows, real* column,
                                  real* maximum) {
  real* t = SEPARATE ? pairs.local : pairs.weights;
  bool moved = false;
  alignas(VECTOR_BYTES) real factors[CHUNK];
  for (int i = 0; i < CHUNK; i += LANES) {
    vector largest = at(maximum + i);
    for (int j = 0; j < pairs.count(); ++j)
      at(t + j * CHUNK + i) = near_logit(pairs, reach, all, j, i, largest);
    const vector before = at(maximum + i);
    const vector level = largest == NOTHING ? vector{} : largest;  // of a query that has seen nothing yet
    const vector factor = before == NOTHING ? vector{} : exponential(before - level);
    vector sum = at(column + i) * factor;
    const vector decay = MIXED ? exponential(level > 0 ? -level : vector{}) : vector{};
    for (int j = 0; j < pairs.count(); ++j) {
      vector weight = exponential(at(t + j * CHUNK + i) - level);
      if constexpr (MIXED) {
        const lanes far = reach.sees(pairs.start + j, i) & ~reach.near(pairs.start + j, i);
        vector far_weight = decay * polynomial(at(pairs.scores + j * CHUNK + i));
        if constexpr (FORGET) far_weight *= pairs.decay.factor(j, i);
        if (!pairs.hidden(j)) weight = far ? far_weight : weight;
      }
      weight = as_factor(weight);
      sum += weight;
      at(pairs.weights + j * CHUNK + i) = weight;
    }
    at(column + i) = sum;
    at(maximum + i) = largest;
    at(factors + i) = factor;
    for (int lane = 0; lane < LANES; ++lane) moved |= factor[lane] != 1;
  }
  if (moved)
    for (int i = 0; i < queries; ++i)
      for (int c = 0; c < VALUES; c += LANES) at(rows + i * VALUES + c) *= factors[i];
}

// Adds pairs that weigh p(s) to the sum of weights, column D (CHUNK).
inline void add_polynomial_pairs(Pairs& pairs, const Reach& reach, bool all, real* column) {
  for (int i = 0; i < CHUNK; i += LANES) {
    vector sum = at(column + i);
    for (int j = 0; j < pairs.count(); ++j) {
      vector weight = polynomial(at(pairs.scores + j * CHUNK + i));
      if constexpr (FORGET) weight *= pairs.decay.factor(j, i);
      if (!all) weight = reach.sees(pairs.start + j, i) ? weight : vector{};
      if (pairs.hidden(j)) weight = vector{};
      weight = as_factor(weight);
      sum += weight;
      at(pairs.weights + j * CHUNK + i) = weight;
    }
    at(column + i) = sum;
  }
}

// Adds the pairs to rows N (CHUNK, VALUES) and column D (CHUNK); maximum (CHUNK): EXPONENTIAL.
inline void add_pairs(Pairs& pairs, const Reach& reach, int queries, real* rows, real* column, real* maximum) {
  const bool all = !pairs.diagonal && reach.all(pairs.start, pairs.stop);
  if constexpr (EXPONENTIAL)
    add_exponential_pairs(pairs, reach, all, queries, rows, column, maximum);
  else
    add_polynomial_pairs(pairs, reach, all, column);
  pairs.to_queries(pairs.weights, pairs.values, rows, queries);
}

// Weights again of key j for LANES queries from i on, where a pair may be far, and in place of the scores (and of local,
// where it is SEPARATE) their gradients. above: the gradient of the weight; level, decay: m, e^-m. Returns the gradients
// of the weights' logarithms (FORGET).
inline vector weigh_mixed(Pairs& pairs, const Reach& reach, int j, int i, vector above, vector level, vector decay) {
  const long place = j * CHUNK + i;
  const vector s = at(pairs.scores + place);
  vector t = SEPARATE ? at(pairs.local + place) : SCALE * s;
  if constexpr (FORGET) {
    t += pairs.decay.exponent(j, i);
    decay *= pairs.decay.factor(j, i);
  }
  const lanes visible = pairs.hidden(j) ? lanes{} : reach.sees(pairs.start + j, i);
  const lanes near = visible & reach.near(pairs.start + j, i), far = visible & ~near;
  const vector weight = near ? exponential(t < level ? t - level : vector{}) : vector{};
  const vector local_gradient = near ? weight * above : vector{};
  const vector far_gradient = far ? decay * slope(s) * above : vector{};
  at(pairs.weights + place) = far ? decay * polynomial(s) : weight;
  if constexpr (SEPARATE) at(pairs.local + place) = local_gradient;
  at(pairs.scores + place) = SEPARATE ? far_gradient : far_gradient + SCALE * local_gradient;
  return visible ? at(pairs.weights + place) * above : vector{};
}

// The same where pairs are all near or, without a near field, all far.
inline vector weigh_alike(Pairs& pairs, const Reach& reach, bool all, int j, int i, vector above, vector level) {
  const long place = j * CHUNK + i;
  vector weight, gradient;  // of the weight; of t, or of s
  if constexpr (EXPONENTIAL) {
    vector t = SEPARATE ? at(pairs.local + place) : SCALE * at(pairs.scores + place);
    if constexpr (FORGET) t += pairs.decay.exponent(j, i);
    weight = exponential(t < level ? t - level : vector{});
    gradient = SEPARATE ? weight * above : SCALE * weight * above;
  } else {
    const vector s = at(pairs.scores + place);
    weight = polynomial(s);
    gradient = slope(s) * above;
    if constexpr (FORGET) {
      const vector factor = pairs.decay.factor(j, i);
      weight *= factor;
      gradient *= factor;
    }
  }
  vector of_logarithm = weight * above;
  if (!all) {
    const lanes visible = reach.sees(pairs.start + j, i);
    weight = visible ? weight : vector{};
    gradient = visible ? gradient : vector{};
    of_logarithm = visible ? of_logarithm : vector{};
  }
  if (pairs.hidden(j)) weight = gradient = of_logarithm = vector{};
  at(pairs.weights + place) = weight;
  at((SEPARATE ? pairs.local : pairs.scores) + place) = gradient;
  return of_logarithm;
}

// Weights again and gradients of the logits, from `gradient` (keys, queries) of the weights less delta (CHUNK), which is
// of the denominator; maximum, decay (CHUNK): m, and e^-m for far keys. FORGET: gradients of G too, those of queries
// added; but BANDED: of_keys is the gradient of the gate after a key, the sum over the pairs whose decay it is part of,
// and of_queries the sums so far. Then no token beyond a window decides a bit.
inline void weigh_again(Pairs& pairs, const Reach& reach, const real* delta, real* gradient, const real* maximum,
                        const real* decay) {
  const bool all = !pairs.diagonal && reach.all(pairs.start, pairs.stop);
  for (int j = 0; j < pairs.count(); ++j) {
    vector of_key{};
    for (int i = 0; i < CHUNK; i += LANES) {
      const vector above = at(gradient + j * CHUNK + i) + at(delta + i);
      vector of_logarithm;
      if constexpr (MIXED)
        of_logarithm = weigh_mixed(pairs, reach, j, i, above, at(maximum + i), at(decay + i));
      else
        of_logarithm = weigh_alike(pairs, reach, all, j, i, above, at(maximum + i));
      if constexpr (FORGET) {
        const vector so_far = at(pairs.decay.of_queries + i) += of_logarithm;
        of_key += !BANDED ? -of_logarithm : reach.sees_beyond(pairs.start + j, i) ? so_far : vector{};
      }
    }
    if constexpr (FORGET) pairs.decay.of_keys[j] = total(of_key);
  }
}
