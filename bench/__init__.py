"""Measurements and checks run by a person or by `make`; nothing else of ours imports this."""
