// ---------------------------------------------------------------- one token of each sequence

// What is kept of the tokens before; null where the specification has none.
struct Kept {
  real *k, *v, *near_k;
  double* log_gate;
  bool* seen;
  std::int64_t *run, *document, *summed;
  double* sums;
};

// The attention out [batch, heads * groups, DV] of tokens that are contiguous, and as they are kept.
inline void next(long batch, long heads, long groups, long past, long threads, const real* q, const real* k, const real* v,
                 const real* near_q, const real* near_k, const real* log_gate, const bool* mask, const std::int64_t* run,
                 const Kept& kept, real* out) {
  const auto token = [](auto* x, long heads, long width) { return Heads<std::remove_reference_t<decltype(*x)>>{x, heads * width, width, width}; };
  const auto ring = [=](real* x, long width) { return Heads<real>{x, heads * RING * width, RING * width, width}; };
  std::vector<double> gates;
  if constexpr (FORGET) gates.assign(log_gate, log_gate + batch * heads);
  Next<real> s{};
  s.batch = batch, s.heads = heads, s.groups = groups, s.tokens = 1, s.past = past, s.threads = threads;
  s.q = token(q, heads * groups, D), s.k = token(k, heads, D), s.v = token(v, heads, DV);
  s.ring_k = ring(kept.k, D), s.ring_v = ring(kept.v, DV);
  if constexpr (SEPARATE) {
    s.near_q = token(near_q, heads * groups, NEAR_D), s.near_k = token(near_k, heads, NEAR_D);
    s.ring_near_k = ring(kept.near_k, NEAR_D);
  }
  s.mask = mask, s.runs = run, s.ring_seen = kept.seen, s.ring_run = kept.run, s.document = kept.document;
  s.log_gate = gates.data(), s.ring_gates = kept.log_gate, s.summed = kept.summed, s.sums = kept.sums;
  s.out = token(out, heads * groups, DV);
  step(s);
}
