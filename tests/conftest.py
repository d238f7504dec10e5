import os

# Set before torch is imported: ranks share the cores, and the tests that vary the number of threads say so themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis

hypothesis.settings.register_profile("shared cores", deadline=None, derandomize=True)
hypothesis.settings.load_profile("shared cores")
