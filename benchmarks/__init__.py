"""What the parts cost beside a named peer on the same work: one module a benchmark, run by `benchmarks/run.py` (`make bench`).

A module of this package with a function `rows(rounds: int) -> list[Row]` is a benchmark; nothing has to be registered.
"""
