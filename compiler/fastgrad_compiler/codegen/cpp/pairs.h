// ---------------------------------------------------------------- pairs of tokens, one by one

{% if exponential %}
// e^x for x <= 0, to rounding: 2^k e^r with |r| <= ln(2) / 2 and a Taylor polynomial of e^r.
inline vector exponential(vector x) {
  constexpr bool DOUBLE = sizeof(real) == 8;
  constexpr int TERMS = DOUBLE ? 13 : 7, FRACTION = DOUBLE ? 52 : 23, BIAS = DOUBLE ? 1023 : 127;
  constexpr real LEAST = DOUBLE ? -708 : -87, HIGH = DOUBLE ? 0x1.62e42feep-1 : 0x1.62e4p-1;
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

{% endif %}
{% if polynomial_scores %}
inline vector polynomial(vector s) {
  vector sum = vector{} + real(COEFFICIENTS[DEGREE]);
#pragma GCC unroll 16
  for (int power = DEGREE - 1; power >= 0; --power) sum = sum * s + real(COEFFICIENTS[power]);
  return sum;
}

inline vector slope(vector s) {
  vector sum = vector{} + real(DEGREE * COEFFICIENTS[DEGREE]);
#pragma GCC unroll 16
  for (int power = DEGREE - 1; power >= 1; --power) sum = sum * s + real(power * COEFFICIENTS[power]);
  return sum;
}

{% endif %}
// Which keys each query of a chunk sees, counted from `base`; queries beyond the chunk see all, to no effect.
struct Reach {
  long base, least_low, most_low, least_high, most_high;
  alignas(VECTOR_BYTES) lane_integer low[CHUNK], high[CHUNK];
{% if mixed %}
  alignas(VECTOR_BYTES) lane_integer near_low[CHUNK], near_high[CHUNK];  // exp of t in here, p(s) in the rest
{% endif %}

  Reach(const Problem& p, long b, long first, long last, long from, long to) : base(from) {
    std::fill_n(low, CHUNK, 0);
    std::fill_n(high, CHUNK, static_cast<lane_integer>(to - from));
{% if documents %}
    const std::int64_t* ids = p.documents + b * p.keys;
    long start = document_start(ids, first, from), stop = document_stop(ids, first, to);
{% endif %}
    for (long i = first; i < last; ++i) {
      long lowest = from, highest = {{ "i + 1" if causal else "to" }};
{% if window %}
      lowest = std::max(lowest, i - WINDOW + 1);
{% if not causal %}
      highest = std::min(highest, i + WINDOW);
{% endif %}
{% endif %}
{% if documents %}
      if (i >= stop) start = i, stop = document_stop(ids, i, to);
      lowest = std::max(lowest, start);
      highest = std::min(highest, stop);
{% endif %}
      low[i - first] = static_cast<lane_integer>(lowest - from);
      high[i - first] = static_cast<lane_integer>(highest - from);
{% if mixed %}
      near_low[i - first] = static_cast<lane_integer>((i / NEAR - 1) * NEAR - from);
      near_high[i - first] = static_cast<lane_integer>((i / NEAR + 2) * NEAR - from);
{% endif %}
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
{% if mixed %}
  lanes near(long key, int t) const {
    const lane_integer j = static_cast<lane_integer>(key - base);
    return (at(near_low + t) <= j) & (at(near_high + t) > j);
  }
{% endif %}
};

// The keys [start, stop) of a window, and the products with the queries of a chunk that come from them.
struct Pairs {
  long start = 0, stop = 0;
  bool diagonal = false;  // the keys are the queries, and see no later ones
  real *k, *kx, *values, *ones;  // (CHUNK, COLUMNS), (D, CHUNK), (CHUNK, VALUES), (CHUNK)
  real *scores, *weights;        // (CHUNK keys, CHUNK queries)
{% if separate %}
  real *near_k, *near_kx, *local;  // (CHUNK, NEAR_COLUMNS), (NEAR_D, CHUNK), as scores
{% endif %}

  static constexpr long SQUARE = static_cast<long>(CHUNK) * CHUNK;
  static constexpr long SIZE = CHUNK * (COLUMNS + D + VALUES + 1L{{ " + NEAR_COLUMNS + NEAR_D" if separate }}) + {{ 3 if separate else 2 }} * SQUARE + 320;

  explicit Pairs(Arena& memory)
      : k(memory.take(CHUNK * COLUMNS)), kx(memory.take(D * CHUNK)), values(memory.take(CHUNK * VALUES)),
        ones(memory.take(CHUNK)), scores(memory.take(SQUARE)), weights(memory.take(SQUARE)) {
{% if separate %}
    near_k = memory.take(CHUNK * NEAR_COLUMNS);
    near_kx = memory.take(NEAR_D * CHUNK);
    local = memory.take(SQUARE);
{% endif %}
  }

  int count() const { return static_cast<int>(stop - start); }

  // x (D, CHUNK){{ " and near_x (NEAR_D, CHUNK)" if separate }}: the queries [first, ..) of the chunk.
  void load(const Problem& p, long b, long h, long from, long to, long first, const real* x{{ ", const real* near_x" if separate }}) {
    start = from;
    stop = to;
    diagonal = {{ "start == first" if causal else "false" }};
    load_values(p, b, p.v.rows(b, h), start, count(), values, ones, 0);
{% if mixed or not separate %}
    attention::load<D, COLUMNS>(p.k.rows(b, h), start, count(), k, 0);
    transpose<D, COLUMNS>(k, kx);
    by_key(D, {kx, 1, CHUNK}, x, scores);
{% endif %}
{% if separate %}
    attention::load<NEAR_D, NEAR_COLUMNS>(p.near_k.rows(b, h), start, count(), near_k, 0);
    transpose<NEAR_D, NEAR_COLUMNS>(near_k, near_kx);
    by_key(NEAR_D, {near_kx, 1, CHUNK}, near_x, local);
{% endif %}
  }

  // square (keys, queries) = a (keys, depth) b (depth, queries); the part above a diagonal is left as it is.
  void by_key(long depth, Factor a, const real* b, real* square) const {
    for (int j = 0; j < count(); j += TOKEN_ROWS)
      row_of_tiles<TOKEN_ROWS, CHUNK, Into::store>(depth, {a.data + j * a.row, a.row, a.step}, b, square + j * CHUNK,
                                                   nullptr, diagonal ? j : 0);
  }

  // rows (queries, VALUES) += square^T (keys, queries) of right (keys, VALUES)
  void to_queries(const real* square, const real* right, real* rows, int queries) const {
    for (int i = 0; i < queries; i += TOKEN_ROWS) {
      const long depth = diagonal ? std::min(count(), i + TOKEN_ROWS) : count();
      row_of_tiles<TOKEN_ROWS, VALUES, Into::add>(depth, {square + i, 1, CHUNK}, right, rows + i * VALUES, nullptr, 0);
    }
  }

  // rows (keys, WIDTH) = square (keys, queries) of right (queries, WIDTH)
  template <int WIDTH>
  void to_keys(const real* square, const real* right, real* rows, int queries) const {
    for (int j = 0; j < count(); j += TOKEN_ROWS) {
      const long skip = diagonal ? j : 0;
      row_of_tiles<TOKEN_ROWS, WIDTH, Into::store>(queries - skip, {square + j * CHUNK + skip, CHUNK, 1},
                                                   right + skip * WIDTH, rows + j * WIDTH, nullptr, 0);
    }
  }

  // dx (WIDTH, queries) += a (WIDTH, keys) of square (keys, queries)
  template <int WIDTH>
  void to_transposed(const real* a, const real* square, real* dx) const {
    constexpr int WHOLE = WIDTH / TOKEN_ROWS * TOKEN_ROWS;
    for (int i = 0; i < WHOLE; i += TOKEN_ROWS)
      row_of_tiles<TOKEN_ROWS, CHUNK, Into::add>(count(), {a + i * CHUNK, CHUNK, 1}, square, dx + i * CHUNK,
                                                 nullptr, 0);
    if constexpr (WHOLE < WIDTH)
      row_of_tiles<WIDTH - WHOLE, CHUNK, Into::add>(count(), {a + WHOLE * CHUNK, CHUNK, 1}, square, dx + WHOLE * CHUNK,
                                                    nullptr, 0);
  }

  bool hidden(int key) const { return {{ "ones[key] == 0" if padding else "false" }}; }
};

{% if exponential %}
constexpr real NOTHING = -std::numeric_limits<real>::infinity();

{% endif %}
// Adds the pairs to rows N (CHUNK, VALUES) and column D (CHUNK){{ ", both in units of e^m, m (CHUNK) = maximum" if exponential }}.
inline void add_pairs(Pairs& pairs, const Reach& reach, int queries, real* rows, real* column{{ ", real* maximum" if exponential }}) {
  const bool all = !pairs.diagonal && reach.all(pairs.start, pairs.stop);
{% if exponential %}
  real* t = {{ "pairs.local" if separate else "pairs.weights" }};
  bool moved = false;
  alignas(VECTOR_BYTES) real factors[CHUNK];
  for (int i = 0; i < CHUNK; i += LANES) {
    vector largest = at(maximum + i);
    for (int j = 0; j < pairs.count(); ++j) {
{% if separate %}
      vector local = at(t + j * CHUNK + i);
{% else %}
      vector local = SCALE * at(pairs.scores + j * CHUNK + i);
{% endif %}
{% if mixed %}
      const lanes visible = reach.sees(pairs.start + j, i) & reach.near(pairs.start + j, i);
      const lanes far = reach.sees(pairs.start + j, i) & ~reach.near(pairs.start + j, i);
      if (pairs.hidden(j)) {
        local = vector{} + NOTHING;
      } else {
        local = visible ? local : vector{} + NOTHING;
        largest = far & (largest < 0) ? vector{} : largest;
      }
{% else %}
      if (!all) local = reach.sees(pairs.start + j, i) ? local : vector{} + NOTHING;
      if (pairs.hidden(j)) local = vector{} + NOTHING;
{% endif %}
      largest = local > largest ? local : largest;
      at(t + j * CHUNK + i) = local;
    }
    const vector before = at(maximum + i);
    const vector level = largest == NOTHING ? vector{} : largest;  // of a query that has seen nothing yet
    const vector factor = before == NOTHING ? vector{} : exponential(before - level);
    vector sum = at(column + i) * factor;
{% if mixed %}
    const vector decay = exponential(level > 0 ? -level : vector{});
{% endif %}
    for (int j = 0; j < pairs.count(); ++j) {
      vector weight = exponential(at(t + j * CHUNK + i) - level);
{% if mixed %}
      const lanes far = reach.sees(pairs.start + j, i) & ~reach.near(pairs.start + j, i);
      if (!pairs.hidden(j)) weight = far ? decay * polynomial(at(pairs.scores + j * CHUNK + i)) : weight;
{% endif %}
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
{% else %}
  for (int i = 0; i < CHUNK; i += LANES) {
    vector sum = at(column + i);
    for (int j = 0; j < pairs.count(); ++j) {
      vector weight = polynomial(at(pairs.scores + j * CHUNK + i));
      if (!all) weight = reach.sees(pairs.start + j, i) ? weight : vector{};
      if (pairs.hidden(j)) weight = vector{};
      sum += weight;
      at(pairs.weights + j * CHUNK + i) = weight;
    }
    at(column + i) = sum;
  }
{% endif %}
  pairs.to_queries(pairs.weights, pairs.values, rows, queries);
}

// Weights again, and in place of the scores their gradients, from `gradient` (keys, queries) of the weights less delta
// (CHUNK), which is of the denominator{{ "; decay (CHUNK) = e^-m for far keys" if mixed }}.
inline void weigh_again(Pairs& pairs, const Reach& reach, const real* delta, real* gradient{{ ", const real* maximum" if exponential }}{{ ", const real* decay" if mixed }}) {
  const bool all = !pairs.diagonal && reach.all(pairs.start, pairs.stop);
  for (int j = 0; j < pairs.count(); ++j)
    for (int i = 0; i < CHUNK; i += LANES) {
      const long place = j * CHUNK + i;
      const vector above = at(gradient + place) + at(delta + i);  // of the weight
{% if mixed or not exponential %}
      const vector s = at(pairs.scores + place);
{% endif %}
{% if exponential %}
{% if separate %}
      const vector t = at(pairs.local + place);
{% else %}
      const vector t = SCALE * at(pairs.scores + place);
{% endif %}
      const vector level = at(maximum + i);
      vector weight = exponential(t < level ? t - level : vector{});
{% else %}
      vector weight = polynomial(s);
{% endif %}
{% if mixed %}
      const lanes visible = pairs.hidden(j) ? lanes{} : reach.sees(pairs.start + j, i);
      const lanes near = reach.near(pairs.start + j, i);
      const lanes far = visible & ~near;
      weight = visible & near ? weight : vector{};
      const vector local_gradient = visible & near ? weight * above : vector{};
      const vector far_gradient = far ? at(decay + i) * slope(s) * above : vector{};
      at(pairs.weights + place) = far ? at(decay + i) * polynomial(s) : weight;
{% if separate %}
      at(pairs.local + place) = local_gradient;
      at(pairs.scores + place) = far_gradient;
{% else %}
      at(pairs.scores + place) = far_gradient + SCALE * local_gradient;
{% endif %}
{% else %}
      vector score_gradient = {{ ("weight * above" if separate else "SCALE * weight * above") if exponential else "slope(s) * above" }};
      if (!all) {
        const lanes visible = reach.sees(pairs.start + j, i);
        weight = visible ? weight : vector{};
        score_gradient = visible ? score_gradient : vector{};
      }
      if (pairs.hidden(j)) weight = score_gradient = vector{};
      at(pairs.weights + place) = weight;
      at(pairs.{{ "local" if separate else "scores" }} + place) = score_gradient;
{% endif %}
    }
}
