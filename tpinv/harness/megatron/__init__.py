"""Megatron-Core: trained and recorded (verify.py), and timed (bench.py)."""
