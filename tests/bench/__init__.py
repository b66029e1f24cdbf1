"""Benchmarks of a whole hostd on this machine (`make bench`)."""
