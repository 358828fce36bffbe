"""Polynomials in place of exp: coefficients, features, certificates and what rounding adds."""
