"""Runs a script with the convolutions of winograd.py and an allocator that keeps freed memory (page faults cost 20 %).

python benchmarks/fast_cpu/run.py examples/train_diffusion.py ...
"""

import os
import runpy
import sys
from pathlib import Path

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "536870912",
}


def main() -> None:
    """Restart with the allocator's settings, which glibc reads at the start only; then run the script."""
    if os.environ.get("MALLOC_MMAP_MAX_") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    sys.path.insert(0, str(Path(__file__).parent))
    import winograd

    winograd.install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
