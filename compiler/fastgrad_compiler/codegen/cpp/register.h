// ---------------------------------------------------------------- operations

using torch::stable::Tensor;

template <typename Element>
inline Heads<Element> heads(const Tensor& x) {
  return {reinterpret_cast<Element*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

using Optional = std::optional<Tensor>;

// Asks for large pages for the memory of a tensor that is about to be written for the first time, where the system has
// them: its pages come one by one, each with a fault, and at 4 KB these are a fifth of the time.
inline void want_large_pages([[maybe_unused]] const Tensor& x, [[maybe_unused]] std::size_t element) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t PAGE = 1 << 21;
  const auto start = reinterpret_cast<std::uintptr_t>(x.data_ptr());
  const std::uintptr_t from = (start + PAGE - 1) / PAGE * PAGE, to = (start + x.numel() * element) / PAGE * PAGE;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // if refused, nothing changes
#endif
}

inline Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& near_q, const Optional& near_k,
                       const Optional& log_decay, const Optional& mask, const Optional& documents,
                       const Tensor& denominator, const Tensor& maximum, std::int64_t threads) {
  Problem p{};
  p.batch = k.size(0);
  p.heads = k.size(1);
  p.groups = q.size(1) / p.heads;
  p.queries = q.size(2);
  p.keys = k.size(2);
  p.q = heads<const input>(q);
  p.k = heads<const input>(k);
  p.v = heads<const input>(v);
  if (SEPARATE) p.near_q = heads<const input>(*near_q), p.near_k = heads<const input>(*near_k);
  if (FORGET) p.log_decay = static_cast<const double*>(log_decay->data_ptr());
  if (PADDING) p.mask = static_cast<const bool*>(mask->data_ptr());
  if (DOCUMENTS) p.documents = static_cast<const std::int64_t*>(documents->data_ptr());
  p.denominator = static_cast<real*>(denominator.data_ptr());
  p.maximum = static_cast<real*>(maximum.data_ptr());
  p.threads = std::max<std::int64_t>(1, threads);
  // Fewer rows than threads: each row is cut into segments, of four chunks at least; but not where every key is in the
  // window, since each segment keeps the gradients of keys within the window beside it.
  const long rows = p.batch * p.heads;
  const long wanted = (p.threads + rows - 1) / rows;
  p.segments = rows >= p.threads || WINDOW >= EVERY_TOKEN ? 1 : std::min(wanted, std::max(1L, chunk_count(p.queries) / 4));
  return p;
}

void attention_forward(const Tensor q, const Tensor k, const Tensor v, const Optional near_q, const Optional near_k,
                       const Optional log_decay, const Optional mask, const Optional documents, Tensor out,
                       Tensor denominator, Tensor maximum, std::int64_t threads) {
  Problem p = problem(q, k, v, near_q, near_k, log_decay, mask, documents, denominator, maximum, threads);
  p.out = heads<input>(out);
  want_large_pages(out, sizeof(input));
  forward(p);
}

void attention_backward(const Tensor gradient, const Tensor q, const Tensor k, const Tensor v, const Optional near_q,
                        const Optional near_k, const Optional log_decay, const Optional mask,
                        const Optional documents, const Tensor out, const Tensor denominator, const Tensor maximum,
                        Tensor dq, Tensor dk, Tensor dv, Optional dnear_q, Optional dnear_k, Optional dlog_decay,
                        std::int64_t threads) {
  Problem p = problem(q, k, v, near_q, near_k, log_decay, mask, documents, denominator, maximum, threads);
  p.gradient = heads<const input>(gradient);
  p.out = heads<input>(out);
  for (const Tensor& x : {dq, dk, dv}) want_large_pages(x, sizeof(real));
  p.dq = heads<real>(dq);
  p.dk = heads<real>(dk);
  p.dv = heads<real>(dv);
  if (SEPARATE) p.dnear_q = heads<real>(*dnear_q), p.dnear_k = heads<real>(*dnear_k);
  if (FORGET) p.dlog_decay = static_cast<double*>(dlog_decay->data_ptr());
  const Memory deltas(p.batch * p.heads * p.groups * p.queries);
  p.deltas = deltas.start;
  backward(p);
}

// x as [batch, heads, tokens, width], dense in its last dimension.
template <typename Element>
inline Heads<Element> heads(const Tensor& x, long batch, long heads, long tokens, long width) {
  const bool fits = x.dim() == 4 && x.size(0) == batch && x.size(1) == heads && x.size(2) == tokens && x.size(3) == width;
  STD_TORCH_CHECK(fits, "the tokens of a step do not fit each other, what is kept, or the kernel");
  return attention::heads<Element>(x);
}

// x of `numbers` entries, contiguous.
template <typename Element>
inline Element* entries(const Tensor& x, long numbers) {
  STD_TORCH_CHECK(x.numel() == numbers && x.is_contiguous(), "what is kept of earlier tokens does not fit a step");
  return static_cast<Element*>(x.data_ptr());
}

template <typename Element>
inline void step_as(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& near_q, const Optional& near_k,
                    const Optional& log_gate, const Optional& mask, const Optional& runs, const Tensor& ring_k,
                    const Tensor& ring_v, const Optional& ring_near_k, const Optional& ring_gates,
                    const Optional& ring_seen, const Optional& ring_run, const Optional& document, const Optional& summed,
                    const Tensor& sums, const Tensor& out, std::int64_t past, std::int64_t threads) {
  Next<Element> s{};
  s.batch = k.size(0);
  s.heads = k.size(1);
  s.groups = s.heads == 0 ? 0 : q.size(1) / s.heads;
  s.tokens = k.size(2);
  s.past = past;
  const long b = s.batch, h = s.heads, query_heads = q.size(1), t = s.tokens;
  s.q = heads<const Element>(q, b, query_heads, t, D);
  s.k = heads<const Element>(k, b, h, t, D);
  s.v = heads<const Element>(v, b, h, t, DV);
  s.ring_k = heads<Element>(ring_k, b, h, RING, D);
  s.ring_v = heads<Element>(ring_v, b, h, RING, DV);
  if (SEPARATE) {
    s.near_q = heads<const Element>(near_q.value(), b, query_heads, t, NEAR_D);
    s.near_k = heads<const Element>(near_k.value(), b, h, t, NEAR_D);
    s.ring_near_k = heads<Element>(ring_near_k.value(), b, h, RING, NEAR_D);
  }
  if (FORGET) {
    s.log_gate = entries<const double>(log_gate.value(), b * h * t);
    s.ring_gates = entries<double>(ring_gates.value(), b * h * RING);
  }
  if (PADDING) {
    s.mask = entries<const bool>(mask.value(), b * t);
    s.ring_seen = entries<bool>(ring_seen.value(), b * RING);
  }
  if (DOCUMENTS) {
    s.runs = entries<const std::int64_t>(runs.value(), b * t);
    s.ring_run = entries<std::int64_t>(ring_run.value(), b * RING);
    s.document = entries<std::int64_t>(document.value(), b);
  }
  if (NEAR > 0) s.summed = entries<std::int64_t>(summed.value(), 1);
  s.sums = entries<double>(sums, b * h * RANK * SUM_COLUMNS);
  s.out = heads<Element>(out);
  s.threads = std::max<std::int64_t>(1, threads);
  step(s);
}

void attention_step(const Tensor q, const Tensor k, const Tensor v, const Optional near_q, const Optional near_k,
                    const Optional log_gate, const Optional mask, const Optional runs, Tensor ring_k, Tensor ring_v,
                    Optional ring_near_k, Optional ring_gates, Optional ring_seen, Optional ring_run, Optional document,
                    Optional summed, Tensor sums, Tensor out, std::int64_t past, std::int64_t threads) {
  const auto run = [&](auto element) {
    step_as<decltype(element)>(q, k, v, near_q, near_k, log_gate, mask, runs, ring_k, ring_v, ring_near_k, ring_gates,
                               ring_seen, ring_run, document, summed, sums, out, past, threads);
  };
#if FASTGRAD_VARIANT == 1
  if (k.scalar_type() == torch::headeronly::ScalarType::Float) return run(float{});
#endif
  run(input{});
}

void attention_absorb(const Tensor k, const Tensor v, const Optional factor, const Optional there, Tensor sums,
                      std::int64_t threads) {
  Absorbed a{};
  a.batch = k.size(0);
  a.heads = k.size(1);
  a.keys = k.size(2);
  a.k = heads<const input>(k, a.batch, a.heads, a.keys, D);
  a.v = heads<const input>(v, a.batch, a.heads, a.keys, DV);
  if (factor) a.factor = entries<const double>(*factor, a.batch * a.heads * a.keys);
  if (there) a.there = entries<const bool>(*there, a.batch * a.keys);
  a.sums = entries<double>(sums, a.batch * a.heads * RANK * SUM_COLUMNS);
  a.threads = std::max<std::int64_t>(1, threads);
  absorb(a);
}

// What the operations on a piece share: x are its queries, or its keys.
inline Piece piece(const Tensor& x, const Tensor& sums, std::int64_t threads) {
  Piece p{};
  p.batch = sums.size(0);
  p.heads = sums.size(1);
  p.groups = p.heads == 0 ? 0 : x.size(1) / p.heads;
  p.tokens = x.size(2);
  p.x = heads<const input>(x, p.batch, p.heads * p.groups, p.tokens, D);
  p.sums = entries<const double>(sums, p.batch * p.heads * RANK * SUM_COLUMNS);
  p.threads = std::max<std::int64_t>(1, threads);
  return p;
}

void attention_read(const Tensor q, const Tensor sums, Tensor found, std::int64_t threads) {
  Piece p = piece(q, sums, threads);
  p.found = entries<real>(found, p.batch * p.heads * p.groups * p.tokens * SUM_COLUMNS);
  read_earlier(p);
}

void attention_read_backward(const Tensor gradient, const Tensor q, const Tensor sums, Tensor dq, Tensor dsums,
                             std::int64_t threads) {
  Piece p = piece(q, sums, threads);
  p.gradient = entries<const real>(gradient, p.batch * p.heads * p.groups * p.tokens * SUM_COLUMNS);
  p.dx = heads<real>(dq, p.batch, p.heads * p.groups, p.tokens, D);
  p.dsums = entries<double>(dsums, p.batch * p.heads * RANK * SUM_COLUMNS);
  read_backward(p);
}

void attention_absorb_backward(const Tensor dsums, const Tensor k, const Tensor v, const Optional factor,
                               const Optional there, Tensor dk, Tensor dv, Optional dfactor, std::int64_t threads) {
  Piece p = piece(k, dsums, threads);
  p.v = heads<const input>(v, p.batch, p.heads, p.tokens, DV);
  if (factor) p.factor = entries<const double>(*factor, p.batch * p.heads * p.tokens);
  if (there) p.there = entries<const bool>(*there, p.batch * p.tokens);
  p.dx = heads<real>(dk, p.batch, p.heads, p.tokens, D);
  p.dv = heads<real>(dv, p.batch, p.heads, p.tokens, DV);
  if (dfactor) p.dfactor = entries<double>(*dfactor, p.batch * p.heads * p.tokens);
  absorb_backward(p);
}

}  // namespace
}  // namespace attention

#define FASTGRAD_TEXT_OF(name) #name
#define FASTGRAD_TEXT(name) FASTGRAD_TEXT_OF(name)
#define FASTGRAD_INPUTS \
  "Tensor q, Tensor k, Tensor v, Tensor? near_q, Tensor? near_k, Tensor? log_decay, Tensor? mask, " \
  "Tensor? documents"

STABLE_TORCH_LIBRARY_FRAGMENT(fastgrad, library) {
  library.def(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_forward(" FASTGRAD_INPUTS
              ", Tensor(a!) out, Tensor(b!) denominator, Tensor(c!) maximum, int threads) -> ()");
  library.def(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_backward(Tensor gradient, " FASTGRAD_INPUTS
              ", Tensor out, Tensor denominator, Tensor maximum, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv"
              ", Tensor(d!)? dnear_q, Tensor(e!)? dnear_k, Tensor(f!)? dlog_decay, int threads) -> ()");
  if constexpr (attention::STEPS) {
    library.def(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_step(Tensor q, Tensor k, Tensor v, Tensor? near_q, Tensor? near_k"
                ", Tensor? log_gate, Tensor? mask, Tensor? runs, Tensor(a!) ring_k, Tensor(b!) ring_v"
                ", Tensor(c!)? ring_near_k, Tensor(d!)? ring_gates, Tensor(e!)? ring_seen, Tensor(f!)? ring_run"
                ", Tensor(g!)? document, Tensor(h!)? summed, Tensor(i!) sums, Tensor(j!) out, int past, int threads) -> ()");
    library.def(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_absorb(Tensor k, Tensor v, Tensor? factor, Tensor? there"
                ", Tensor(a!) sums, int threads) -> ()");
    library.def(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_read(Tensor q, Tensor sums, Tensor(a!) found, int threads) -> ()");
    library.def(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_read_backward(Tensor gradient, Tensor q, Tensor sums"
                ", Tensor(a!) dq, Tensor(b!) dsums, int threads) -> ()");
    library.def(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_absorb_backward(Tensor dsums, Tensor k, Tensor v, Tensor? factor"
                ", Tensor? there, Tensor(a!) dk, Tensor(b!) dv, Tensor(c!)? dfactor, int threads) -> ()");
  }
}

STABLE_TORCH_LIBRARY_IMPL(fastgrad, CPU, library) {
  library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_forward", TORCH_BOX(&attention::attention_forward));
  library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_backward", TORCH_BOX(&attention::attention_backward));
  if constexpr (attention::STEPS) {
    library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_step", TORCH_BOX(&attention::attention_step));
    library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_absorb", TORCH_BOX(&attention::attention_absorb));
    library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_read", TORCH_BOX(&attention::attention_read));
    library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_read_backward", TORCH_BOX(&attention::attention_read_backward));
    library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_absorb_backward", TORCH_BOX(&attention::attention_absorb_backward));
  }
}
