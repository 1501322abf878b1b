"""Throughput and memory of the loss against torch. Run `python -m bench` from a checkout."""
