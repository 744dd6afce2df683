"""What train.py uses and what has a test of its own."""
