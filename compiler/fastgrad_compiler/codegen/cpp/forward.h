// ---------------------------------------------------------------- forward

{% if not banded %}
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
{% if documents %}
  for (long t = 0; t < CHUNK; ++t)
    if (t < from - first || t >= to - first) {
      std::fill_n(w.rows + t * VALUES, VALUES, real(0));
      w.column[t] = 0;
    }
{% endif %}
}

{% endif %}
{% if dense %}
inline void local_part(const Problem& p, Work& w, Row row, long segment, long first, long last) {
  const Reach reach(p, row.b, first, last, window_low(first, p.keys), window_high(last, p.keys));
  each_key_range(p, segment, first, last, [&](long start, long stop) {
    if (reach.none(start, stop)) return;
    w.pairs.load(p, row.b, row.h, start, stop, first, w.x{{ ", w.near_x" if separate }});
    add_pairs(w.pairs, reach, static_cast<int>(last - first), w.rows, w.column{{ ", w.level" if exponential }});
  });
}

{% endif %}
inline void store_chunk(const Problem& p, Work& w, Row row, long g, long first, int count) {
  const long head = row.h * p.groups + g, saved = p.saved(row.b, row.h, g) + first;
  const Rows<input> out = p.out.rows(row.b, head);
  for (int t = 0; t < count; ++t) {
    for (int i = 0; i < DV; i += 64 / sizeof(input)) __builtin_prefetch(out[first + t + w.ahead] + i, 1, 2);
    const real inverse = w.column[t] == 0 ? 0 : 1 / w.column[t];
    for (int i = 0; i < DV; ++i) put(w.rows[t * VALUES + i] * inverse, out[first + t][i]);
    p.denominator[saved + t] = w.column[t];
{% if exponential %}
    p.maximum[saved + t] = w.level[t] == NOTHING ? 0 : w.level[t];
{% endif %}
  }
}

inline void finish_chunk(const Problem& p, Work& w, Row row, long segment, long g, long chunk) {
  const long first = chunk_first(chunk), last = chunk_last(chunk, p.queries);
{% if exponential %}
  for (int t = 0; t < CHUNK; ++t) w.level[t] = w.column[t] == 0 ? NOTHING : 0;
{% endif %}
{% if dense %}
  local_part(p, w, row, segment, first, last);
{% endif %}
  store_chunk(p, w, row, g, first, static_cast<int>(last - first));
}

inline void forward(const Problem& p) {
  const Pool pool(p, {{ 0 if banded else 1 }});
{% if banded %}
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
{% else %}
  const Shared shared(p);
{% if two_sided %}
  // The far keys after each window go before: N waits in `partial`, D in denominator.
  const Memory partial(p.batch * p.heads * p.groups * p.queries * {{ "DV" }});
  query_sweep<Side::RIGHT>(p, pool, shared.memory, [&](Work& w, Row row, long, long chunk, const KeyState<Side::RIGHT>& keys) {
    const long first = chunk_first(chunk);
    const int count = static_cast<int>(chunk_last(chunk, p.queries) - first);
    for (long g = 0; g < p.groups; ++g) {
      w.load_queries(p, row.b, row.h, g, first, count);
      far_part(p, w, row, chunk, keys);
      const long saved = p.saved(row.b, row.h, g) + first;
      for (int t = 0; t < count; ++t) {
        std::copy_n(w.rows + t * VALUES, DV, partial.start + (saved + t) * DV);
        p.denominator[saved + t] = w.column[t];
      }
    }
  });
{% endif %}
  query_sweep<Side::LEFT>(p, pool, shared.memory, [&](Work& w, Row row, long segment, long chunk, const KeyState<Side::LEFT>& keys) {
    const long first = chunk_first(chunk);
    const int count = static_cast<int>(chunk_last(chunk, p.queries) - first);
    for (long g = 0; g < p.groups; ++g) {
      w.load_queries(p, row.b, row.h, g, first, count);
      far_part(p, w, row, chunk, keys);
{% if two_sided %}
      const long saved = p.saved(row.b, row.h, g) + first;
      for (int t = 0; t < count; ++t) {
        for (int i = 0; i < DV; ++i) w.rows[t * VALUES + i] += partial.start[(saved + t) * DV + i];
        w.column[t] += p.denominator[saved + t];
      }
{% endif %}
      finish_chunk(p, w, row, segment, g, chunk);
    }
  });
{% endif %}
}
