"""Passes over the program: each a function Program -> Program, with its rule table."""
