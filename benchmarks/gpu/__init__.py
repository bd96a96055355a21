"""Everything that needs a GPU, in stages: `make gpu`, or `python -m benchmarks.gpu`."""
