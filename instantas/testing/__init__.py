"""What the tests and the benchmarks share: the oracle, its grids and examples, emulated CUDA, tiny pipelines."""
