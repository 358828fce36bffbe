// ---------------------------------------------------------------- many keys at once

// The sums of keys that the polynomial is to meet, in the variant's precision for some chunks at a time.
struct Absorbed {
  long batch, heads, keys;
  Heads<const input> k, v;
  const double* factor;  // [batch, heads, keys], or null
  const bool* there;     // [batch, keys], or null
  double* sums;          // as in `Next`
  long threads;
};

struct Absorbing {
  static constexpr long AT_ONCE = 512;  // tokens
  real *k, *phi, *values, *ones, *part, *extra;

  static constexpr long SIZE =
      round_up(CHUNK * (COLUMNS + FEATURES + VALUES + 1L) + FEATURES * (VALUES + 1L) + 6 * 32, 32);  // with what `Arena` rounds up

  explicit Absorbing(Arena memory)
      : k(memory.take(CHUNK * COLUMNS)), phi(memory.take(FEATURES * CHUNK)), values(memory.take(CHUNK * VALUES)),
        ones(memory.take(CHUNK)), part(memory.take(FEATURES * VALUES)), extra(memory.take(FEATURES)) {
    std::fill_n(phi, FEATURES * CHUNK, real(0));
  }

  void load(const Absorbed& a, long b, long h, long first, int count) {
    attention::load<D, COLUMNS>(a.k.rows(b, h), first, count, k, count);
    attention::load<DV, VALUES>(a.v.rows(b, h), first, count, values, count);
    for (int t = 0; t < CHUNK; ++t) {
      ones[t] = t < count;
      if (t >= count) continue;
      if (a.there != nullptr && !a.there[b * a.keys + first + t]) {
        ones[t] = 0;
        std::fill_n(k + t * COLUMNS, COLUMNS, real(0));
        std::fill_n(values + t * VALUES, VALUES, real(0));
      } else if (a.factor != nullptr) {
        ones[t] = static_cast<real>(a.factor[(b * a.heads + h) * a.keys + first + t]);
        for (int i = 0; i < DV; ++i) values[t * VALUES + i] *= ones[t];
      }
    }
    transpose<D, COLUMNS>(k, phi + CHUNK);
    features(phi);
  }

  void sum(int count) {
    product<FEATURE_ROWS, VALUES, Into::add>(FEATURES, count, {phi, CHUNK, 1}, values, part);
    for (long f = 0; f < RANK; ++f) {
      vector sum{};
      for (int t = 0; t < CHUNK; t += LANES) sum += at(ones + t) * at(phi + f * CHUNK + t);
      extra[f] += total(sum);
    }
  }

  void run(const Absorbed& a, long b, long h) {
    double* sums = a.sums + (b * a.heads + h) * RANK * SUM_COLUMNS;
    for (long start = 0; start < a.keys; start += AT_ONCE) {
      std::fill_n(part, FEATURES * VALUES, real(0));
      std::fill_n(extra, FEATURES, real(0));
      for (long first = start; first < std::min(start + AT_ONCE, a.keys); first += TILE) {
        const int count = static_cast<int>(std::min({first + TILE, start + AT_ONCE, a.keys}) - first);
        load(a, b, h, first, count);
        sum(count);
      }
      for (long f = 0; f < RANK; ++f) {
        for (int i = 0; i < DV; ++i) sums[f * SUM_COLUMNS + i] += part[f * VALUES + i];
        sums[f * SUM_COLUMNS + DV] += extra[f];
      }
    }
  }
};

inline void absorb(const Absorbed& a) {
  const long rows = a.batch * a.heads, threads = std::min(a.threads, rows);
  const Memory memory(threads * Absorbing::SIZE);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    Absorbing work(Arena{memory.start + omp_get_thread_num() * Absorbing::SIZE});
#pragma omp for schedule(dynamic, 1)
    for (long row = 0; row < rows; ++row) work.run(a, row / a.heads, row % a.heads);
  }
}
