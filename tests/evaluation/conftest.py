"""The fakes are imported by worker processes too, which inherit this path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
