"""The benchmarks: `python -m bench.report`, or `pytest bench`."""

import logging

# peft imports bitsandbytes, which warns on some CPUs that a kernel of the hub is missing: none is used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
