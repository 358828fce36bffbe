// ---------------------------------------------------------------- the next tokens of a sequence, one by one

// What attention keeps of the tokens before (runtime/step_attention.py, which reads and writes the same): the last RING
// of them as they are, token i in slot i % RING, and of the first ones, `summed` in number, the sums of phi(k) [v, 1]^T,
// in double precision, so that nothing drifts. A row of the sums holds DV columns and the denominators'. Memory is what
// a step waits for, so that a block of the ring is summed up at once, when nothing is near it any more: the sums are
// read for each token, and written for each block. `Element`: of tokens, in memory.
constexpr long RING = 2 * NEAR, SUM_COLUMNS = DV + 1;
constexpr double LEAST_GATE = -1000;

template <typename Element>
struct Next {
  long batch, heads, groups, tokens, past;  // `tokens` new ones after `past`
  Heads<const Element> q, k, v, near_q, near_k;
  const double* log_gate;    // FORGET: [batch, heads, tokens]
  const bool* mask;          // PADDING: [batch, tokens]
  const std::int64_t* runs;  // DOCUMENTS: [batch, tokens], the number of the document of each
  Heads<Element> ring_k, ring_v, ring_near_k;
  double* ring_gates;      // FORGET: [batch, heads, RING], the sum of the gates after each token
  bool* ring_seen;         // PADDING: [batch, RING]
  std::int64_t* ring_run;  // DOCUMENTS: [batch, RING]
  std::int64_t* document;  // DOCUMENTS: [batch], of the last token
  std::int64_t* summed;    // NEAR: one number, at least past - RING
  double* sums;            // [batch, heads, RANK, SUM_COLUMNS]
  Heads<Element> out;
  long threads;

  bool seen(long b, long place) const {
    return place >= past ? mask[b * tokens + place - past] : ring_seen[b * RING + place % RING];
  }
  std::int64_t run(long b, long place) const {
    return place >= past ? runs[b * tokens + place - past] : ring_run[b * RING + place % RING];
  }
  // Whether the new token `place` sees the key at `key`, which is not later.
  bool sees(long b, long place, long key) const {
    if constexpr (PADDING)
      if (!seen(b, key)) return false;
    if constexpr (DOCUMENTS)
      if (run(b, key) != run(b, place)) return false;
    return true;
  }
  // The tokens whose keys are in the sums when `place` reads them.
  long summed_at(long place) const {
    if constexpr (NEAR == 0) return place;
    const long block = place / NEAR_BLOCK * NEAR;  // where the sums last moved, if a token was there in this call
    return std::max<long>({*summed, place + 1 - RING, block >= past ? block - NEAR : 0, 0});
  }
  bool begins(long b, long place) const {  // a document
    if constexpr (!DOCUMENTS) return false;
    return run(b, place) != (place == past ? document[b] : run(b, place - 1));
  }
};

// LANES numbers, of any alignment.
inline vector numbers(const real* from) {
  vector found;
  std::memcpy(&found, from, sizeof found);
  return found;
}
#if FASTGRAD_VARIANT == 1  // a model of float32 whose attention computes in float64
inline real number(float x) { return x; }
inline void put(real value, float& target) { target = static_cast<float>(value); }
inline vector numbers(const float* from) {
  typedef float half __attribute__((vector_size(VECTOR_BYTES / 2)));
  half found;
  std::memcpy(&found, from, sizeof found);
  return __builtin_convertvector(found, vector);
}
#elif FASTGRAD_VARIANT == 2
inline vector numbers(const input* from) {
  typedef std::uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2)));
  halves bits;
  std::memcpy(&bits, from, sizeof bits);
  const lanes whole = __builtin_convertvector(bits, lanes) << 16;
  vector found;
  std::memcpy(&found, &whole, sizeof found);
  return found;
}
#endif

template <int WIDTH, typename Element>
inline real dot(const Element* a, const real* b) {
  constexpr int WHOLE = WIDTH / LANES * LANES;
  real rest = 0;
  for (int i = WHOLE; i < WIDTH; ++i) rest += number(a[i]) * b[i];
  if constexpr (WHOLE == 0) return rest;
  vector sum{};
  for (int i = 0; i < WHOLE; i += LANES) sum += numbers(a + i) * at(b + i);
  return total(sum) + rest;
}

// One token and the keys that it sees: those of the far field first, itself last.
template <typename Element>
struct Meeting {
  static constexpr int AT_ONCE = 4;  // keys that are added to the sums together

  alignas(VECTOR_BYTES) real q[COLUMNS], near_q[SEPARATE ? NEAR_COLUMNS : 1];
  alignas(VECTOR_BYTES) real weights[round_up(RING + 1, LANES)], values[DV];
  alignas(VECTOR_BYTES) real phi[RANK];
  alignas(VECTOR_BYTES) double of_query[RANK], of_keys[AT_ONCE][RANK], rows[AT_ONCE][SUM_COLUMNS];
  const Element *k[RING + 1], *v[RING + 1], *near_k[SEPARATE ? RING + 1 : 1];
  double gates[FORGET ? RING + 1 : 1];
  long far, count;

  // The features of x, all of them.
  void features(const Element* x) {
    phi[0] = 1;
    for (int i = 0; i < D; ++i) phi[1 + i] = number(x[i]);
    for (int b = 0; b < TABLE.count; ++b) {
      const Block& block = TABLE.blocks[b];
      const real factor = phi[1 + block.index];
      const real* source = phi + block.source;
      real* target = phi + block.target;
#pragma GCC ivdep
      for (long i = 0; i < block.size; ++i) target[i] = factor * source[i];
    }
  }

  void find_keys(const Next<Element>& s, long b, long h, long place, double gate) {
    const long oldest = NEAR ? s.summed_at(place) : place;
    const long nearest = NEAR ? std::max(oldest, (place / NEAR_BLOCK - 1) * NEAR) : place;
    const Rows<Element> ring_k = s.ring_k.rows(b, h), ring_v = s.ring_v.rows(b, h);
    far = count = 0;
    for (long key = oldest; key < place; ++key) {
      if (!s.sees(b, place, key)) continue;
      const long slot = key % std::max(RING, 1L);
      k[count] = ring_k[slot];
      v[count] = ring_v[slot];
      if constexpr (SEPARATE) near_k[count] = s.ring_near_k.rows(b, h)[slot];
      if constexpr (FORGET) gates[count] = std::min(s.ring_gates[(b * s.heads + h) * RING + slot] + gate, 0.0);
      far += key < nearest;
      ++count;
    }
    if (!s.sees(b, place, place)) return;
    const long token = place - s.past;
    k[count] = s.k.rows(b, h)[token];
    v[count] = s.v.rows(b, h)[token];
    if constexpr (SEPARATE) near_k[count] = s.near_k.rows(b, h)[token];
    if constexpr (FORGET) gates[count] = 0;
    if constexpr (NEAR == 0) far = count + 1;
    ++count;
  }

  // A key that is to be added to the sums, times a factor; or none.
  void add(int at, const Element* key, const Element* value, double factor) {
    features(key);
    std::copy_n(phi, RANK, of_keys[at]);
    for (int i = 0; i < DV; ++i) rows[at][i] = factor * number(value[i]);
    rows[at][DV] = factor;
  }
  void add_nothing(int at) {
    std::fill_n(of_keys[at], RANK, 0.0);
    std::fill_n(rows[at], SUM_COLUMNS, 0.0);
  }

  // Weights of the keys in units of e^m, and m.
  real weigh() {
    real largest = 0;
    for (long key = 0; key < count; ++key) {
      if (key < far || !SEPARATE) weights[key] = dot<D>(k[key], q);
      if constexpr (NEAR > 0)
        if (key >= far) {
          double t = SEPARATE ? dot<NEAR_D>(near_k[SEPARATE ? key : 0], near_q) : SCALE * weights[key];
          if constexpr (FORGET) t += gates[key];
          weights[key] = static_cast<real>(t);
          largest = std::max(largest, weights[key]);
        }
    }
    const real fade = std::exp(-largest);
    for (long key = 0; key < far; key += LANES) {
      alignas(VECTOR_BYTES) real found[LANES];
      at(found) = polynomial(at(weights + key)) * fade;
      for (long i = key; i < std::min(far, key + LANES); ++i) {
        weights[i] = found[i - key];
        if constexpr (FORGET) weights[i] *= static_cast<real>(std::exp(gates[i]));
      }
    }
    for (long key = far; key < count; ++key) weights[key] -= largest;
    if constexpr (NEAR > 0)
      for (long key = far / LANES * LANES; key < count; key += LANES) {
        alignas(VECTOR_BYTES) real found[LANES];
        at(found) = exponential(at(weights + key));
        for (long i = std::max(far, key); i < std::min(count, key + LANES); ++i) weights[i] = found[i - key];
      }
    return largest;
  }

  // The sum of the values by their weights, in `values`, and that of the weights.
  double mean() {
    real* __restrict mean = values;
    std::fill_n(mean, DV, real(0));
    double sum = 0;
    long key = 0;
    for (; key + 4 <= count; key += 4) {
      const Element *a = v[key], *b = v[key + 1], *c = v[key + 2], *d = v[key + 3];
      const real* w = weights + key;
      for (int i = 0; i < DV; ++i)
        mean[i] += w[0] * number(a[i]) + w[1] * number(b[i]) + w[2] * number(c[i]) + w[3] * number(d[i]);
      sum += static_cast<double>(w[0]) + w[1] + w[2] + w[3];
    }
    for (; key < count; ++key) {
      for (int i = 0; i < DV; ++i) mean[i] += weights[key] * number(v[key][i]);
      sum += weights[key];
    }
    return sum;
  }
};

// found += W phi(q) of ROWS rows of the sums, which are `apart`; with ADD they become decay times themselves plus
// phi(k) [v, 1].
template <int ROWS, bool ADD>
inline void read_rows(double* __restrict sums, const double* of_query, const double* of_key, const double* __restrict value,
                      double decay, long apart, double* __restrict found) {
  for (int i = 0; i < SUM_COLUMNS; ++i) {
    double sum = found[i];
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      double& entry = sums[row * apart * SUM_COLUMNS + i];
      sum += of_query[row * apart] * entry;
      if constexpr (ADD) entry = (FORGET ? decay * entry : entry) + of_key[row * apart] * value[i];
    }
    found[i] = sum;
  }
}

// In four streams, each without gaps: one alone is read at a part of the pace of the memory.
template <bool ADD, typename Element>
inline void read_sums(const Meeting<Element>& w, double* sums, double decay, double* found) {
  constexpr long APART = RANK / 4;
  for (long f = 0; f < APART; ++f)
    read_rows<4, ADD>(sums + f * SUM_COLUMNS, w.of_query + f, w.of_keys[0] + f, w.rows[0], decay, APART, found);
  for (long f = 4 * APART; f < RANK; ++f)
    read_rows<1, ADD>(sums + f * SUM_COLUMNS, w.of_query + f, w.of_keys[0] + f, w.rows[0], decay, 1, found);
}

template <typename Element>
inline void add_keys(Meeting<Element>& w, double* __restrict sums, int count) {
  static_assert(Meeting<Element>::AT_ONCE == 4);
  for (int at = count; at < 4; ++at) w.add_nothing(at);
  for (long f = 0; f < RANK; ++f) {
    const double a = w.of_keys[0][f], b = w.of_keys[1][f], c = w.of_keys[2][f], d = w.of_keys[3][f];
    for (int i = 0; i < SUM_COLUMNS; ++i)
      sums[f * SUM_COLUMNS + i] += a * w.rows[0][i] + b * w.rows[1][i] + c * w.rows[2][i] + d * w.rows[3][i];
  }
}

// Adds the keys of the ring before `place` that its sums are to hold, and do not yet.
template <typename Element>
inline void move_sums(const Next<Element>& s, Meeting<Element>& w, long b, long h, long place, double* sums) {
  const long first = place == s.past ? std::max<long>({*s.summed, s.past - RING, 0}) : s.summed_at(place - 1);
  const long end = s.summed_at(place);
  int count = 0;
  for (long key = first; key < end; ++key) {
    if (!s.sees(b, place, key)) continue;
    const long slot = key % std::max(RING, 1L);
    const double factor = FORGET ? std::exp(s.ring_gates[(b * s.heads + h) * RING + slot]) : 1;
    w.add(count++, s.ring_k.rows(b, h)[slot], s.ring_v.rows(b, h)[slot], factor);
    if (count == Meeting<Element>::AT_ONCE) add_keys(w, sums, count), count = 0;
  }
  if (count > 0) add_keys(w, sums, count);
}

template <typename Element>
inline void next_token(const Next<Element>& s, Meeting<Element>& w, long b, long h, long place) {
  const long token = place - s.past, row = b * s.heads + h, slot = place % std::max(RING, 1L);
  double gate = 0;
  if constexpr (FORGET) {
    gate = s.log_gate[row * s.tokens + token];
    gate = gate < LEAST_GATE ? LEAST_GATE : gate > 0 ? 0 : gate;
  }
  double* sums = s.sums + row * RANK * SUM_COLUMNS;
  const bool begins = s.begins(b, place);
  if (begins) std::fill_n(sums, RANK * SUM_COLUMNS, 0.0);
  if constexpr (NEAR > 0) move_sums(s, w, b, h, place, sums);
  const bool reads = !begins && s.summed_at(place) > 0;

  w.find_keys(s, b, h, place, gate);
  const double decay = FORGET ? std::exp(gate) : 1;
  const bool adds = NEAR == 0 && s.sees(b, place, place);  // itself: there is no ring
  const bool writes = adds || (FORGET && reads && gate != 0);
  if (adds) {
    w.add(0, s.k.rows(b, h)[token], s.v.rows(b, h)[token], 1);
  } else if (writes) {
    w.add_nothing(0);
  }

  for (long g = 0; g < s.groups; ++g) {
    const long head = h * s.groups + g;
    const Element* q = s.q.rows(b, head)[token];
    for (int i = 0; i < D; ++i) w.q[i] = number(q[i]);
    if constexpr (SEPARATE)
      for (int i = 0; i < NEAR_D; ++i) w.near_q[i] = number(s.near_q.rows(b, head)[token][i]);
    const real largest = w.weigh();
    const double sum = w.mean();
    alignas(64) double found[SUM_COLUMNS] = {};
    const bool last = g + 1 == s.groups;
    if (reads || (last && writes)) {
      w.features(q);
      for (long f = 0; f < RANK; ++f) w.of_query[f] = reads ? TABLE.weights[f] * w.phi[f] : 0;
      if (last && writes) {
        read_sums<true>(w, sums, decay, found);
      } else {
        read_sums<false>(w, sums, 1, found);
      }
    }
    const double factor = reads ? std::exp(-static_cast<double>(largest)) * decay : 0;
    const double total = reads ? sum + factor * found[DV] : sum;
    Element* out = s.out.rows(b, head)[token];
    for (int i = 0; i < DV; ++i) {
      const double value = reads ? w.values[i] + factor * found[i] : w.values[i];
      put(static_cast<real>(total == 0 ? value : value / total), out[i]);
    }
  }

  if constexpr (NEAR > 0) {
    bool shown = true;
    if constexpr (PADDING) shown = s.seen(b, place);
    const auto keep = [&](auto from, auto to, int width) {
      for (int i = 0; i < width; ++i) to[i] = shown ? from[i] : Element{};
    };
    keep(s.k.rows(b, h)[token], s.ring_k.rows(b, h)[slot], D);
    keep(s.v.rows(b, h)[token], s.ring_v.rows(b, h)[slot], DV);
    if constexpr (SEPARATE) keep(s.near_k.rows(b, h)[token], s.ring_near_k.rows(b, h)[slot], NEAR_D);
    if constexpr (FORGET) {
      double* gates = s.ring_gates + row * RING;
      for (long i = 0; i < RING; ++i) gates[i] += gate;
      gates[slot] = 0;
    }
  }
}

template <typename Element>
inline void step(const Next<Element>& s) {
  constexpr long LEAST_WORK = 1 << 15;  // numbers of a state that are read for one more thread
  const long rows = s.batch * s.heads;
  const long work = rows * s.tokens * (RANK * SUM_COLUMNS + RING * (D + DV + NEAR_D));
  const long threads = std::min({s.threads, rows, 1 + work / LEAST_WORK});
  const std::unique_ptr<Meeting<Element>[]> meetings(new Meeting<Element>[threads]);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (long row = 0; row < rows; ++row)
    for (long place = s.past; place < s.past + s.tokens; ++place)
      next_token(s, meetings[omp_get_thread_num()], row / s.heads, row % s.heads, place);
  for (long b = 0; b < s.batch; ++b)
    for (long place = std::max(s.past, s.past + s.tokens - std::max(RING, 1L)); place < s.past + s.tokens; ++place) {
      const long token = b * s.tokens + place - s.past;
      if constexpr (PADDING && NEAR > 0) s.ring_seen[b * RING + place % RING] = s.mask[token];
      if constexpr (DOCUMENTS && NEAR > 0) s.ring_run[b * RING + place % RING] = s.runs[token];
      if constexpr (DOCUMENTS) s.document[b] = s.runs[token];
    }
  if constexpr (NEAR > 0) *s.summed = s.summed_at(s.past + s.tokens - 1);
}
