def weight_ranges(program, weights): return {}
