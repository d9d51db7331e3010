"""Moved: this command is now in benchmarks/."""

import sys

if __name__ == '__main__':
  sys.exit(
    'python -m analysis.complexity is now python -m benchmarks.complexity, with the same flags'
  )
