{% if not banded %}
// ---------------------------------------------------------------- states along the sequence
//
// LEFT: a query's far keys are those before its window, and states run from the left for the queries, from the right
// for the keys{{ "; RIGHT: the mirror image" if two_sided }}.

enum class Side { LEFT{{ ", RIGHT" if two_sided }} };

// The end of a window on a side.
template <Side SIDE>
inline long edge_of(const Problem& p, long chunk) {
{% if two_sided %}
  if (SIDE == Side::RIGHT) return window_high(chunk_last(chunk, p.queries), p.keys);
{% endif %}
  return window_low(chunk_first(chunk), p.keys);
}

{% if documents %}
// Cuts the far keys [start, stop) next to a window to those of the document beside it; true if something was cut off,
// or ended just there.
template <Side SIDE>
inline bool cut(const Problem& p, long b, long& start, long& stop) {
  const std::int64_t* ids = p.documents + b * p.keys;
{% if two_sided %}
  if (SIDE == Side::RIGHT) {
    const long end = document_stop(ids, start, stop);
    const bool reset = end < stop || (stop < p.keys && ids[stop - 1] != ids[stop]);
    stop = end;
    return reset;
  }
{% endif %}
  const long begin = document_start(ids, stop - 1, start);
  const bool reset = begin > start || (start > 0 && ids[start - 1] != ids[start]);
  start = begin;
  return reset;
}

{% endif %}
// Which queries of [first, last) have far keys beyond the edge: all, or those of the document that crosses it.
template <Side SIDE>
inline void far_queries(const Problem& p, long b, long edge, long& first, long& last) {
{% if two_sided %}
  if (SIDE == Side::RIGHT) {
    if (edge >= p.keys) first = last;
{% if documents %}
    else first = document_start(p.documents + b * p.keys, edge, first), first = std::min(first, last);
{% endif %}
    return;
  }
{% endif %}
  if (edge <= 0) last = first;
{% if documents %}
  else last = std::max(first, document_stop(p.documents + b * p.keys, edge - 1, last));
{% endif %}
}

// The state of the keys [start, stop), added.
inline void absorb_keys(const Problem& p, Work& w, Row row, State& state, long start, long stop) {
  for (long first = start; first < stop; first += CHUNK) {
    const int count = static_cast<int>(std::min<long>(CHUNK, stop - first));
    load<D, COLUMNS>(p.k.rows(row.b, row.h), first, count, w.k, w.ahead);
    transpose<D, COLUMNS>(w.k, w.x);
    features(w.phi);
    load_values(p, row.b, p.v.rows(row.b, row.h), first, count, w.far, w.far_delta, w.ahead);
    state.absorb(w.phi, w.far, w.far_delta, count);
  }
}

// A state that moves along the keys: it holds those between its place and the end where it began.
template <Side SIDE>
struct KeyState {
  State state;
  long place;
  bool empty;

  // True if what came before does not count any more.
  bool advance(const Problem& p, Work& w, Row row, long edge) {
    long start = place, stop = edge;
{% if two_sided %}
    if (SIDE == Side::RIGHT) std::swap(start, stop);
{% endif %}
    if (start >= stop) return false;
    place = edge;
    bool reset = false;
{% if documents %}
    reset = cut<SIDE>(p, row.b, start, stop);
    if (reset && !empty) state.clear();
{% endif %}
    absorb_keys(p, w, row, state, start, stop);
    empty = false;
    return reset;
  }
};

// u~ e^-m of the far queries, in far and far_delta, 0 elsewhere.
inline void far_cotangent(Work& w, long from, long to) {
  for (int t = 0; t < CHUNK; ++t) {
{% if exponential %}
    w.decay[t] = t >= from && t < to ? std::exp(-std::max(w.level[t], real(0))) : 0;
{% else %}
    w.decay[t] = t >= from && t < to;
{% endif %}
    const bool far = t >= from && t < to;  // 0 times a cotangent that overflowed is not 0
    for (int i = 0; i < VALUES; i += LANES)
      at(w.far + t * VALUES + i) = far ? w.decay[t] * at(w.cotangent + t * VALUES + i) : vector{};
    w.far_delta[t] = far ? w.decay[t] * w.delta[t] : 0;
  }
}

// Adds the far queries of a chunk to Y, W times the sum of phi(q_i) u~_i^T; true if what came before does not count.
// First calls also(g) for each of the group's heads, with queries and cotangents in w.
template <Side SIDE, typename Also>
inline bool absorb_queries(const Problem& p, Work& w, Row row, long chunk, State& state, bool& empty, Also also) {
  const long first = chunk_first(chunk), last = chunk_last(chunk, p.queries), edge = edge_of<SIDE>(p, chunk);
  long from = first, to = last;
  far_queries<SIDE>(p, row.b, edge, from, to);
  bool reset = false;
{% if documents %}
{% if two_sided %}
  reset = SIDE == Side::RIGHT ? from > first || (first > 0 && p.documents[row.b * p.keys + first - 1] != p.documents[row.b * p.keys + first])
                              : to < last || (last < p.queries && p.documents[row.b * p.keys + last - 1] != p.documents[row.b * p.keys + last]);
{% else %}
  reset = to < last || (last < p.queries && p.documents[row.b * p.keys + last - 1] != p.documents[row.b * p.keys + last]);
{% endif %}
  if (reset && !empty) {
    state.clear();
    empty = true;
  }
{% endif %}
  for (long g = 0; g < p.groups; ++g) {
    const int count = static_cast<int>(last - first);
    w.load_queries(p, row.b, row.h, g, first, count);
    w.load_cotangent(p, row.b, row.h, g, first, count);
    also(g);
    if (from >= to) continue;
    features(w.phi);
{% if exponential or documents %}
    far_cotangent(w, from - first, to - first);
    state.absorb(w.phi, w.far, w.far_delta, count);
{% else %}
    state.absorb(w.phi, w.cotangent, w.delta, count);
{% endif %}
  }
  if (from < to) empty = false;
  return reset;
}

inline void nothing(long) {}

// dV += (Y^T W phi(K))[:dv] and dK += J_phi(K)^T (W Y v~) for the keys [start, stop).
inline void key_gradients(const Problem& p, Work& w, Row row, const State& state, long start, long stop) {
  for (long first = start; first < stop; first += CHUNK) {
    const int count = static_cast<int>(std::min<long>(CHUNK, stop - first));
    load<D, COLUMNS>(p.k.rows(row.b, row.h), first, count, w.k, w.ahead);
    transpose<D, COLUMNS>(w.k, w.x);
    features(w.phi);
    load_values(p, row.b, p.v.rows(row.b, row.h), first, count, w.far, w.far_delta, w.ahead);
    std::fill_n(w.rows, CHUNK * VALUES, real(0));
    state.read(w.phi, w.rows, nullptr, count);
{% if padding %}
    for (int t = 0; t < count; ++t)
      if (w.far_delta[t] == 0) std::fill_n(w.rows + t * VALUES, VALUES, real(0));
{% endif %}
    add_rows<DV, VALUES>(w.rows, p.dv.rows(row.b, row.h), first, count);
    transpose<DV, VALUES>(w.far, w.transposed);
    state.upstream(w.transposed, w.far_delta, w.dphi);
    std::fill_n(w.dx, D * CHUNK, real(0));
    pull(w.phi, w.dphi, w.dx);
    add_transposed<D>(w.dx, p.dk.rows(row.b, row.h), first, count);
  }
}

// ---------------------------------------------------------------- sweeps over the chunks of a segment

// Where the states of a segment's neighbours are kept while segments are done at the same time.
struct Carries {
  real* memory;  // a state for each row and segment
  bool* resets;
  const Problem& p;

  State at(long row, long segment) const { return State(memory + (row * p.segments + segment) * State::SIZE); }
};

// The keys that a segment adds to the state of those that follow it.
template <Side SIDE>
inline void segment_keys(const Problem& p, long segment, long& from, long& to) {
{% if total %}
  from = p.keys * segment / p.segments;
  to = p.keys * (segment + 1) / p.segments;
{% else %}
  const long first = segment_start(p, segment), next = segment_start(p, segment + 1), chunks = chunk_count(p.queries);
  from = edge_of<SIDE>(p, first);
{% if two_sided %}
  if (SIDE == Side::RIGHT) {
    to = next == chunks ? p.keys : edge_of<SIDE>(p, next);
    return;
  }
{% endif %}
  to = edge_of<SIDE>(p, next == chunks ? chunks - 1 : next);
{% endif %}
}

// Memory for the carries, where there is more than one segment.
struct Shared {
  Memory* memory = nullptr;

  explicit Shared(const Problem& p) {
    const long states = p.batch * p.heads * p.segments;
    if (p.segments > 1) memory = new Memory(states * (State::SIZE + 1));
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  ~Shared() { delete memory; }
};

// Turns what each segment adds into what it starts from; `ascending`: it comes from the segments before.
inline void scan(const Problem& p, const Carries& carries, bool ascending) {
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(p.threads))
  for (long row = 0; row < p.batch * p.heads; ++row) {
{% if total %}
    (void)ascending;
    for (long s = 1; s < p.segments; ++s) carries.at(row, 0).add(carries.at(row, s));
    for (long s = 1; s < p.segments; ++s) std::memcpy(carries.at(row, s).values, carries.at(row, 0).values, State::SIZE * sizeof(real));
{% else %}
    const auto place = [&](long k) { return ascending ? k : p.segments - 1 - k; };
    for (long k = 1; k < p.segments; ++k)
      if (!carries.resets[row * p.segments + place(k)]) carries.at(row, place(k)).add(carries.at(row, place(k - 1)));
    for (long k = p.segments - 1; k > 0; --k)
      std::memcpy(carries.at(row, place(k)).values, carries.at(row, place(k - 1)).values, State::SIZE * sizeof(real));
    carries.at(row, place(0)).clear();
{% endif %}
  }
}

// The state with which a segment begins, and whether there is nothing in it.
inline bool begin(const Problem& p, const Carries& carries, State& state, long row, long segment, bool at_end) {
  if (carries.memory == nullptr || at_end) {
    state.clear();
    return true;
  }
  std::memcpy(state.values, carries.at(row, segment).values, State::SIZE * sizeof(real));
  return false;
}

template <Side SIDE>
inline KeyState<SIDE> first_keys(const Problem& p, Work& w, const Carries& carries, real* memory, Row row, long segment) {
  State state(memory);
{% if total %}
  const bool empty = begin(p, carries, state, row.index, segment, false);
  KeyState<SIDE> keys{state, empty ? 0 : p.keys, empty};
  keys.advance(p, w, row, p.keys);
  return keys;
{% else %}
{% if two_sided %}
  if (SIDE == Side::RIGHT) {
    const bool last = segment + 1 == p.segments, empty = begin(p, carries, state, row.index, segment, last);
    return {state, last ? p.keys : edge_of<SIDE>(p, segment_start(p, segment + 1)), empty};
  }
{% endif %}
  const bool empty = begin(p, carries, state, row.index, segment, segment == 0);
  return {state, segment == 0 ? 0 : edge_of<SIDE>(p, segment_start(p, segment)), empty};
{% endif %}
}
{% endif %}

// What a parallel loop over rows and segments needs of memory: work and states for each thread.
struct Pool {
  long each;
  Memory memory;

  Pool(const Problem& p, long states) : each(size(states)), memory(p.threads * each) {}

  static long size(long states) { return round_up(Work::SIZE{{ " + states * State::SIZE" if not banded }}, 32) + 64; }
};

template <typename Body>
inline void each_segment(const Problem& p, const Pool& pool, Body body) {
  const long tasks = p.batch * p.heads * p.segments;
#pragma omp parallel num_threads(static_cast<int>(p.threads))
  {
    Arena memory{pool.memory.start + omp_get_thread_num() * pool.each};
    Work work(memory);
    real* states = memory.next;
#pragma omp for schedule(dynamic, 1)
    for (long task = 0; task < tasks; ++task) body(work, states, row_of(p, task / p.segments), task % p.segments);
  }
}

{% if not banded %}
// A parallel loop over rows and segments in which each segment begins with what its neighbours leave it: `add` sums up
// a segment, and says whether what came before is void; `body` gets the carries.
template <typename Add, typename Body>
inline void scanned(const Problem& p, const Pool& pool, Memory* shared, bool ascending, Add add, Body body) {
  Carries carries{nullptr, nullptr, p};
  if (shared != nullptr) {
    carries.memory = shared->start;
    carries.resets = reinterpret_cast<bool*>(shared->start + p.batch * p.heads * p.segments * State::SIZE);
    each_segment(p, pool, [&](Work& w, real*, Row row, long segment) {
      State state = carries.at(row.index, segment);
      state.clear();
      carries.resets[row.index * p.segments + segment] = add(w, row, segment, state);
    });
    scan(p, carries, ascending);
  }
  each_segment(p, pool, [&](Work& w, real* memory, Row row, long segment) { body(w, memory, row, segment, carries); });
}

// A sweep in which queries meet the keys that are far on one side: body(work, row, segment, chunk, keys).
template <Side SIDE, typename Body>
inline void query_sweep(const Problem& p, const Pool& pool, Memory* shared, Body body) {
  scanned(
      p, pool, shared, SIDE == Side::LEFT,
      [&](Work& w, Row row, long segment, State& state) {
        long from, to;
        segment_keys<SIDE>(p, segment, from, to);
{% if two_sided %}
        KeyState<SIDE> keys{state, SIDE == Side::RIGHT ? to : from, true};
        return keys.advance(p, w, row, SIDE == Side::RIGHT ? from : to);
{% else %}
        KeyState<SIDE> keys{state, from, true};
        return keys.advance(p, w, row, to);
{% endif %}
      },
      [&](Work& w, real* memory, Row row, long segment, const Carries& carries) {
        KeyState<SIDE> keys = first_keys<SIDE>(p, w, carries, memory, row, segment);
        const long start = segment_start(p, segment), stop = segment_start(p, segment + 1);
        for (long k = start; k < stop; ++k) {
{% if two_sided %}
          const long chunk = SIDE == Side::RIGHT ? start + stop - 1 - k : k;
{% else %}
          const long chunk = k;
{% endif %}
          keys.advance(p, w, row, edge_of<SIDE>(p, chunk));
          body(w, row, segment, chunk, keys);
        }
      });
}

// The gradients of the keys by the queries to which they are far on one side.
template <Side SIDE>
inline void key_sweep(const Problem& p, const Pool& pool, Memory* shared) {
  const auto chunk_of = [&](long segment, long k) {
    const long start = segment_start(p, segment), stop = segment_start(p, segment + 1);
    return SIDE == Side::LEFT ? stop - 1 - k : start + k;
  };
  const auto chunks = [&](long segment) { return segment_start(p, segment + 1) - segment_start(p, segment); };
  scanned(
      p, pool, shared, SIDE != Side::LEFT,
      [&](Work& w, Row row, long segment, State& state) {
        bool reset = false, empty = true;
        for (long k = 0; k < chunks(segment); ++k)
          reset |= absorb_queries<SIDE>(p, w, row, chunk_of(segment, k), state, empty, nothing);
        return reset;
      },
      [&](Work& w, real* memory, Row row, long segment, const Carries& carries) {
        State state(memory);
        w.ahead = {{ "CHUNK" if total else "SIDE == Side::LEFT ? -CHUNK : CHUNK" }};
{% if total %}
        bool empty = begin(p, carries, state, row.index, segment, false);
        if (empty)
          for (long k = 0; k < chunks(segment); ++k) absorb_queries<SIDE>(p, w, row, k, state, empty, nothing);
        key_gradients(p, w, row, state, p.keys * segment / p.segments, p.keys * (segment + 1) / p.segments);
{% else %}
        const long first = segment_start(p, segment), next = segment_start(p, segment + 1);
        const bool last = segment + 1 == p.segments;
{% if two_sided %}
        if (SIDE == Side::RIGHT) {
          bool empty = begin(p, carries, state, row.index, segment, segment == 0);
          long place = edge_of<SIDE>(p, first == 0 ? 0 : first - 1);
          const auto reach = [&](long edge) {
            long from = place, to = edge;
            place = edge;
            if (empty || from >= to) return;
{% if documents %}
            to = document_stop(p.documents + row.b * p.keys, from, to);
{% endif %}
            key_gradients(p, w, row, state, from, to);
          };
          for (long chunk = first; chunk < next; ++chunk) {
            reach(edge_of<SIDE>(p, chunk));
            absorb_queries<SIDE>(p, w, row, chunk, state, empty, nothing);
          }
          if (last) reach(p.keys);
          return;
        }
{% endif %}
        bool empty = begin(p, carries, state, row.index, segment, last);
        long place = edge_of<SIDE>(p, last ? next - 1 : next);
        for (long chunk = next - 1; chunk >= first; --chunk) {
          const long edge = edge_of<SIDE>(p, chunk);
{% if fused %}
          const long last = chunk_last(chunk, p.queries);
          clear_rows(p.dk.rows(row.b, row.h), edge, last, D, w.ahead);
          clear_rows(p.dv.rows(row.b, row.h), edge, last, DV, w.ahead);
{% endif %}
          if (edge < place && !empty) {
{% if documents %}
            const long from = document_start(p.documents + row.b * p.keys, place - 1, edge);
            key_gradients(p, w, row, state, from, place);
{% else %}
            key_gradients(p, w, row, state, edge, place);
{% endif %}
          }
          place = std::min(place, edge);
          absorb_queries<SIDE>(p, w, row, chunk, state, empty, [&](long g) {
{% if fused %}
            std::fill_n(w.dx, D * CHUNK, real(0));
            local_gradients(p, w, row, segment, edge, last);
            add_transposed<D>(w.dx, p.dq.rows(row.b, row.h * p.groups + g), edge, static_cast<int>(last - edge));
{% else %}
            nothing(g);
{% endif %}
          });
        }
{% if not causal %}
        if (first == 0 && place > 0 && !empty) key_gradients(p, w, row, state, 0, place);
{% endif %}
{% endif %}
      });
}

{% endif %}
