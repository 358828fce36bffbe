// ---------------------------------------------------------------- pairs of tokens, one by one

inline vector polynomial(vector s) {
  vector sum = vector{} + real(COEFFICIENTS[DEGREE]);
#pragma GCC unroll 16
  for (int power = DEGREE - 1; power >= 0; --power) sum = sum * s + real(COEFFICIENTS[power]);
  return sum;
}

inline vector slope(vector s) {
  vector sum = vector{} + real(DEGREE * COEFFICIENTS[DEGREE]);
#pragma GCC unroll 16
  for (int power = DEGREE - 1; power >= 1; --power) sum = sum * s + real(power * COEFFICIENTS[power]);
  return sum;
}
