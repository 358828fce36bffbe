// ---------------------------------------------------------------- backward (docs/mathematics.md, section 4)

// dx = J_phi^T (W Z u~), the part of dQ that comes from far keys.
template <Side SIDE>
inline void far_gradient(const Problem& p, Work& w, Row row, long chunk, const KeyState<SIDE>& keys) {
  const long first = chunk_first(chunk), last = chunk_last(chunk, p.queries);
  std::fill_n(w.dx, D * CHUNK, real(0));
  long from = first, to = last;
  far_queries<SIDE>(p, row.b, edge_of<SIDE>(p, chunk), from, to);
  if (keys.empty || from >= to) return;
  features(w.phi);
  const Cotangent far = far_cotangent(w, from - first, to - first);
  transpose<DV, VALUES>(far.rows, w.transposed);
  keys.state.upstream(w.transposed, far.delta, w.dphi);
  if constexpr (FORGET) {
    real* of_queries = w.pairs.decay.of_queries;
    for (int t = 0; t < CHUNK; t += LANES) {
      vector sum{};
      for (long f = 0; f < RANK; ++f) sum += at(w.phi + f * CHUNK + t) * at(w.dphi + f * CHUNK + t);
      at(of_queries + t) = sum;
    }
    add_sums(p, row, of_queries + (from - first), from, static_cast<int>(to - from));
  }
  pull(w.phi, w.dphi, w.dx);
  if constexpr (DOCUMENTS)
    for (int t = 0; t < CHUNK; ++t)  // where 0 met a state that overflowed
      if (t < from - first || t >= to - first)
        for (int i = 0; i < D; ++i) w.dx[i * CHUNK + t] = 0;
}

// dQ of a chunk's window, and of what is in w.dx already, written; dK and dV of the window, added.
inline void finish_queries(const Problem& p, Work& w, Row row, long segment, long g, long chunk, const Halo& halo) {
  const long first = chunk_first(chunk), last = chunk_last(chunk, p.queries), head = row.h * p.groups + g;
  const int count = static_cast<int>(last - first);
  if constexpr (SEPARATE) std::fill_n(w.near_dx, NEAR_D * CHUNK, real(0));
  if constexpr (!TOTAL && !FUSED) local_gradients(p, w, row, segment, first, last, halo);
  put_transposed<D, Put::store>(w.dx, p.dq.rows(row.b, head), first, count);
  if constexpr (SEPARATE) put_transposed<NEAR_D>(w.near_dx, p.dnear_q.rows(row.b, head), first, count);
}

// Of the queries: what far keys before their window give, and the window.
inline void query_gradients_left(const Problem& p, const Pool& pool, const Shared& shared, const Halo& halo) {
  query_sweep<Side::LEFT>(p, pool, shared, [&](Work& w, Row row, long segment, long chunk, const KeyState<Side::LEFT>& keys) {
    const long first = chunk_first(chunk);
    const int count = static_cast<int>(chunk_last(chunk, p.queries) - first);
    for (long g = 0; g < p.groups; ++g) {
      w.load_queries(p, row.b, row.h, g, first, count);
      w.load_cotangent<true>(p, row.b, row.h, g, first, count);
      far_gradient(p, w, row, chunk, keys);
      finish_queries(p, w, row, segment, g, chunk, halo);
    }
  });
}

// Of the queries: what far keys after their window give, added.
inline void query_gradients_right(const Problem& p, const Pool& pool, const Shared& shared) {
  query_sweep<Side::RIGHT>(p, pool, shared, [&](Work& w, Row row, long, long chunk, const KeyState<Side::RIGHT>& keys) {
    const long first = chunk_first(chunk);
    const int count = static_cast<int>(chunk_last(chunk, p.queries) - first);
    for (long g = 0; g < p.groups; ++g) {
      w.load_queries(p, row.b, row.h, g, first, count);
      w.load_cotangent<false>(p, row.b, row.h, g, first, count);
      far_gradient(p, w, row, chunk, keys);
      put_transposed<D>(w.dx, p.dq.rows(row.b, row.h * p.groups + g), first, count);
    }
  });
}

// Softmax within a window: nothing but the window.
inline void backward_banded(const Problem& p, const Pool& pool, const Halo& halo) {
  each_segment(p, pool, [&](Work& w, real*, Row row, long segment) {
    for (long chunk = segment_start(p, segment); chunk < segment_start(p, segment + 1); ++chunk) {
      const long first = chunk_first(chunk);
      const int count = static_cast<int>(chunk_last(chunk, p.queries) - first);
      for (long g = 0; g < p.groups; ++g) {
        w.load_queries(p, row.b, row.h, g, first, count);
        w.load_cotangent<true>(p, row.b, row.h, g, first, count);
        std::fill_n(w.dx, D * CHUNK, real(0));
        finish_queries(p, w, row, segment, g, chunk, halo);
      }
    }
  });
}

// A value that the mask hides has no gradient.
inline void clear_hidden(const Problem& p) {
  for (long row = 0; row < p.batch * p.heads; ++row)
    for (long key = 0; key < p.keys; ++key)
      if (!p.mask[row / p.heads * p.keys + key]) std::fill_n(p.dv.rows(row / p.heads, row % p.heads)[key], DV, real(0));
}

template <bool STATELESS = BANDED, bool BOTH = TWO_SIDED>
inline void backward(const Problem& p) {
  const Pool pool(p);
  if constexpr (!FUSED) {
    clear(p.dk, p.batch, p.heads, p.keys, D, p.threads);
    clear(p.dv, p.batch, p.heads, p.keys, DV, p.threads);
  }
  if constexpr (FORGET) std::fill_n(p.dlog_decay, p.batch * p.heads * p.keys, 0.0);
  if constexpr (SEPARATE) {
    clear(p.dnear_q, p.batch, p.heads * p.groups, p.queries, NEAR_D, p.threads);
    clear(p.dnear_k, p.batch, p.heads, p.keys, NEAR_D, p.threads);
  }
  const Memory beside(Halo::size(p));
  const Halo halo{Halo::size(p) == 0 ? nullptr : beside.start};
  if (halo.memory != nullptr) std::fill_n(halo.memory, Halo::size(p), real(0));
  if constexpr (STATELESS) {
    backward_banded(p, pool, halo);
  } else {
    const Shared shared(p);
    query_gradients_left(p, pool, shared, halo);
    key_sweep<Side::LEFT>(p, pool, shared);
    if constexpr (BOTH) {
      query_gradients_right(p, pool, shared);
      key_sweep<Side::RIGHT>(p, pool, shared);
    }
  }
  halo.add(p);
  if constexpr (PADDING) clear_hidden(p);
}
