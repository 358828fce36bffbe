// ---------------------------------------------------------------- backward (docs/mathematics.md, section 4)

{% if not banded %}
// dx = J_phi^T (W Z u~), the part of dQ that comes from far keys.
template <Side SIDE>
inline void far_gradient(const Problem& p, Work& w, Row row, long chunk, const KeyState<SIDE>& keys) {
  const long first = chunk_first(chunk), last = chunk_last(chunk, p.queries);
  std::fill_n(w.dx, D * CHUNK, real(0));
  long from = first, to = last;
  far_queries<SIDE>(p, row.b, edge_of<SIDE>(p, chunk), from, to);
  if (keys.empty || from >= to) return;
  features(w.phi);
{% if exponential or documents %}
  far_cotangent(w, from - first, to - first);
  transpose<DV, VALUES>(w.far, w.transposed);
  keys.state.upstream(w.transposed, w.far_delta, w.dphi);
{% else %}
  transpose<DV, VALUES>(w.cotangent, w.transposed);
  keys.state.upstream(w.transposed, w.delta, w.dphi);
{% endif %}
  pull(w.phi, w.dphi, w.dx);
{% if documents %}
  for (int t = 0; t < CHUNK; ++t)  // where 0 met a state that overflowed
    if (t < from - first || t >= to - first)
      for (int i = 0; i < D; ++i) w.dx[i * CHUNK + t] = 0;
{% endif %}
}

{% endif %}
inline void backward(const Problem& p) {
  const Pool pool(p, {{ 0 if banded else 1 }});
{% if not fused %}
  clear(p.dk, p.batch, p.heads, p.keys, D, p.threads);
  clear(p.dv, p.batch, p.heads, p.keys, DV, p.threads);
{% endif %}
{% if separate %}
  clear(p.dnear_q, p.batch, p.heads * p.groups, p.queries, NEAR_D, p.threads);
  clear(p.dnear_k, p.batch, p.heads, p.keys, NEAR_D, p.threads);
{% endif %}
{% if halo %}
  const Memory beside(p.segments == 1 ? 0 : p.batch * p.heads * p.segments * 2 * HALO * HALO_WIDTH);
  const Halo halo{p.segments == 1 ? nullptr : beside.start};
  if (halo.memory != nullptr)
    std::fill_n(halo.memory, p.batch * p.heads * p.segments * 2 * HALO * HALO_WIDTH, real(0));
{% endif %}
{% if not banded %}
  const Shared shared(p);
{% endif %}
{% if banded %}
  each_segment(p, pool, [&](Work& w, real*, Row row, long segment) {
    for (long chunk = segment_start(p, segment); chunk < segment_start(p, segment + 1); ++chunk) {
{% else %}
  query_sweep<Side::LEFT>(p, pool, shared.memory, [&](Work& w, Row row, long segment, long chunk, const KeyState<Side::LEFT>& keys) {
    {
{% endif %}
      const long first = chunk_first(chunk), last = chunk_last(chunk, p.queries);
      const int count = static_cast<int>(last - first);
      for (long g = 0; g < p.groups; ++g) {
        w.load_queries(p, row.b, row.h, g, first, count);
        w.load_cotangent(p, row.b, row.h, g, first, count);
{% if banded %}
        std::fill_n(w.dx, D * CHUNK, real(0));
{% else %}
        far_gradient(p, w, row, chunk, keys);
{% endif %}
{% if separate %}
        std::fill_n(w.near_dx, NEAR_D * CHUNK, real(0));
{% endif %}
{% if dense and not fused %}
        local_gradients(p, w, row, segment, first, last{{ ", halo" if halo }});
{% endif %}
        clear_rows(p.dq.rows(row.b, row.h * p.groups + g), first, last, D, w.ahead);
        add_transposed<D>(w.dx, p.dq.rows(row.b, row.h * p.groups + g), first, count);
{% if separate %}
        add_transposed<NEAR_D>(w.near_dx, p.dnear_q.rows(row.b, row.h * p.groups + g), first, count);
{% endif %}
      }
    }
  });
{% if not banded %}
  key_sweep<Side::LEFT>(p, pool, shared.memory);
{% endif %}
{% if two_sided %}
  query_sweep<Side::RIGHT>(p, pool, shared.memory, [&](Work& w, Row row, long, long chunk, const KeyState<Side::RIGHT>& keys) {
    const long first = chunk_first(chunk);
    const int count = static_cast<int>(chunk_last(chunk, p.queries) - first);
    for (long g = 0; g < p.groups; ++g) {
      w.load_queries(p, row.b, row.h, g, first, count);
      w.load_cotangent(p, row.b, row.h, g, first, count);
      far_gradient(p, w, row, chunk, keys);
      add_transposed<D>(w.dx, p.dq.rows(row.b, row.h * p.groups + g), first, count);
    }
  });
  key_sweep<Side::RIGHT>(p, pool, shared.memory);
{% endif %}
{% if halo %}
  halo.add(p);
{% endif %}
{% if padding %}
  for (long row = 0; row < p.batch * p.heads; ++row)
    for (long key = 0; key < p.keys; ++key)
      if (!p.mask[row / p.heads * p.keys + key]) std::fill_n(p.dv.rows(row / p.heads, row % p.heads)[key], DV, real(0));
{% endif %}
}
