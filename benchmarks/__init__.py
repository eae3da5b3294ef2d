"""Performance figures, one command each: `python -m benchmarks.NAME`. They are not installed."""
