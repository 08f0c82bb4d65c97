"""Models that differ by permutations of their units, heads and dimensions, brought into one order before a merge."""
