using bits = std::conditional_t<sizeof(real) == 8, std::uint64_t, std::uint32_t>;

// e^x to rounding: 2^k e^r with |r| <= ln(2) / 2 and a Taylor polynomial of e^r; the bits of k are those of x log2(e)
// + SHIFT. Without a branch, so that the loop over a row is one of vectors.
inline real exponential(real x) {
  constexpr bool DOUBLE = sizeof(real) == 8;
  constexpr int TERMS = DOUBLE ? 13 : 7, FRACTION = DOUBLE ? 52 : 23;
  constexpr bits BIAS = DOUBLE ? 1023 : 127;
  constexpr real HIGH = DOUBLE ? 0x1.62e42feep-1 : 0x1.62e4p-1;
  constexpr real LOW = DOUBLE ? 1.90821492927058770002e-10 : 1.42860677e-6, SHIFT = DOUBLE ? 0x1.8p52 : 0x1.8p23;
  constexpr real LEAST = DOUBLE ? -708 : -87, MOST = DOUBLE ? 709 : 88;
  const real inside = x < LEAST ? LEAST : x > MOST ? MOST : x;
  const real shifted = inside * real(1.44269504088896340736) + SHIFT;
  const real k = shifted - SHIFT;
  const real r = (inside - k * HIGH) - k * LOW;
  real sum = real(1) / TERMS;
#pragma GCC unroll 16
  for (int term = TERMS - 1; term >= 1; --term) sum = (sum * r + real(1)) * (real(1) / term);
  sum = sum * r + real(1);
  bits power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power + BIAS) << FRACTION;
  real scale;
  std::memcpy(&scale, &power, sizeof scale);
  const real beyond = x > MOST ? std::numeric_limits<real>::infinity() : real(0);
  return x < LEAST || x > MOST ? beyond : sum * scale;
}

inline real sigmoid(real x) { return real(1) / (real(1) + exponential(-x)); }
