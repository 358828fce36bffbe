// ---------------------------------------------------------------- one chunk of queries

struct Work {
  real *phi, *dphi;                     // (FEATURES, CHUNK)
  real *q, *x, *dx;                     // (CHUNK, COLUMNS), (D, CHUNK) twice; x is the rows 1 to D of phi
  real *rows, *column, *level, *decay;  // (CHUNK, VALUES), (CHUNK) three times
  real *cotangent, *transposed, *far;   // (CHUNK, VALUES), (VALUES, CHUNK), (CHUNK, VALUES)
  real *delta, *far_delta;              // (CHUNK)
  real *k, *kx, *gradients;             // (CHUNK, COLUMNS), (D, CHUNK), (CHUNK, the widest)
  long ahead = CHUNK;                   // from a chunk to the next of the sweep, in tokens
  real *near_q, *near_x, *near_dx;      // (CHUNK, NEAR_COLUMNS), (NEAR_D, CHUNK) twice
  Pairs pairs;

  static constexpr long WIDEST = std::max<long>({VALUES, COLUMNS, NEAR_COLUMNS, CHUNK});
  static constexpr long SIZE = 2 * FEATURES * CHUNK + CHUNK * (2L * COLUMNS + 3 * D + 4 * VALUES + WIDEST + 5) +
                               CHUNK * (NEAR_COLUMNS + 2 * NEAR_D) + 640 + Pairs::SIZE;

  explicit Work(Arena& memory)
      : phi(memory.take(FEATURES * CHUNK)), dphi(memory.take(FEATURES * CHUNK)), q(memory.take(CHUNK * COLUMNS)),
        x(phi + CHUNK), dx(memory.take(D * CHUNK)), rows(memory.take(CHUNK * VALUES)), column(memory.take(CHUNK)),
        level(memory.take(CHUNK)), decay(memory.take(CHUNK)), cotangent(memory.take(CHUNK * VALUES)),
        transposed(memory.take(CHUNK * VALUES)), far(memory.take(CHUNK * VALUES)), delta(memory.take(CHUNK)),
        far_delta(memory.take(CHUNK)), k(memory.take(CHUNK * COLUMNS)), kx(memory.take(D * CHUNK)),
        gradients(memory.take(CHUNK * WIDEST)), near_q(memory.take(CHUNK * NEAR_COLUMNS)),
        near_x(memory.take(NEAR_D * CHUNK)), near_dx(memory.take(NEAR_D * CHUNK)), pairs(memory) {
    std::fill(phi + RANK * CHUNK, phi + FEATURES * CHUNK, real(0));
  }

  void load_queries(const Problem& p, long b, long h, long g, long first, int count) {
    load<D, COLUMNS>(p.q.rows(b, h * p.groups + g), first, count, q, ahead);
    transpose<D, COLUMNS>(q, x);
    if constexpr (FORGET) pairs.decay.load_queries(p, b, h, first, count);
    if constexpr (SEPARATE) {
      load<NEAR_D, NEAR_COLUMNS>(p.near_q.rows(b, h * p.groups + g), first, count, near_q, ahead);
      transpose<NEAR_D, NEAR_COLUMNS>(near_q, near_x);
    }
  }

  // cotangent (CHUNK, VALUES) = dO / D and delta (CHUNK) = -(dO . O) / D; 0 for a query that sees nothing. FIRST: for the
  // first time; after that O is not needed any more.
  template <bool FIRST>
  void load_cotangent(const Problem& p, long b, long h, long g, long first, int count) {
    const long head = h * p.groups + g, saved = p.saved(b, h, g) + first;
    load<DV, VALUES>(p.gradient.rows(b, head), first, count, cotangent, ahead);
    if constexpr (FIRST)
      load<DV, VALUES>({p.out.data + b * p.out.batch + head * p.out.head, p.out.token}, first, count, rows, ahead);
    std::fill_n(delta, CHUNK, real(0));
    for (int t = 0; t < count; ++t) {
      const real inverse = p.denominator[saved + t] == 0 ? 0 : 1 / p.denominator[saved + t];
      vector sum{};
      for (int i = 0; i < VALUES; i += LANES) {
        vector& u = at(cotangent + t * VALUES + i);
        u = as_factor(inverse * u);
        if constexpr (FIRST) sum += u * at(rows + t * VALUES + i);
      }
      if constexpr (FIRST) p.deltas[saved + t] = -total(sum);
      delta[t] = p.deltas[saved + t];
    }
    if constexpr (EXPONENTIAL)
      for (int t = 0; t < CHUNK; ++t) level[t] = t < count ? p.maximum[saved + t] : 0;
  }
};

struct Row {
  long index, b, h;
};

inline Row row_of(const Problem& p, long index) { return {index, index / p.heads, index % p.heads}; }

// First chunk of a segment.
inline long segment_start(const Problem& p, long segment) { return chunk_count(p.queries) * segment / p.segments; }
