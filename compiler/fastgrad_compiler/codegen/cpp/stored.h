// What a model and its state hold, and what is given to it, is `input`; between operations stands `real`. Where the two
// are one, these are the same memory.
struct Wide {
  std::vector<real> memory;
  const real* data;
#if FASTGRAD_VARIANT == 2
  Wide(const input* from, long count) : memory(count), data(memory.data()) {
    for (long i = 0; i < count; ++i) memory[i] = number(from[i]);
  }
#else
  Wide(const input* from, long) : data(from) {}
#endif
  Wide(const Wide&) = delete;
};
struct Stored {
  std::vector<input> memory;
  const input* data;
#if FASTGRAD_VARIANT == 2
  Stored(const real* from, long count) : memory(from ? count : 0), data(memory.data()) {
    for (long i = 0; i < static_cast<long>(memory.size()); ++i) put(from[i], memory[i]);
  }
#else
  Stored(const real* from, long) : data(from) {}
#endif
  Stored(const Stored&) = delete;
};
// A result, which is written when it goes.
struct Result {
  std::vector<real> memory;
  real* data;
#if FASTGRAD_VARIANT == 2
  input* const to;
  Result(input* to, long count) : memory(count), data(memory.data()), to(to) {}
  ~Result() {
    for (std::size_t i = 0; i < memory.size(); ++i) put(memory[i], to[i]);
  }
#else
  Result(input* to, long) : data(to) {}
#endif
  Result(const Result&) = delete;
};
