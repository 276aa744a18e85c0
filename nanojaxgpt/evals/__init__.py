"""Benchmarks: tasks as data, a scorer of continuations, and the adapter for lm-eval."""
