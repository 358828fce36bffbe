// ---------------------------------------------------------------- tensors

// The rows [tokens, width] of one batch element and head.
template <typename Element>
struct Rows {
  Element* data;
  long stride;

  Element* operator[](long token) const { return data + token * stride; }
};

// A tensor [batch, heads, tokens, width] whose last stride is 1.
template <typename Element>
struct Heads {
  Element* data;
  long batch, head, token;

  Rows<Element> rows(long b, long h) const { return {data + b * batch + h * head, token}; }
};

struct Problem {
  long batch, heads, groups, queries, keys;  // `heads` of k and v; each has `groups` heads of q
  Heads<const input> q, k, v;
  Heads<const input> near_q, near_k;  // SEPARATE
  const double* log_decay;            // FORGET: [batch, heads, keys], sums of gates, see decay.py
  const bool* mask;                   // PADDING: [batch, keys], true for a real token
  const std::int64_t* documents;      // DOCUMENTS: [batch, keys]; a run of equal numbers is a document
  Heads<input> out;
  real *denominator, *maximum;  // [batch, heads * groups, queries]
  Heads<const input> gradient;
  Heads<real> dq, dk, dv, dnear_q, dnear_k;
  double* dlog_decay;  // FORGET: as log_decay
  real* deltas;        // as denominator: what the first sweep of a backward pass finds out, see `Work::load_cotangent`
  long threads, segments;  // parts of the sequence that are done at the same time

  const double* sums(long b, long h) const { return log_decay + (b * heads + h) * keys; }
  double* dsums(long b, long h) const { return dlog_decay + (b * heads + h) * keys; }
  long saved(long b, long h, long g) const { return ((b * heads + h) * groups + g) * queries; }
};

// to (CHUNK, WIDTH): rows [first, first + count), zero beyond them. The rows `ahead` of them are asked for: the sweep
// comes to them next, and memory is far.
template <int COUNT, int WIDTH>
inline void load(Rows<const input> from, long first, int count, real* to, long ahead) {
  constexpr int LINE = 64 / sizeof(input);
  for (int t = 0; t < count; ++t) {
    const input* row = from[first + t];
    for (int i = 0; i < COUNT; i += LINE) __builtin_prefetch(from[first + t + ahead] + i, 0, 2);
    for (int i = 0; i < COUNT; ++i) to[t * WIDTH + i] = number(row[i]);
    for (int i = COUNT; i < WIDTH; ++i) to[t * WIDTH + i] = 0;
  }
  std::fill(to + count * WIDTH, to + CHUNK * WIDTH, real(0));
}

// to (COUNT, CHUNK) from the first COUNT columns of (CHUNK, WIDTH), in squares of four.
template <int COUNT, int WIDTH>
inline void transpose(const real* from, real* to) {
  constexpr int SQUARES = COUNT / 4 * 4;
  for (int t = 0; t < CHUNK; t += 4) {
    for (int i = 0; i < SQUARES; i += 4) {
      const Square square(from + t * WIDTH + i, WIDTH);
      for (int k = 0; k < 4; ++k) four_at(to + (i + k) * CHUNK + t) = square.rows[k];
    }
    for (int i = SQUARES; i < COUNT; ++i)
      for (int s = t; s < t + 4; ++s) to[i * CHUNK + s] = from[s * WIDTH + i];
  }
}

// What is put into rows replaces what is there, or is added to it.
enum class Put { store, add };

template <Put PUT>
inline void put_number(real number, real& target) {
  target = PUT == Put::store ? number : target + number;
}

// rows [first, first + count) (+)= the transpose of (COUNT, CHUNK), in squares of four.
template <int COUNT, Put PUT = Put::add>
inline void put_transposed(const real* from, Rows<real> to, long first, int count) {
  constexpr int SQUARES = COUNT / 4 * 4;
  const int whole = count / 4 * 4;
  for (int t = 0; t < whole; t += 4)
    for (int i = 0; i < SQUARES; i += 4) {
      const Square square(from + i * CHUNK + t, CHUNK);
      for (int k = 0; k < 4; ++k) {
        four& target = four_at(to[first + t + k] + i);
        target = PUT == Put::store ? square.rows[k] : target + square.rows[k];
      }
    }
  for (int t = 0; t < count; ++t)
    for (int i = t < whole ? SQUARES : 0; i < COUNT; ++i) put_number<PUT>(from[i * CHUNK + t], to[first + t][i]);
}

// rows [first, first + count) += the first COUNT columns of (CHUNK, WIDTH).
template <int COUNT, int WIDTH>
inline void add_rows(const real* from, Rows<real> to, long first, int count) {
  for (int t = 0; t < count; ++t) {
    real* row = to[first + t];
    for (int i = 0; i < COUNT; ++i) row[i] += from[t * WIDTH + i];
  }
}

// values (CHUNK, VALUES) and ones (CHUNK) of the keys [first, first + count): 1, and 0 for a hidden key.
inline void load_values(const Problem& p, long b, Rows<const input> v, long first, int count, real* values, real* ones,
                        long ahead) {
  load<DV, VALUES>(v, first, count, values, ahead);
  for (int t = 0; t < CHUNK; ++t) ones[t] = t < count;
  if constexpr (PADDING)
    for (int t = 0; t < count; ++t)
      if (!p.mask[b * p.keys + first + t]) {
        ones[t] = 0;
        std::fill_n(values + t * VALUES, VALUES, real(0));
      }
}

// ---------------------------------------------------------------- the chunks of a sequence and what they see

inline long chunk_count(long tokens) { return tokens / BLOCK * PIECES + (tokens % BLOCK + TILE - 1) / TILE; }

inline long chunk_first(long chunk) { return chunk / PIECES * BLOCK + chunk % PIECES * TILE; }

inline long chunk_last(long chunk, long tokens) {
  return std::min({chunk_first(chunk) + TILE, (chunk / PIECES + 1) * BLOCK, tokens});
}

// Queries of a chunk meet the keys [low, high) one by one, those before and after by a state.
inline long window_low(long first, long keys) {
  if constexpr (TOTAL) return keys;
  if constexpr (NEAR) return std::min(keys, std::max(0L, (first / NEAR_BLOCK - 1) * NEAR));
  if constexpr (WINDOW) return std::min(keys, std::max(0L, first - WINDOW + 1));
  return first;
}

inline long window_high(long last, long keys) {
  if constexpr (TOTAL) return keys;
  if constexpr (CAUSAL) return last;
  if constexpr (NEAR) return std::min(keys, ((last - 1) / NEAR_BLOCK + 2) * NEAR);
  if constexpr (WINDOW) return std::min(keys, last - 1 + WINDOW);
  return last;
}

// First token of the document of `token`, or `floor` if that is later.
inline long document_start(const std::int64_t* ids, long token, long floor) {
  while (token > floor && ids[token - 1] == ids[token]) --token;
  return token;
}

// One past the last token of the document of `token`, or `ceiling` if that is earlier.
inline long document_stop(const std::int64_t* ids, long token, long ceiling) {
  while (token + 1 < ceiling && ids[token] == ids[token + 1]) ++token;
  return token + 1;
}

// Takes pieces of memory, each aligned to vectors.
struct Arena {
  real* next;

  real* take(long numbers) {
    real* taken = next;
    next += round_up(numbers, 32);
    return taken;
  }
};

// Owns memory that is aligned to vectors and not initialised.
struct Memory {
  void* whole;
  real* start;

  explicit Memory(long numbers) : whole(std::malloc(numbers * sizeof(real) + 256)) {
    if (whole == nullptr) throw std::bad_alloc();
    start = reinterpret_cast<real*>((reinterpret_cast<std::uintptr_t>(whole) + 255) / 256 * 256);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(whole); }
};
