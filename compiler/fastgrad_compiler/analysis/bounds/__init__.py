"""Ranges of entries and norms of rows that the program itself proves, rounded outwards."""
