// ---------------------------------------------------------------- segments, which are done at the same time

// What a parallel loop over rows and segments needs of memory: work and, where there are states, one for each thread.
struct Pool {
  long each;
  Memory memory;

  explicit Pool(const Problem& p) : each(size()), memory(p.threads * each) {}

  static long size() { return round_up(Work::SIZE + (BANDED ? 0 : State::SIZE), 32) + 64; }
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

// The states that segments begin with; memory is nullptr where there is one segment.
struct Carries {
  real* memory;  // a state for each row and segment
  bool* resets;  // whether a segment makes void what comes to it
  const Problem& p;

  State at(long row, long segment) const { return State(memory + (row * p.segments + segment) * State::SIZE); }

  void copy(long row, long from, long to) const {
    std::memcpy(at(row, to).values, at(row, from).values, State::SIZE * sizeof(real));
  }
};

// Turns what each segment adds into the sum of all of them.
inline void sum_segments(const Carries& carries, long row) {
  for (long s = 1; s < carries.p.segments; ++s) carries.at(row, 0).add(carries.at(row, s));
  for (long s = 1; s < carries.p.segments; ++s) carries.copy(row, 0, s);
}

// FORGET: the decay of a state along a segment.
inline real decay_across(const Problem& p, long row, long segment) {
  if constexpr (!FORGET) return 1;
  const long from = edge_of<Side::LEFT>(p, segment_start(p, segment));
  const long to = edge_of<Side::LEFT>(p, segment_start(p, segment + 1));
  return decay_between(p, row / p.heads, row % p.heads, from, to);
}

// Turns what each segment adds into what it begins with; `ascending`: it comes from the segments before.
inline void scan_segments(const Carries& carries, long row, bool ascending) {
  const long segments = carries.p.segments;
  const auto place = [&](long k) { return ascending ? k : segments - 1 - k; };
  for (long k = 1; k < segments; ++k)
    if (!carries.resets[row * segments + place(k)])
      carries.at(row, place(k)).add(carries.at(row, place(k - 1)), decay_across(carries.p, row, place(k)));
  for (long k = segments - 1; k > 0; --k) carries.copy(row, place(k - 1), place(k));
  carries.at(row, place(0)).clear();
}

// A parallel loop over rows and segments in which each segment begins with what its neighbours leave it: `add` sums up
// a segment, and says whether what came before is void; `body` gets the carries.
template <typename Add, typename Body>
inline void scanned(const Problem& p, const Pool& pool, const Shared& shared, bool ascending, Add add, Body body) {
  Carries carries{nullptr, nullptr, p};
  if (shared.memory != nullptr) {
    carries.memory = shared.memory->start;
    carries.resets = reinterpret_cast<bool*>(carries.memory + p.batch * p.heads * p.segments * State::SIZE);
    each_segment(p, pool, [&](Work& w, real*, Row row, long segment) {
      State state = carries.at(row.index, segment);
      state.clear();
      carries.resets[row.index * p.segments + segment] = add(w, row, segment, state);
    });
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(p.threads))
    for (long row = 0; row < p.batch * p.heads; ++row) {
      if constexpr (TOTAL)
        sum_segments(carries, row);
      else
        scan_segments(carries, row, ascending);
    }
  }
  each_segment(p, pool, [&](Work& w, real* memory, Row row, long segment) { body(w, memory, row, segment, carries); });
}

// The state with which a segment begins, and whether there is nothing in it; at_end: no segment comes before.
inline bool begin(const Carries& carries, State& state, long row, long segment, bool at_end) {
  if (carries.memory == nullptr || at_end) {
    state.clear();
    return true;
  }
  std::memcpy(state.values, carries.at(row, segment).values, State::SIZE * sizeof(real));
  return false;
}

// ---------------------------------------------------------------- the sweep of the queries

// The keys [from, to) that a segment adds to the state of those that follow it.
template <Side SIDE>
inline void segment_keys(const Problem& p, long segment, long& from, long& to) {
  const long first = segment_start(p, segment), next = segment_start(p, segment + 1), chunks = chunk_count(p.queries);
  if constexpr (TOTAL) {
    from = p.keys * segment / p.segments;
    to = p.keys * (segment + 1) / p.segments;
  } else if constexpr (SIDE == Side::RIGHT) {
    from = edge_of<SIDE>(p, first);
    to = next == chunks ? p.keys : edge_of<SIDE>(p, next);
  } else {
    from = edge_of<SIDE>(p, first);
    to = edge_of<SIDE>(p, next == chunks ? chunks - 1 : next);
  }
}

// What a segment adds to the state.
template <Side SIDE>
inline bool add_segment_keys(const Problem& p, Work& w, Row row, long segment, const State& state) {
  long from, to;
  segment_keys<SIDE>(p, segment, from, to);
  if constexpr (SIDE == Side::RIGHT) std::swap(from, to);
  KeyState<SIDE> keys{state, from, true};
  return keys.advance(p, w, row, to);
}

// The state of the keys with which a segment begins.
template <Side SIDE>
inline KeyState<SIDE> first_keys(const Problem& p, Work& w, const Carries& carries, real* memory, Row row, long segment) {
  State state(memory);
  if constexpr (TOTAL) {
    const bool empty = begin(carries, state, row.index, segment, false);
    KeyState<SIDE> keys{state, empty ? 0 : p.keys, empty};
    keys.advance(p, w, row, p.keys);
    return keys;
  } else if constexpr (SIDE == Side::RIGHT) {
    const bool last = segment + 1 == p.segments, empty = begin(carries, state, row.index, segment, last);
    return {state, last ? p.keys : edge_of<SIDE>(p, segment_start(p, segment + 1)), empty};
  } else {
    const bool empty = begin(carries, state, row.index, segment, segment == 0);
    return {state, segment == 0 ? 0 : edge_of<SIDE>(p, segment_start(p, segment)), empty};
  }
}

// Queries meet the keys that are far on one side: body(work, row, segment, chunk, keys).
template <Side SIDE, typename Body>
inline void query_sweep(const Problem& p, const Pool& pool, const Shared& shared, Body body) {
  scanned(
      p, pool, shared, SIDE == Side::LEFT,
      [&](Work& w, Row row, long segment, State& state) { return add_segment_keys<SIDE>(p, w, row, segment, state); },
      [&](Work& w, real* memory, Row row, long segment, const Carries& carries) {
        KeyState<SIDE> keys = first_keys<SIDE>(p, w, carries, memory, row, segment);
        const long start = segment_start(p, segment), stop = segment_start(p, segment + 1);
        for (long k = start; k < stop; ++k) {
          const long chunk = SIDE == Side::RIGHT ? start + stop - 1 - k : k;
          keys.advance(p, w, row, edge_of<SIDE>(p, chunk));
          body(w, row, segment, chunk, keys);
        }
      });
}

// ---------------------------------------------------------------- the sweep of the keys

// What the queries of a segment add to the state.
template <Side SIDE>
inline bool add_segment_queries(const Problem& p, Work& w, Row row, long segment, State& state) {
  const long start = segment_start(p, segment), stop = segment_start(p, segment + 1);
  bool reset = false, empty = true;
  for (long k = start; k < stop; ++k) {
    const long chunk = SIDE == Side::LEFT && !TOTAL ? start + stop - 1 - k : k;
    reset |= absorb_queries<SIDE>(p, w, row, chunk, state, empty, nothing);
  }
  return reset;
}

// Gradients of a segment's keys, where all queries are far from all keys.
template <Side SIDE>
inline void total_keys(const Problem& p, Work& w, const Carries& carries, State& state, Row row, long segment) {
  w.ahead = CHUNK;
  if (begin(carries, state, row.index, segment, false)) add_segment_queries<SIDE>(p, w, row, segment, state);
  key_gradients(p, w, row, state, p.keys * segment / p.segments, p.keys * (segment + 1) / p.segments);
}

// Gradients of a segment's keys from the queries after their windows; if FUSED also from those in them, and dQ of these.
template <Side SIDE>
inline void keys_from_the_right(const Problem& p, Work& w, const Carries& carries, State& state, Row row, long segment) {
  w.ahead = -CHUNK;
  const long start = segment_start(p, segment), next = segment_start(p, segment + 1);
  const bool at_end = segment + 1 == p.segments;
  bool empty = begin(carries, state, row.index, segment, at_end);
  long place = edge_of<SIDE>(p, at_end ? next - 1 : next);
  for (long chunk = next - 1; chunk >= start; --chunk) {
    const long edge = edge_of<SIDE>(p, chunk), last = chunk_last(chunk, p.queries);
    if constexpr (FUSED) {
      clear_rows(p.dk.rows(row.b, row.h), edge, last, D, w.ahead);
      clear_rows(p.dv.rows(row.b, row.h), edge, last, DV, w.ahead);
    }
    if (edge < place && !empty) {
      const long from = DOCUMENTS ? document_start(p.documents + row.b * p.keys, place - 1, edge) : edge;
      key_gradients(p, w, row, state, from, place);
    }
    place = std::min(place, edge);
    absorb_queries<SIDE>(p, w, row, chunk, state, empty, [&](long g) {
      if constexpr (FUSED) {
        std::fill_n(w.dx, D * CHUNK, real(0));
        local_gradients(p, w, row, segment, edge, last, Halo{nullptr});
        put_transposed<D>(w.dx, p.dq.rows(row.b, row.h * p.groups + g), edge, static_cast<int>(last - edge));
      }
    });
  }
  if (!CAUSAL && start == 0 && place > 0 && !empty) key_gradients(p, w, row, state, 0, place);
}

// Gradients of a segment's keys from the queries before their windows.
template <Side SIDE>
inline void keys_from_the_left(const Problem& p, Work& w, const Carries& carries, State& state, Row row, long segment) {
  w.ahead = CHUNK;
  const long start = segment_start(p, segment), next = segment_start(p, segment + 1);
  bool empty = begin(carries, state, row.index, segment, segment == 0);
  long place = edge_of<SIDE>(p, start == 0 ? 0 : start - 1);
  const auto reach = [&](long edge) {
    long from = place, to = edge;
    place = edge;
    if (empty || from >= to) return;
    if constexpr (DOCUMENTS) to = document_stop(p.documents + row.b * p.keys, from, to);
    key_gradients(p, w, row, state, from, to);
  };
  for (long chunk = start; chunk < next; ++chunk) {
    reach(edge_of<SIDE>(p, chunk));
    absorb_queries<SIDE>(p, w, row, chunk, state, empty, nothing);
  }
  if (segment + 1 == p.segments) reach(p.keys);
}

// The gradients of the keys by the queries to which they are far on one side.
template <Side SIDE>
inline void key_sweep(const Problem& p, const Pool& pool, const Shared& shared) {
  scanned(
      p, pool, shared, SIDE != Side::LEFT,
      [&](Work& w, Row row, long segment, State& state) { return add_segment_queries<SIDE>(p, w, row, segment, state); },
      [&](Work& w, real* memory, Row row, long segment, const Carries& carries) {
        State state(memory);
        if constexpr (TOTAL)
          total_keys<SIDE>(p, w, carries, state, row, segment);
        else if constexpr (SIDE == Side::RIGHT)
          keys_from_the_left<SIDE>(p, w, carries, state, row, segment);
        else
          keys_from_the_right<SIDE>(p, w, carries, state, row, segment);
      });
}
