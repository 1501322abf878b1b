"""Benchmarks of the loss: time, memory and error against torch. Run `python -m bench` from a checkout."""
