"""Side-by-side benchmarks. Each prints what it measured and the ratios within its own run; none is a test."""
