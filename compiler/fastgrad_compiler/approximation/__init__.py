"""Polynomials in place of exp: coefficients, certificates and what rounding adds."""
