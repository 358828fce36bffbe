// ---------------------------------------------------------------- attention by softmax

// How pairs weigh (`Rule` of runtime/step_tokens.py), for heads of keys that `groups` heads of queries share each.
struct Pairs {
  long heads, groups, d, dv;
  double scale;
  long near, near_d;  // the block of the near field, whose queries and keys are its own; 0 without
  bool alibi;
};

// One token of each sequence, by heads; null where the attention has none.
struct Token {
  const real *q, *k, *v, *near_q, *near_k, *log_gate;
  const bool* mask;
  const std::int64_t* run;  // the number of its document
};

// What is kept of earlier ones (runtime/step_attention.py): token i in slot i % slots.
struct Earlier {
  input *k, *v, *near_k;  // [batch, heads, slots, width]
  double* log_gate;  // [batch, heads, slots], the sum of the gates after each token
  bool* seen;        // [batch, slots]
  std::int64_t *run, *document;  // [batch, slots], and of the last token [batch]
};

// Some of the keys that a token sees.
struct Keys {
  static constexpr long MOST = 64;
  long count = 0;
  const input *k[MOST], *v[MOST], *near_k[MOST];  // near_k: null where a pair is not near
  double gates[MOST];
  long distance[MOST];  // where slopes or a near field ask for it
};

// One head of keys of one sequence.
struct Head {
  const Call& call;
  const Pairs& pairs;
  const Token& token;
  const input *k, *v, *near_k;  // of the token, as they are kept
  const Earlier& kept;
  long slots, b, row;

  long count() const { return std::min(call.past, slots); }
  double gate() const {
    if (!token.log_gate) return 0;
    const double gate = token.log_gate[row];
    return gate < -1000 ? -1000 : gate > 0 ? 0 : gate;
  }

  // The visible ones of the keys in the slots [first, last), of which `count()` stands for the token itself.
  void find(Keys& keys, long first, long last) const {
    const double own = gate();
    keys.count = 0;
    for (long slot = first; slot < last; ++slot) {
      const bool self = slot == count();
      if (token.mask && !(self ? token.mask[b] : kept.seen[b * slots + slot])) continue;
      if (token.run && !self && kept.run[b * slots + slot] != token.run[b]) continue;
      const long at = row * slots + slot, i = keys.count++;
      const bool placed = pairs.near || pairs.alibi;
      const long distance = self || !placed ? 0 : 1 + (call.past - 1 - slot) % slots;
      const bool near = pairs.near && call.past / pairs.near - (call.past - distance) / pairs.near <= 1;
      keys.k[i] = self ? k + row * pairs.d : kept.k + at * pairs.d;
      keys.v[i] = self ? v + row * pairs.dv : kept.v + at * pairs.dv;
      keys.near_k[i] = !near ? nullptr : self ? near_k + row * pairs.near_d : kept.near_k + at * pairs.near_d;
      keys.gates[i] = self || !token.log_gate ? 0 : std::min(kept.log_gate[at] + own, 0.0);
      keys.distance[i] = distance;
    }
  }

  // The score of a key and the query of the group `g`.
  real score(const Keys& keys, long i, long g, double slope) const {
    const long head = row * pairs.groups + g;
    const double score = keys.near_k[i] ? dot(pairs.near_d, keys.near_k[i], token.near_q + head * pairs.near_d)
                                        : pairs.scale * dot(pairs.d, keys.k[i], token.q + head * pairs.d);
    return static_cast<real>(score - slope * keys.distance[i] + keys.gates[i]);
  }
  double slope(long g) const {
    const double head = row % pairs.heads * pairs.groups + g + 1;
    return pairs.alibi ? std::exp2(-8 * head / (pairs.heads * pairs.groups)) : 0;
  }

  void keep() const {
    if (token.log_gate)
      for (long slot = 0; slot < count(); ++slot) kept.log_gate[row * slots + slot] += gate();
    if (slots == 0) return;
    const bool shown = !token.mask || token.mask[b];
    const long at = row * slots + call.past % slots;
    const auto store = [&](const input* from, input* to, long width) {
      for (long i = 0; i < width; ++i) to[at * width + i] = shown ? from[row * width + i] : input{};
    };
    store(k, kept.k, pairs.d);
    store(v, kept.v, pairs.dv);
    if (pairs.near) store(near_k, kept.near_k, pairs.near_d);
    if (token.log_gate) kept.log_gate[at] = 0;
  }
};

// The sums of some values by their weights, `change` times what they were, and more.
inline void add_values(const Keys& keys, const real* weights, long width, real change, real* __restrict sums) {
  if (change != 1)
    for (long i = 0; i < width; ++i) sums[i] *= change;
  long key = 0;
  for (; key + 4 <= keys.count; key += 4) {
    const input *a = keys.v[key], *b = keys.v[key + 1], *c = keys.v[key + 2], *d = keys.v[key + 3];
    const real* const w = weights + key;
#pragma omp simd
    for (long i = 0; i < width; ++i)
      sums[i] += (w[0] * number(a[i]) + w[1] * number(b[i])) + (w[2] * number(c[i]) + w[3] * number(d[i]));
  }
  for (; key < keys.count; ++key)
#pragma omp simd
    for (long i = 0; i < width; ++i) sums[i] += weights[key] * number(keys.v[key][i]);
}

// out [groups, dv]: the means of the values by softmax of the scores, 0 where a token sees nothing. Weights are in
// units of e^m, m the largest score so far.
inline void attend_head(const Head& head, real* out) {
  constexpr real NONE = -std::numeric_limits<real>::infinity();
  const long groups = head.pairs.groups, width = head.pairs.dv;
  std::vector<real> largest(groups, NONE), total(groups, 0);
  std::fill_n(out, groups * width, real(0));
  Keys keys;
  for (long first = 0; first <= head.count(); first += Keys::MOST) {
    head.find(keys, first, std::min(first + Keys::MOST, head.count() + 1));
    for (long g = 0; keys.count > 0 && g < groups; ++g) {
      real weights[Keys::MOST];
      real most = largest[g];
      const double slope = head.slope(g);
      for (long i = 0; i < keys.count; ++i) most = std::max(most, weights[i] = head.score(keys, i, g, slope));
#pragma omp simd
      for (long i = 0; i < keys.count; ++i) weights[i] = exponential(weights[i] - most);
      const real change = largest[g] == most ? 1 : exponential(largest[g] - most);
      add_values(keys, weights, width, change, out + g * width);
      total[g] = total[g] * change + sum(keys.count, [&](long i) { return weights[i]; });
      largest[g] = most;
    }
  }
  for (long g = 0; g < groups; ++g)
    for (long i = 0; i < width && total[g] != 0; ++i) out[g * width + i] /= total[g];
}

// Attention out [batch, heads * groups, dv] of a token of each sequence to those that are kept, and to itself; then it
// is kept too: in a cache there is room for it, from a window the oldest one leaves.
inline void attend(const Call& call, const Pairs& pairs, const Token& token, const Earlier& kept, long slots,
                   real* out) {
  const long rows = call.batch * pairs.heads;
  const Stored k(token.k, rows * pairs.d), v(token.v, rows * pairs.dv), near_k(token.near_k, rows * pairs.near_d);
  const long work = rows * std::min(call.past, slots) * (pairs.d + pairs.dv);
  const int threads = static_cast<int>(std::min<long>(rows, call.threads_for(work)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long row = 0; row < rows; ++row) {
    const Head head{call, pairs, token, k.data, v.data, near_k.data, kept, slots, row / pairs.heads, row};
    attend_head(head, out + row * pairs.groups * pairs.dv);
    head.keep();
  }
  for (long b = 0; b < call.batch; ++b) {
    if (token.mask && slots > 0) kept.seen[b * slots + call.past % slots] = token.mask[b];
    if (token.run && slots > 0) kept.run[b * slots + call.past % slots] = token.run[b];
    if (token.run) kept.document[b] = token.run[b];
  }
}
