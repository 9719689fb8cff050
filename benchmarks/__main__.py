"""``python -m benchmarks cpu``; of a GPU, ``python -m benchmarks.gpu``."""

import sys

from benchmarks import cpu

if __name__ == "__main__":
    if sys.argv[1:2] == ["cpu"]:
        del sys.argv[1]
    sys.exit(cpu.main())
