// ---------------------------------------------------------------- operations

using torch::stable::Tensor;

template <typename Element>
inline Heads<Element> heads(const Tensor& x) {
  return {reinterpret_cast<Element*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

using Optional = std::optional<Tensor>;

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
  // Fewer rows than threads: each row is cut into segments, of four chunks at least.
  const long rows = p.batch * p.heads;
  const long wanted = (p.threads + rows - 1) / rows;
  p.segments = rows >= p.threads ? 1 : std::min(wanted, std::max(1L, chunk_count(p.queries) / 4));
  return p;
}

void attention_forward(const Tensor q, const Tensor k, const Tensor v, const Optional near_q, const Optional near_k,
                       const Optional log_decay, const Optional mask, const Optional documents, Tensor out,
                       Tensor denominator, Tensor maximum, std::int64_t threads) {
  Problem p = problem(q, k, v, near_q, near_k, log_decay, mask, documents, denominator, maximum, threads);
  p.out = heads<input>(out);
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
  p.dq = heads<real>(dq);
  p.dk = heads<real>(dk);
  p.dv = heads<real>(dv);
  if (SEPARATE) p.dnear_q = heads<real>(*dnear_q), p.dnear_k = heads<real>(*dnear_k);
  if (FORGET) p.dlog_decay = static_cast<double*>(dlog_decay->data_ptr());
  backward(p);
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
}

STABLE_TORCH_LIBRARY_IMPL(fastgrad, CPU, library) {
  library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_forward", TORCH_BOX(&attention::attention_forward));
  library.impl(FASTGRAD_TEXT(FASTGRAD_KERNEL) "_backward", TORCH_BOX(&attention::attention_backward));
}
