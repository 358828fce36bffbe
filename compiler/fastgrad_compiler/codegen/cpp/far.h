// ---------------------------------------------------------------- what is far of a window, on either side
//
// LEFT: a query's far keys are those before its window, and states run from the left for the queries, from the right
// for the keys; RIGHT, where far keys lie after the window too (TWO_SIDED): the mirror image.

enum class Side { LEFT, RIGHT };

// The end of a window on a side.
template <Side SIDE>
inline long edge_of(const Problem& p, long chunk) {
  if constexpr (SIDE == Side::RIGHT) return window_high(chunk_last(chunk, p.queries), p.keys);
  return window_low(chunk_first(chunk), p.keys);
}

// Cuts the far keys [start, stop) next to a window to those of the document beside it; true if something was cut off,
// or ended just there.
template <Side SIDE>
inline bool cut(const Problem& p, long b, long& start, long& stop) {
  const std::int64_t* ids = p.documents + b * p.keys;
  if constexpr (SIDE == Side::RIGHT) {
    const long end = document_stop(ids, start, stop);
    const bool reset = end < stop || (stop < p.keys && ids[stop - 1] != ids[stop]);
    stop = end;
    return reset;
  } else {
    const long begin = document_start(ids, stop - 1, start);
    const bool reset = begin > start || (start > 0 && ids[start - 1] != ids[start]);
    start = begin;
    return reset;
  }
}

// Which queries of [first, last) have far keys beyond the edge: all, or those of the document that crosses it.
template <Side SIDE>
inline void far_queries(const Problem& p, long b, long edge, long& first, long& last) {
  const std::int64_t* ids = DOCUMENTS ? p.documents + b * p.keys : nullptr;
  if constexpr (SIDE == Side::RIGHT) {
    if (edge >= p.keys)
      first = last;
    else if constexpr (DOCUMENTS)
      first = std::min(document_start(ids, edge, first), last);
  } else {
    if (edge <= 0)
      last = first;
    else if constexpr (DOCUMENTS)
      last = std::max(first, document_stop(ids, edge - 1, last));
  }
}

// Whether a document ends among the queries [first, last) of which [from, to) are far, or at their outer end.
template <Side SIDE>
inline bool ends_document(const Problem& p, long b, long first, long last, long from, long to) {
  const std::int64_t* ids = p.documents + b * p.keys;
  if constexpr (SIDE == Side::RIGHT)
    return from > first || (first > 0 && ids[first - 1] != ids[first]);
  else
    return to < last || (last < p.queries && ids[last - 1] != ids[last]);
}

// ---------------------------------------------------------------- states along the sequence

// FORGET: v~ of the keys [first, first + count), in w.far and w.far_delta, times what is left of it at the edge `stop`,
// which goes to w.decay.
inline void decay_values(const Problem& p, Work& w, Row row, long first, int count, long stop) {
  const double* sums = p.sums(row.b, row.h);
  const Exponents& exponents = w.pairs.decay.keys;
  exponents.load(count, [&](int t) { return sums[stop - 1] - sums[first + t]; });
  exponents.exponentiate(w.decay);
  for (int t = 0; t < count; ++t) {
    for (int i = 0; i < VALUES; i += LANES) at(w.far + t * VALUES + i) *= w.decay[t];
    w.far_delta[t] *= w.decay[t];
  }
}

struct Values {
  real *rows, *ones;  // (CHUNK, VALUES), (CHUNK): as of `load_values`
};

// Features of the keys [first, first + count), in w.phi, and their values. FUSED: the pairs of a chunk have the same keys,
// and are met just before or just after.
inline Values load_keys(const Problem& p, Work& w, Row row, long first, int count) {
  if constexpr (FUSED && !FORGET) {
    w.pairs.load_keys(p, row.b, row.h, first, first + count, w.ahead);
    std::copy_n(w.pairs.kx, D * CHUNK, w.x);
    features(w.phi);
    return {w.pairs.values, w.pairs.ones};
  }
  load<D, COLUMNS>(p.k.rows(row.b, row.h), first, count, w.k, w.ahead);
  transpose<D, COLUMNS>(w.k, w.x);
  features(w.phi);
  load_values(p, row.b, p.v.rows(row.b, row.h), first, count, w.far, w.far_delta, w.ahead);
  return {w.far, w.far_delta};
}

// The state of the keys [start, stop), added.
inline void absorb_keys(const Problem& p, Work& w, Row row, State& state, long start, long stop) {
  for (long first = start; first < stop; first += CHUNK) {
    const int count = static_cast<int>(std::min<long>(CHUNK, stop - first));
    const Values v = load_keys(p, w, row, first, count);
    if constexpr (FORGET) decay_values(p, w, row, first, count, stop);
    state.absorb(w.phi, v.rows, v.ones, count);
  }
}

// A state that moves along the keys: it holds those between its place and the end where it began.
template <Side SIDE>
struct KeyState {
  State state;
  long place;
  bool empty;

  // True if what came before does not count any more.
  bool advance(const Problem& p, Work& w, Row row, long edge) {
    long start = place, stop = edge;
    if constexpr (SIDE == Side::RIGHT) std::swap(start, stop);
    if (start >= stop) return false;
    if constexpr (FORGET)
      if (!empty) state.scale(decay_between(p, row.b, row.h, place, edge));
    place = edge;
    bool reset = false;
    if constexpr (DOCUMENTS) {
      reset = cut<SIDE>(p, row.b, start, stop);
      if (reset && !empty) state.clear();
    }
    absorb_keys(p, w, row, state, start, stop);
    empty = false;
    return reset;
  }
};

struct Cotangent {
  real *rows, *delta;  // (CHUNK, VALUES), (CHUNK)
};

// u~ e^-m of the far queries [from, to) of a chunk, 0 elsewhere; with gates times their decay since the window began.
inline Cotangent far_cotangent(Work& w, long from, long to) {
  if constexpr (!EXPONENTIAL && !DOCUMENTS && !FORGET) return {w.cotangent, w.delta};
  for (int t = 0; t < CHUNK; ++t) {
    const bool far = t >= from && t < to;  // 0 times a cotangent that overflowed is not 0
    real decay = EXPONENTIAL && far ? std::exp(-std::max(w.level[t], real(0))) : real(1);
    if constexpr (FORGET) decay *= w.pairs.decay.factors[t];
    for (int i = 0; i < VALUES; i += LANES)
      at(w.far + t * VALUES + i) = far ? decay * at(w.cotangent + t * VALUES + i) : vector{};
    w.far_delta[t] = far ? decay * w.delta[t] : 0;
  }
  return {w.far, w.far_delta};
}

// Adds the far queries of a chunk to Y, W times the sum of phi(q_i) u~_i^T; true if what came before does not count.
// First calls also(g) for each of the group's heads, with queries and cotangents in w.
template <Side SIDE, typename Also>
inline bool absorb_queries(const Problem& p, Work& w, Row row, long chunk, State& state, bool& empty, Also also) {
  const long first = chunk_first(chunk), last = chunk_last(chunk, p.queries), edge = edge_of<SIDE>(p, chunk);
  const int count = static_cast<int>(last - first);
  long from = first, to = last;
  far_queries<SIDE>(p, row.b, edge, from, to);
  bool reset = false;
  if constexpr (DOCUMENTS) {
    reset = ends_document<SIDE>(p, row.b, first, last, from, to);
    if (reset && !empty) {
      state.clear();
      empty = true;
    }
  }
  if constexpr (FORGET)
    if (!empty) state.scale(decay_between(p, row.b, row.h, edge, edge_of<SIDE>(p, chunk + 1)));
  for (long g = 0; g < p.groups; ++g) {
    w.load_queries(p, row.b, row.h, g, first, count);
    w.load_cotangent<false>(p, row.b, row.h, g, first, count);
    also(g);
    if (from >= to) continue;
    features(w.phi);
    const Cotangent far = far_cotangent(w, from - first, to - first);
    state.absorb(w.phi, far.rows, far.delta, count);
  }
  if (from < to) empty = false;
  return reset;
}

inline void nothing(long) {}

// FORGET: turns the gradients of v~, in w.rows and w.column, at the edge of a state into those at the keys, and subtracts
// their products with v~ from the gradients of G.
inline void decay_key_gradients(const Problem& p, Work& w, Row row, long first, int count) {
  for (int t = 0; t < count; ++t) {
    vector sum{};
    for (int i = 0; i < VALUES; i += LANES) {
      vector& gradient = at(w.rows + t * VALUES + i);
      gradient = w.far_delta[t] == 0 ? vector{} : gradient;  // 0 times a state that overflowed is not 0
      sum += at(w.far + t * VALUES + i) * gradient;
      gradient *= w.decay[t];
    }
    if (w.far_delta[t] != 0) p.dsums(row.b, row.h)[first + t] -= total(sum) + w.far_delta[t] * w.column[t];
  }
}

// dV += (Y^T W phi(K))[:dv] and dK += J_phi(K)^T (W Y v~) for the keys [start, stop).
inline void key_gradients(const Problem& p, Work& w, Row row, const State& state, long start, long stop) {
  for (long first = start; first < stop; first += CHUNK) {
    const int count = static_cast<int>(std::min<long>(CHUNK, stop - first));
    const Values v = load_keys(p, w, row, first, count);
    if constexpr (FORGET) decay_values(p, w, row, first, count, stop);
    std::fill_n(w.rows, CHUNK * VALUES, real(0));
    if constexpr (FORGET) std::fill_n(w.column, CHUNK, real(0));
    state.read(w.phi, w.rows, FORGET ? w.column : nullptr, count);
    if constexpr (PADDING)
      for (int t = 0; t < count; ++t)
        if (v.ones[t] == 0) std::fill_n(w.rows + t * VALUES, VALUES, real(0));
    if constexpr (FORGET) decay_key_gradients(p, w, row, first, count);
    add_rows<DV, VALUES>(w.rows, p.dv.rows(row.b, row.h), first, count);
    transpose<DV, VALUES>(v.rows, w.transposed);
    state.upstream(w.transposed, v.ones, w.dphi);
    std::fill_n(w.dx, D * CHUNK, real(0));
    pull(w.phi, w.dphi, w.dx);
    put_transposed<D>(w.dx, p.dk.rows(row.b, row.h), first, count);
  }
}
