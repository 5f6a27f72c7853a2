"""Benchmarks against peers, each in one run with its peer; every figure in the docs names its command."""
