// ---------------------------------------------------------------- one token of each sequence

namespace step {
namespace {

// NUMBERS

// A line of the cache, whatever the vectors of the machine.
constexpr long LINE = 64 / sizeof(real);
typedef real line __attribute__((vector_size(64), aligned(sizeof(real)), may_alias));

inline line& at(real* memory) { return *reinterpret_cast<line*>(memory); }
inline const line& at(const real* memory) { return *reinterpret_cast<const line*>(memory); }
#if FASTGRAD_VARIANT == 2
inline line at(const input* memory) {
  typedef std::uint16_t halves __attribute__((vector_size(32)));
  typedef std::uint32_t words __attribute__((vector_size(64)));
  halves bits;
  std::memcpy(&bits, memory, sizeof bits);
  const words whole = __builtin_convertvector(bits, words) << 16;
  line found;
  std::memcpy(&found, &whole, sizeof found);
  return found;
}
#endif

// A call: its sequences, how many tokens came before, for how many caches have room, the angles at this place, and memory
// for what stands between operations.
struct Call {
  long batch, past, room, threads;
  const real* turns[TURNS > 0 ? TURNS : 1];
  real* free;

  real* take(long numbers) {  // aligned to lines
    real* const taken = free;
    free += (numbers + LINE - 1) / LINE * LINE;
    return taken;
  }
  // The threads for work that reads so many numbers: to wake one takes as long as reading some thousand.
  int threads_for(long numbers) const { return static_cast<int>(std::min(threads, 1 + numbers / 8192)); }
};

// Gives back at the end of a function what it has taken.
struct Scratch {
  Call& call;
  real* const before;
  explicit Scratch(Call& call) : call(call), before(call.free) {}
  ~Scratch() { call.free = before; }
};

// The addresses of what a graph and those that it calls read: their weights, and what they keep of earlier tokens.
struct Part {
  const std::int64_t *weights, *state;

  const input* weight(long place) const { return reinterpret_cast<const input*>(weights[place]); }
  template <typename Element>
  Element* kept(long place) const { return reinterpret_cast<Element*>(state[place]); }
  Part from(long weight, long kept) const { return {weights + weight, state + kept}; }
};

// ---------------------------------------------------------------- products with weights

// A weight, [depth, columns], or its transpose [columns, depth] as it lies in memory, and where the product goes.
template <typename Element>
struct Product {
  const Element* weight;
  long columns;
  bool transposed;
  real* out;
};

// Memory is read at its pace where several streams are read at once, each without gaps.
constexpr int STREAMS = 8;

// out [rows, columns] (+)= COUNT columns of x [rows, depth] times as many rows of a weight, both `apart` from each other;
// a line of the weight serves all rows of x.
template <int COUNT, typename Element>
inline void add_rows(const real* x, long rows, long depth, const Element* weight, long columns, long apart, bool fresh,
                     real* out) {
  const long whole = columns / LINE * LINE;
  for (long c = 0; c < whole; c += LINE) {
    line w[COUNT];
#pragma GCC unroll 8
    for (int k = 0; k < COUNT; ++k) w[k] = at(weight + k * apart * columns + c);
    for (long row = 0; row < rows; ++row) {
      line& target = at(out + row * columns + c);
      line even = fresh ? line{} : target, odd{};
#pragma GCC unroll 8
      for (int k = 0; k < COUNT; ++k) (k % 2 ? odd : even) += x[row * depth + k * apart] * w[k];
      target = even + odd;
    }
  }
  for (long row = 0; row < rows; ++row)
    for (long c = whole; c < columns; ++c) {
      real sum = fresh ? 0 : out[row * columns + c];
      for (int k = 0; k < COUNT; ++k) sum += x[row * depth + k * apart] * number(weight[k * apart * columns + c]);
      out[row * columns + c] = sum;
    }
}

// The part of a product that the rows [first, last) of the weight make.
template <typename Element>
inline void part_of(const real* x, long rows, long depth, const Product<Element>& p, long first, long last, real* out) {
  const long apart = (last - first) / STREAMS;
  for (long k = first; k < first + apart; ++k)
    add_rows<STREAMS>(x + k, rows, depth, p.weight + k * p.columns, p.columns, apart, k == first, out);
  for (long k = first + apart * STREAMS; k < last; ++k)
    add_rows<1>(x + k, rows, depth, p.weight + k * p.columns, p.columns, 1, k == first, out);
}

inline real total(line v) {  // by halves: one by one, sums would wait for each other
  typedef real half __attribute__((vector_size(32)));
  typedef real quarter __attribute__((vector_size(16)));
  half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const half both = halves[0] + halves[1];
  quarter quarters[2];
  std::memcpy(quarters, &both, sizeof both);
  const quarter last = quarters[0] + quarters[1];
  real sum = 0;
  for (std::size_t i = 0; i < 16 / sizeof(real); ++i) sum += last[i];
  return sum;
}

template <typename Element>
inline real dot(long width, const Element* a, const real* b) {
  const long whole = width / LINE * LINE;
  line even{}, odd{};
  long i = 0;
  for (; i + 2 * LINE <= whole; i += 2 * LINE) {
    even += at(a + i) * at(b + i);
    odd += at(a + i + LINE) * at(b + i + LINE);
  }
  if (i < whole) even += at(a + i) * at(b + i);
  real sum = total(even + odd);
  for (i = whole; i < width; ++i) sum += number(a[i]) * b[i];
  return sum;
}

// The columns [first, last) of a product with a weight's transpose: an entry is the product of two rows.
template <typename Element>
inline void dots_of(const real* x, long rows, long depth, const Product<Element>& p, long first, long last) {
  for (long c = first; c < last; ++c)
    for (long row = 0; row < rows; ++row)
      p.out[row * p.columns + c] = dot(depth, p.weight + c * depth, x + row * depth);
}

// Products of rows [rows, depth] with several weights, each of which is read once. A thread has a part of each weight that
// lies without gaps: some of its rows, and the sums of all threads are added up.
template <typename Element>
inline void multiply(const Call& call, long rows, long depth, const real* x,
                     std::initializer_list<Product<Element>> products) {
  long columns = 0;
  for (const auto& p : products) columns += p.columns;
  const long threads = std::min<long>(call.threads_for(depth * columns), std::max(1L, depth / (2 * STREAMS)));
  static thread_local std::vector<real> memory;  // the sums of all threads but the first
  memory.resize(std::max<std::size_t>(memory.size(), (threads - 1) * rows * columns));
  real* const sums = memory.data();
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (long thread = 0; thread < threads; ++thread) {
    real* own = sums + (thread - 1) * rows * columns;
    for (const auto& p : products) {
      if (p.transposed) {
        dots_of(x, rows, depth, p, p.columns * thread / threads, p.columns * (thread + 1) / threads);
      } else {
        part_of(x, rows, depth, p, depth * thread / threads, depth * (thread + 1) / threads, thread == 0 ? p.out : own);
      }
      own += rows * p.columns;
    }
  }
  for (long thread = 1; thread < threads; ++thread) {
    const real* own = sums + (thread - 1) * rows * columns;
    for (const auto& p : products) {
      if (!p.transposed)
#pragma omp simd
        for (long i = 0; i < rows * p.columns; ++i) p.out[i] += own[i];
      own += rows * p.columns;
    }
  }
}

// ---------------------------------------------------------------- rows

template <typename Element>
inline void embed(long rows, long width, const Element* table, const std::int64_t* ids, real* out) {
  for (long row = 0; row < rows; ++row)
    for (long i = 0; i < width; ++i) out[row * width + i] = number(table[ids[row] * width + i]);
}

// Whether all ids are those of rows of a table.
inline bool within(const std::int64_t* ids, long count, long rows) {
  return std::all_of(ids, ids + count, [=](std::int64_t id) { return 0 <= id && id < rows; });
}

template <typename Value>
inline real sum(long width, Value value) {
  real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (long i = 0; i < width; ++i) sum += value(i);
  return sum;
}

template <typename W>
inline void rms_norm(long rows, long width, const real* x, const W* w, real eps, real* out) {
  for (long row = 0; row < rows; ++row, x += width, out += width) {
    const real scale = real(1) / std::sqrt(sum(width, [=](long i) { return x[i] * x[i]; }) / width + eps);
#pragma omp simd
    for (long i = 0; i < width; ++i) out[i] = x[i] * scale * number(w[i]);
  }
}

// Of rows from which their rounded mean is taken before, so that rows of nearly equal entries are not too long.
template <typename W, typename B>
inline void layer_norm(long rows, long width, const real* x, const W* w, const B* b, real eps, real* out) {
  for (long row = 0; row < rows; ++row, x += width, out += width) {
    const real first = sum(width, [=](long i) { return x[i]; }) / width;
    const real rest = sum(width, [=](long i) { return x[i] - first; }) / width;
    const auto centred = [=](long i) { return (x[i] - first) - rest; };
    const real scale = real(1) / std::sqrt(sum(width, [=](long i) { return centred(i) * centred(i); }) / width + eps);
#pragma omp simd
    for (long i = 0; i < width; ++i) out[i] = centred(i) * scale * number(w[i]) + number(b[i]);
  }
}

inline void unit(long rows, long width, const real* x, real* out) {
  for (long row = 0; row < rows; ++row, x += width, out += width) {
    const real length = std::sqrt(sum(width, [=](long i) { return x[i] * x[i]; }));
    const real divisor = length < real(1e-6) ? real(1e-6) : length;
#pragma omp simd
    for (long i = 0; i < width; ++i) out[i] = x[i] / divisor;
  }
}

// The sums of rows over `divisor`.
inline void reduce(long rows, long width, const real* x, real divisor, real* out) {
  for (long row = 0; row < rows; ++row) out[row] = sum(width, [=](long i) { return x[row * width + i]; }) / divisor;
}

// ---------------------------------------------------------------- tokens before

// Cosines and sines of the angles past * base^(-2i/width) / stretch_i, each width / 2 in number.
inline const real* turns(Call& call, long width, double base, std::initializer_list<double> stretch) {
  const long half = width / 2;
  real* const found = call.take(width);
  for (long i = 0; i < half; ++i) {
    const double rate = std::exp(2 * i * (-std::log(base) / width));
    const double divisor = stretch.size() == 0 ? 1 : stretch.begin()[stretch.size() == 1 ? 0 : i];
    const double angle = call.past * (rate / divisor);
    found[i] = static_cast<real>(std::cos(angle));
    found[half + i] = static_cast<real>(std::sin(angle));
  }
  return found;
}

// The pairs (i, i + width / 2) of rows, turned; sign -1: turned back.
inline void rotary(long rows, long width, const real* turns, real sign, const real* x, real* out) {
  const long half = width / 2;
  for (long row = 0; row < rows; ++row, x += width, out += width)
    for (long i = 0; i < half; ++i) {
      const real cosine = turns[i], sine = sign * turns[half + i], first = x[i], second = x[half + i];
      out[i] = first * cosine - second * sine;
      out[half + i] = first * sine + second * cosine;
    }
}

// x after the `before` tokens of each row [before, width] that are kept, the last of which it becomes.
inline void keep(long before, long width, const real* x, input* recent) {
  std::copy(recent + width, recent + before * width, recent);
  for (long i = 0; i < width; ++i) put(x[i], recent[(before - 1) * width + i]);
}

// The token that came `by` tokens before; seen: see `seen_of`, of `each` rows.
inline void shift(long rows, long width, long by, const real* x, input* recent, const long* seen, long each, real* out) {
  for (long row = 0; row < rows; ++row, x += width, out += width, recent += by * width) {
    const bool sees = !seen || seen[row / each] >= by;
    for (long i = 0; i < width; ++i) out[i] = sees ? number(recent[i]) : 0;
    keep(by, width, x, recent);
  }
}

// The sum over k of w_k times the token k before, for w [before + 1, width].
template <typename Element>
inline void depthwise(long rows, long width, long before, const real* x, const Element* w, input* recent,
                      const long* seen, long each, real* out) {
  for (long row = 0; row < rows; ++row, x += width, out += width, recent += before * width) {
    const long last = seen ? seen[row / each] : before;
#pragma omp simd
    for (long i = 0; i < width; ++i) out[i] = x[i] * number(w[i]);
    for (long k = 1; k <= last; ++k)
#pragma omp simd
      for (long i = 0; i < width; ++i) out[i] += number(recent[(before - k) * width + i]) * number(w[k * width + i]);
    keep(before, width, x, recent);
  }
}

// How many of the last tokens of each sequence, whose ids [batch, before] are kept, are of the document of its new one.
inline std::vector<long> seen_of(long batch, long before, const std::int64_t* ids, std::int64_t* kept) {
  std::vector<long> seen(batch);
  for (long b = 0; b < batch; ++b, kept += before) {
    while (seen[b] < before && kept[before - 1 - seen[b]] == ids[b]) ++seen[b];
    std::copy(kept + 1, kept + before, kept);
    kept[before - 1] = ids[b];
  }
  return seen;
}

// The number of the document of each sequence's new token, of the number and the id of the last token's.
inline std::vector<std::int64_t> run_of(long batch, const std::int64_t* ids, const std::int64_t* document,
                                        std::int64_t* id) {
  std::vector<std::int64_t> runs(batch);
  for (long b = 0; b < batch; ++b) {
    runs[b] = document[b] + (ids[b] != id[b]);
    id[b] = ids[b];
  }
  return runs;
}

}  // namespace
}  // namespace step
