// FASTGRAD_VARIANT: 0 float32, 1 float64, 2 bfloat16 inputs with float32 arithmetic.
#if FASTGRAD_VARIANT == 1
using real = double;
#else
using real = float;
#endif
#if FASTGRAD_VARIANT == 2
struct input {
  std::uint16_t bits;
};
#else
using input = real;
#endif

inline real number(real x) { return x; }
#if FASTGRAD_VARIANT == 2
inline real number(input x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  real value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void put(real value, input& target) {  // rounds to the nearest, ties to even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  target.bits = value == value ? static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}
#endif
inline void put(real value, real& target) { target = value; }
