// ---------------------------------------------------------------- gradients that come from pairs

// Rows [first, last) = 0; those `ahead` of them are asked for.
inline void clear_rows(Rows<real> rows, long first, long last, long width, long ahead) {
  for (long t = first; t < last; ++t) {
    for (long i = 0; i < width; i += 64 / sizeof(real)) __builtin_prefetch(rows[t + ahead] + i, 1, 2);
    std::fill_n(rows[t], width, real(0));
  }
}

inline void clear(const Heads<real>& x, long batch, long heads, long tokens, long width, long threads) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads))
  for (long row = 0; row < batch * heads; ++row) clear_rows(x.rows(row / heads, row % heads), 0, tokens, width, 0);
}

// The ranges of keys that a chunk meets one by one, none of them across a place where a segment or the chunk begins.
template <typename Body>
inline void each_key_range(const Problem& p, long segment, long first, long last, Body body) {
  const long low = window_low(first, p.keys), high = window_high(last, p.keys);
  const long begin = chunk_first(segment_start(p, segment));
  const long end = chunk_last(segment_start(p, segment + 1) - 1, p.queries);
  for (long start = low; start < high;) {
    long stop = std::min(start + CHUNK, high);
    for (const long edge : {begin, first, end})
      if (start < edge) stop = std::min(stop, edge);
    body(start, stop);
    start = stop;
  }
}

// Gradients of keys beside a segment, [HALO tokens before, HALO after], which are added when all segments are done.
constexpr long HALO = NEAR > 0 ? 2 * NEAR : std::max(WINDOW - 1, 0L), HALO_WIDTH = D + DV + NEAR_D + FORGET;

struct Halo {
  real* memory;  // for each row and segment (2 HALO, HALO_WIDTH); nullptr: no key is beside its segment

  static long size(const Problem& p) {
    return p.segments == 1 ? 0 : p.batch * p.heads * p.segments * 2 * HALO * HALO_WIDTH;
  }

  // Rows of keys [start, ..), which lie beside the segment of tokens [begin, end), or nullptr if within.
  real* rows(const Problem& p, long row, long segment, long begin, long end, long start) const {
    if (memory == nullptr || (start >= begin && start < end)) return nullptr;
    const long place = start < begin ? start - (begin - HALO) : HALO + start - end;
    return memory + ((row * p.segments + segment) * 2 * HALO + place) * HALO_WIDTH;
  }

  void add(const Problem& p) const {
    if (memory == nullptr) return;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(p.threads))
    for (long index = 0; index < p.batch * p.heads; ++index) {
      const Row row = row_of(p, index);
      for (long segment = 0; segment < p.segments; ++segment) {
        const long begin = chunk_first(segment_start(p, segment));
        const long end = chunk_last(segment_start(p, segment + 1) - 1, p.queries);
        for (long place = 0; place < 2 * HALO; ++place) {
          const long key = place < HALO ? begin - HALO + place : end + place - HALO;
          if (key < 0 || key >= p.keys) continue;
          const real* from = memory + ((index * p.segments + segment) * 2 * HALO + place) * HALO_WIDTH;
          for (int i = 0; i < D; ++i) p.dk.rows(row.b, row.h)[key][i] += from[i];
          for (int i = 0; i < DV; ++i) p.dv.rows(row.b, row.h)[key][i] += from[D + i];
          for (int i = 0; i < NEAR_D; ++i) p.dnear_k.rows(row.b, row.h)[key][i] += from[D + DV + i];
          if constexpr (FORGET) p.dsums(row.b, row.h)[key] += from[HALO_WIDTH - 1];
        }
      }
    }
  }
};

// Where the gradients of the keys [start, ..) of a chunk's window go.
struct KeyGradients {
  Rows<real> dk, dv, dnear_k;
  real* beside = nullptr;   // the rows of keys beside the segment, from key 0 on
  double* dsums = nullptr;  // FORGET: of all keys

  KeyGradients(const Problem& p, Row row, long segment, long start, const Halo& halo)
      : dk(p.dk.rows(row.b, row.h)), dv(p.dv.rows(row.b, row.h)), dnear_k(p.dnear_k.rows(row.b, row.h)) {
    if constexpr (FORGET) dsums = p.dsums(row.b, row.h);
    if constexpr (HALO > 0) {
      const long begin = chunk_first(segment_start(p, segment));
      const long end = chunk_last(segment_start(p, segment + 1) - 1, p.queries);
      beside = halo.rows(p, row.index, segment, begin, end, start);
      if (beside != nullptr) {
        beside -= start * HALO_WIDTH;
        dk = {beside, HALO_WIDTH};
        dv = {beside + D, HALO_WIDTH};
        dnear_k = {beside + D + DV, HALO_WIDTH};
      }
    }
  }

  // FORGET: those of G too, of the keys [start, start + count)
  void add_sums(const real* of_keys, long start, int count) const {
    for (int t = 0; t < count; ++t)
      if (HALO > 0 && beside != nullptr)
        beside[(start + t) * HALO_WIDTH + HALO_WIDTH - 1] += of_keys[t];
      else
        dsums[start + t] += of_keys[t];
  }
};

// FORGET: the gradients of G of queries, added.
inline void add_sums(const Problem& p, Row row, const real* of_queries, long first, int count) {
  for (int t = 0; t < count; ++t) p.dsums(row.b, row.h)[first + t] += of_queries[t];
}

// The gradients that come from pairs: of the queries into w.dx and w.near_dx, of the keys and values into place.
inline void local_gradients(const Problem& p, Work& w, Row row, long segment, long first, long last, const Halo& halo) {
  const int queries = static_cast<int>(last - first);
  const Reach reach(p, row.b, first, last, window_low(first, p.keys), window_high(last, p.keys));
  transpose<DV, VALUES>(w.cotangent, w.transposed);
  if constexpr (MIXED)
    for (int t = 0; t < CHUNK; ++t) w.decay[t] = std::exp(-std::max(w.level[t], real(0)));
  Pairs& pairs = w.pairs;
  if constexpr (FORGET) std::fill_n(pairs.decay.of_queries, CHUNK, real(0));
  each_key_range(p, segment, first, last, [&](long start, long stop) {
    if (reach.none(start, stop)) return;
    pairs.load(p, row.b, row.h, start, stop, first, w.x, w.near_x);
    pairs.by_key(DV, {pairs.values, VALUES, 1}, w.transposed, w.gradients);
    weigh_again(pairs, reach, w.delta, w.gradients, w.level, w.decay);
    const KeyGradients to(p, row, segment, start, halo);
    pairs.to_keys<VALUES>(pairs.weights, w.cotangent, w.gradients, queries);
    add_rows<DV, VALUES>(w.gradients, to.dv, start, pairs.count());
    if constexpr (FORGET) to.add_sums(pairs.decay.of_keys, start, pairs.count());
    if constexpr (SCORED) {
      pairs.to_keys<COLUMNS>(pairs.scores, w.q, w.gradients, queries);
      add_rows<D, COLUMNS>(w.gradients, to.dk, start, pairs.count());
      pairs.to_transposed<D>(pairs.kx, pairs.scores, w.dx);
    }
    if constexpr (SEPARATE) {
      pairs.to_keys<NEAR_COLUMNS>(pairs.local, w.near_q, w.gradients, queries);
      add_rows<NEAR_D, NEAR_COLUMNS>(w.gradients, to.dnear_k, start, pairs.count());
      pairs.to_transposed<NEAR_D>(pairs.near_kx, pairs.local, w.near_dx);
    }
  });
  if constexpr (FORGET && !BANDED) add_sums(p, row, pairs.decay.of_queries, first, queries);
}
