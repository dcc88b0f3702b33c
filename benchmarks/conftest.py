"""pytest's importlib mode leaves this folder off sys.path; test_speed.py shares its inputs with speed.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
