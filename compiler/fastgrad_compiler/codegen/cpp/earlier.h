// ---------------------------------------------------------------- what is before a piece of a sequence
//
// Queries read the sums phi(k) v~^T of keys before their piece, which `absorb` adds up: [N, D] = phi(q)^T W sums. Here are
// that and the gradients of both. Sums are as in `Next`, of float64; a row of tokens is [DV, 1] numbers.

struct Piece {
  long batch, heads, groups, tokens;
  Heads<const input> x, v;        // queries, heads * groups of them; or keys, and their values
  const double* factor;           // of keys: [batch, heads, tokens], or null
  const bool* there;              // of keys: [batch, tokens], or null
  const double* sums;             // what is read; of `absorb_backward` the gradient of the sums
  const real* gradient;           // of what was read: [batch, heads * groups, tokens, SUM_COLUMNS]
  real* found;                    // what is read, of that shape
  Heads<real> dx, dv;
  double *dfactor, *dsums;
  long threads;

  long row(long b, long head) const { return (b * heads * groups + head) * tokens; }
};

// The state of given sums, weighted by W where they are to be read.
inline void load_sums(const double* sums, bool weighted, State& state) {
  state.clear();
  for (long f = 0; f < RANK; ++f) {
    const double weight = weighted ? TABLE.weights[f] : 1;
    for (int i = 0; i < DV; ++i) state.values[f * VALUES + i] = static_cast<real>(weight * sums[f * SUM_COLUMNS + i]);
    state.extra[f] = static_cast<real>(weight * sums[f * SUM_COLUMNS + DV]);
  }
}

inline void add_sums(const State& state, double* sums) {
  for (long f = 0; f < RANK; ++f) {
    for (int i = 0; i < DV; ++i) sums[f * SUM_COLUMNS + i] += state.values[f * VALUES + i];
    sums[f * SUM_COLUMNS + DV] += state.extra[f];
  }
}

// What a thread works on: a chunk of tokens, and two states.
struct Passing {
  static constexpr long SIZE =
      round_up(CHUNK * (COLUMNS + 2 * FEATURES + D + 3L * VALUES + 2) + 2 * State::SIZE + 10 * 32, 32);  // with what `Arena` rounds up
  real *tokens, *phi, *dphi, *dx, *rows, *other, *transposed, *column, *ones;
  State sums, gathered;

  explicit Passing(Arena memory)
      : tokens(memory.take(CHUNK * COLUMNS)), phi(memory.take(FEATURES * CHUNK)), dphi(memory.take(FEATURES * CHUNK)),
        dx(memory.take(D * CHUNK)), rows(memory.take(CHUNK * VALUES)), other(memory.take(CHUNK * VALUES)),
        transposed(memory.take(VALUES * CHUNK)), column(memory.take(CHUNK)), ones(memory.take(CHUNK)),
        sums(memory.take(State::SIZE)), gathered(memory.take(State::SIZE)) {
    std::fill_n(phi, FEATURES * CHUNK, real(0));
  }

  void load_tokens(Rows<const input> from, long first, int count) {
    attention::load<D, COLUMNS>(from, first, count, tokens, CHUNK);
    transpose<D, COLUMNS>(tokens, phi + CHUNK);
    features(phi);
  }

  // Rows of SUM_COLUMNS numbers, the last of them into `column`.
  void load_rows(const real* from, int count) {
    std::fill_n(rows, CHUNK * VALUES, real(0));
    std::fill_n(column, CHUNK, real(0));
    for (int t = 0; t < count; ++t) {
      for (int i = 0; i < DV; ++i) rows[t * VALUES + i] = from[t * SUM_COLUMNS + i];
      column[t] = from[t * SUM_COLUMNS + DV];
    }
  }

  // The gradient of the tokens: J_phi^T (sums [rows, column]^T).
  void pull_tokens(const real* from, const real* last, Rows<real> to, long first, int count) {
    transpose<DV, VALUES>(from, transposed);
    sums.upstream(transposed, last, dphi);
    std::fill_n(dx, D * CHUNK, real(0));
    pull(phi, dphi, dx);
    put_transposed<D>(dx, to, first, count);
  }
};

// body(passing, b, h) for each row of keys.
template <typename Body>
inline void each_row(const Piece& p, Body body) {
  const long rows = p.batch * p.heads, threads = std::max(1L, std::min(p.threads, rows));
  const Memory memory(threads * Passing::SIZE);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    Passing w(Arena{memory.start + omp_get_thread_num() * Passing::SIZE});
#pragma omp for schedule(dynamic, 1)
    for (long row = 0; row < rows; ++row) body(w, row / p.heads, row % p.heads, row * RANK * SUM_COLUMNS);
  }
}

// body(first, count) for each chunk.
template <typename Body>
inline void each_chunk(const Piece& p, Body body) {
  for (long first = 0; first < p.tokens; first += TILE) body(first, static_cast<int>(std::min<long>(TILE, p.tokens - first)));
}

inline void read_earlier(const Piece& p) {
  each_row(p, [&](Passing& w, long b, long h, long place) {
    load_sums(p.sums + place, true, w.sums);
    for (long head = h * p.groups; head < (h + 1) * p.groups; ++head)
      each_chunk(p, [&](long first, int count) {
        w.load_tokens(p.x.rows(b, head), first, count);
        std::fill_n(w.rows, CHUNK * VALUES, real(0));
        std::fill_n(w.column, CHUNK, real(0));
        w.sums.read(w.phi, w.rows, w.column, count);
        real* to = p.found + (p.row(b, head) + first) * SUM_COLUMNS;
        for (int t = 0; t < count; ++t) {
          std::copy_n(w.rows + t * VALUES, DV, to + t * SUM_COLUMNS);
          to[t * SUM_COLUMNS + DV] = w.column[t];
        }
      });
  });
}

inline void read_backward(const Piece& p) {
  each_row(p, [&](Passing& w, long b, long h, long place) {
    load_sums(p.sums + place, true, w.sums);
    w.gathered.clear();
    for (long head = h * p.groups; head < (h + 1) * p.groups; ++head)
      each_chunk(p, [&](long first, int count) {
        w.load_tokens(p.x.rows(b, head), first, count);
        w.load_rows(p.gradient + (p.row(b, head) + first) * SUM_COLUMNS, count);
        w.gathered.absorb(w.phi, w.rows, w.column, count);
        w.pull_tokens(w.rows, w.column, p.dx.rows(b, head), first, count);
      });
    add_sums(w.gathered, p.dsums + place);
  });
}

inline void absorb_backward(const Piece& p) {
  each_row(p, [&](Passing& w, long b, long h, long place) {
    load_sums(p.sums + place, false, w.sums);
    each_chunk(p, [&](long first, int count) {
      w.load_tokens(p.x.rows(b, h), first, count);
      attention::load<DV, VALUES>(p.v.rows(b, h), first, count, w.other, CHUNK);
      std::fill_n(w.rows, CHUNK * VALUES, real(0));
      std::fill_n(w.column, CHUNK, real(0));
      w.sums.read(w.phi, w.rows, w.column, count);
      for (int t = 0; t < CHUNK; ++t) {
        const bool shown = t < count && (p.there == nullptr || p.there[b * p.tokens + first + t]);
        const long at_token = (b * p.heads + h) * p.tokens + first + t;
        w.ones[t] = !shown ? 0 : p.factor == nullptr ? 1 : static_cast<real>(p.factor[at_token]);
        if (shown && p.dfactor != nullptr) {
          double sum = w.column[t];
          for (int i = 0; i < DV; ++i) sum += static_cast<double>(w.rows[t * VALUES + i]) * w.other[t * VALUES + i];
          p.dfactor[at_token] = sum;
        }
        for (int i = 0; i < DV; ++i) {
          w.rows[t * VALUES + i] = shown ? w.ones[t] * w.rows[t * VALUES + i] : 0;
          w.other[t * VALUES + i] = shown ? w.ones[t] * w.other[t * VALUES + i] : 0;
        }
      }
      add_rows<DV, VALUES>(w.rows, p.dv.rows(b, h), first, count);
      std::fill_n(w.dx, D * CHUNK, real(0));
      w.pull_tokens(w.other, w.ones, p.dx.rows(b, h), first, count);
      if (p.there != nullptr)
        for (int t = 0; t < count; ++t)
          if (w.ones[t] == 0) std::fill_n(p.dx.rows(b, h)[first + t], D, real(0));
    });
  });
}
