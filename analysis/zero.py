"""Moved: this command is now in benchmarks/."""

import sys

if __name__ == '__main__':
  sys.exit('python -m analysis.zero is now python -m benchmarks.zero, with the same flags')
