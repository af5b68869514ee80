"""A small suite for airspeed velocity: the same jobs at each commit, on simulated counts. See benchmarks/README.md."""
