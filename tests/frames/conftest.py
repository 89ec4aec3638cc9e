"""The samples are a module that every file of tests here imports."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
