"""TorchTitan: a small decoder (recipe.py), trained and recorded (verify.py), and a step timed (bench.py)."""
