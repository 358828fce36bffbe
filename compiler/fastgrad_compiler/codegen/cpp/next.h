// ---------------------------------------------------------------- one token of each sequence

// What is kept of the tokens before; null where the specification has none.
struct Kept {
  input *k, *v, *near_k;
  double* log_gate;
  bool* seen;
  std::int64_t *run, *document, *summed;
  double* sums;
};

// The attention out [batch, heads * groups, DV] of tokens that are contiguous, and as they are kept.
inline void next(long batch, long heads, long groups, long past, long threads, const real* q, const real* k, const real* v,
                 const real* near_q, const real* near_k, const real* log_gate, const bool* mask, const std::int64_t* run,
                 const Kept& kept, real* out) {
  const auto token = [](auto* x, long heads, long width) {
    return Heads<std::remove_reference_t<decltype(*x)>>{x, heads * width, width, width};
  };
  const auto ring = [=](input* x, long width) { return Heads<input>{x, heads * RING * width, RING * width, width}; };
  std::vector<double> gates;
  if constexpr (FORGET) gates.assign(log_gate, log_gate + batch * heads);
  const long keys = batch * heads, queries = keys * groups;
  const Stored own_q(q, queries * D), own_k(k, keys * D), own_v(v, keys * DV);
  const Stored own_near_q(near_q, queries * NEAR_D), own_near_k(near_k, keys * NEAR_D);
  Next<input> s{};
  s.batch = batch, s.heads = heads, s.groups = groups, s.tokens = 1, s.past = past, s.threads = threads;
  s.q = token(own_q.data, heads * groups, D), s.k = token(own_k.data, heads, D), s.v = token(own_v.data, heads, DV);
  s.ring_k = ring(kept.k, D), s.ring_v = ring(kept.v, DV);
  if constexpr (SEPARATE) {
    s.near_q = token(own_near_q.data, heads * groups, NEAR_D), s.near_k = token(own_near_k.data, heads, NEAR_D);
    s.ring_near_k = ring(kept.near_k, NEAR_D);
  }
  s.mask = mask, s.runs = run, s.ring_seen = kept.seen, s.ring_run = kept.run, s.document = kept.document;
  s.log_gate = gates.data(), s.ring_gates = kept.log_gate, s.summed = kept.summed, s.sums = kept.sums;
#if FASTGRAD_VARIANT == 2
  std::vector<input> found(queries * DV);
  s.out = token(found.data(), heads * groups, DV);
  step(s);
  for (long i = 0; i < queries * DV; ++i) out[i] = number(found[i]);
#else
  s.out = token(out, heads * groups, DV);
  step(s);
#endif
}
