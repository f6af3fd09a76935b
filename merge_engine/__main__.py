"""python -m merge_engine: the same as merge-engine."""

import sys

from merge_engine.cli.main import command

sys.exit(command())
