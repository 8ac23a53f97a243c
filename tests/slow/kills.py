"""Kills every trainer at random moments, resumes it, and compares with the run that was left alone, bit for bit.

    python tests/slow/kills.py [--kills 20] [--stages line autoencoder ...]

Prints one JSON line per trainer; the exit code is 1 if a resumed run differs.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[1] / name) for name in (".", "trainers"))

import conftest
import killing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stages", nargs="+", choices=killing.STAGES, default=list(killing.STAGES))
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        brains = Path(temporary) / "brains"
        conftest.write_brains(brains)
        for stage in args.stages:
            start = time.monotonic()
            found = killing.at_random(stage, Path(temporary) / stage, brains, args.kills)
            print(json.dumps({"stage": stage, **found, "seconds": round(time.monotonic() - start)}), flush=True)
            failed |= bool(found["problems"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
