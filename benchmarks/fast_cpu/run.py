"""Runs a script with the convolutions of winograd.py and, where it is installed (Debian's libjemalloc2), with jemalloc.

    python benchmarks/fast_cpu/run.py examples/train_diffusion.py ...

glibc hands large freed blocks back to the system and faults them in again: 1 GB for a training step of eight latents,
a quarter of its time. jemalloc keeps them.
"""

import os
import runpy
import sys
from ctypes.util import find_library
from pathlib import Path

KEEP = "dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1,thp:always,oversize_threshold:0"
"""Freed memory is kept for good, all of it in one place and in large pages."""


def main() -> None:
    """Restart with jemalloc, which has to be there before Python is; then run the script."""
    found = find_library("jemalloc")
    if "jemalloc" not in os.environ.get("LD_PRELOAD", ""):
        if found is None:
            print("jemalloc is not installed (Debian: libjemalloc2): going on with the system's allocator.")
        else:
            os.execve(
                sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": found, "MALLOC_CONF": KEEP}
            )
    sys.path.insert(0, str(Path(__file__).parent))
    import winograd

    winograd.install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
