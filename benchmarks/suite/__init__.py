"""What `benchmarks/compare.py` measures: one small function for each row of its table."""
