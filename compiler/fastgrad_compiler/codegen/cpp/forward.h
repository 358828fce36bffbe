// ---------------------------------------------------------------- forward

// The part of N and D of a chunk, in w.rows and w.column, that comes from the far keys of a state.
template <Side SIDE>
inline void far_part(const Problem& p, Work& w, Row row, long chunk, const KeyState<SIDE>& keys) {
  const long first = chunk_first(chunk), last = chunk_last(chunk, p.queries);
  std::fill_n(w.rows, CHUNK * VALUES, real(0));
  std::fill_n(w.column, CHUNK, real(0));
  long from = first, to = last;
  far_queries<SIDE>(p, row.b, edge_of<SIDE>(p, chunk), from, to);
  if (keys.empty || from >= to) return;
  features(w.phi);
  keys.state.read(w.phi, w.rows, w.column, static_cast<int>(last - first));
  if constexpr (FORGET)
    for (int t = 0; t < last - first; ++t) {
      for (int i = 0; i < VALUES; i += LANES) at(w.rows + t * VALUES + i) *= w.pairs.decay.factors[t];
      w.column[t] *= w.pairs.decay.factors[t];
    }
  if constexpr (DOCUMENTS)
    for (long t = 0; t < CHUNK; ++t)
      if (t < from - first || t >= to - first) {
        std::fill_n(w.rows + t * VALUES, VALUES, real(0));
        w.column[t] = 0;
      }
}

// The part that comes from the keys of the window, one by one.
inline void local_part(const Problem& p, Work& w, Row row, long segment, long first, long last) {
  const Reach reach(p, row.b, first, last, window_low(first, p.keys), window_high(last, p.keys));
  each_key_range(p, segment, first, last, [&](long start, long stop) {
    if (reach.none(start, stop)) return;
    w.pairs.load(p, row.b, row.h, start, stop, first, w.x, w.near_x);
    add_pairs(w.pairs, reach, static_cast<int>(last - first), w.rows, w.column, w.level);
  });
}

inline void store_chunk(const Problem& p, Work& w, Row row, long g, long first, int count) {
  const long head = row.h * p.groups + g, saved = p.saved(row.b, row.h, g) + first;
  const Rows<input> out = p.out.rows(row.b, head);
  for (int t = 0; t < count; ++t) {
    for (int i = 0; i < DV; i += 64 / sizeof(input)) __builtin_prefetch(out[first + t + w.ahead] + i, 1, 2);
    const real inverse = w.column[t] == 0 ? 0 : 1 / w.column[t];
    for (int i = 0; i < DV; ++i) put(w.rows[t * VALUES + i] * inverse, out[first + t][i]);
    p.denominator[saved + t] = w.column[t];
    if constexpr (EXPONENTIAL) p.maximum[saved + t] = w.level[t] == NOTHING ? 0 : w.level[t];
  }
}

// Adds the window's part to the far part of a chunk, and writes both.
inline void finish_chunk(const Problem& p, Work& w, Row row, long segment, long g, long chunk) {
  const long first = chunk_first(chunk), last = chunk_last(chunk, p.queries);
  if constexpr (EXPONENTIAL)
    for (int t = 0; t < CHUNK; ++t) w.level[t] = w.column[t] == 0 ? NOTHING : 0;
  if constexpr (!TOTAL) local_part(p, w, row, segment, first, last);
  store_chunk(p, w, row, g, first, static_cast<int>(last - first));
}

// N and D of the far keys after each window: N in `partial`, D in the denominator.
inline void forward_right(const Problem& p, const Pool& pool, const Shared& shared, real* partial) {
  query_sweep<Side::RIGHT>(p, pool, shared, [&](Work& w, Row row, long, long chunk, const KeyState<Side::RIGHT>& keys) {
    const long first = chunk_first(chunk);
    const int count = static_cast<int>(chunk_last(chunk, p.queries) - first);
    for (long g = 0; g < p.groups; ++g) {
      w.load_queries(p, row.b, row.h, g, first, count);
      far_part(p, w, row, chunk, keys);
      const long saved = p.saved(row.b, row.h, g) + first;
      for (int t = 0; t < count; ++t) {
        std::copy_n(w.rows + t * VALUES, DV, partial + (saved + t) * DV);
        p.denominator[saved + t] = w.column[t];
      }
    }
  });
}

// The far keys before each window, those after it where they are (TWO_SIDED), and the window.
inline void forward_left(const Problem& p, const Pool& pool, const Shared& shared, const real* partial) {
  query_sweep<Side::LEFT>(p, pool, shared, [&](Work& w, Row row, long segment, long chunk, const KeyState<Side::LEFT>& keys) {
    const long first = chunk_first(chunk);
    const int count = static_cast<int>(chunk_last(chunk, p.queries) - first);
    for (long g = 0; g < p.groups; ++g) {
      w.load_queries(p, row.b, row.h, g, first, count);
      far_part(p, w, row, chunk, keys);
      if constexpr (TWO_SIDED) {
        const long saved = p.saved(row.b, row.h, g) + first;
        for (int t = 0; t < count; ++t) {
          for (int i = 0; i < DV; ++i) w.rows[t * VALUES + i] += partial[(saved + t) * DV + i];
          w.column[t] += p.denominator[saved + t];
        }
      }
      finish_chunk(p, w, row, segment, g, chunk);
    }
  });
}

// Softmax within a window: nothing but the window.
inline void forward_banded(const Problem& p, const Pool& pool) {
  each_segment(p, pool, [&](Work& w, real*, Row row, long segment) {
    for (long chunk = segment_start(p, segment); chunk < segment_start(p, segment + 1); ++chunk)
      for (long g = 0; g < p.groups; ++g) {
        const long first = chunk_first(chunk);
        w.load_queries(p, row.b, row.h, g, first, static_cast<int>(chunk_last(chunk, p.queries) - first));
        std::fill_n(w.rows, CHUNK * VALUES, real(0));
        std::fill_n(w.column, CHUNK, real(0));
        finish_chunk(p, w, row, segment, g, chunk);
      }
  });
}

template <bool STATELESS = BANDED, bool BOTH = TWO_SIDED>
inline void forward(const Problem& p) {
  const Pool pool(p);
  if constexpr (STATELESS) {
    forward_banded(p, pool);
  } else {
    const Shared shared(p);
    const Memory partial(BOTH ? p.batch * p.heads * p.groups * p.queries * DV : 0);
    if constexpr (BOTH) forward_right(p, pool, shared, partial.start);
    forward_left(p, pool, shared, partial.start);
  }
}
