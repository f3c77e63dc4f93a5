"""`python -m tests.fuzz SURFACE --count N --seed S`: any number of cases, from any seed."""

from __future__ import annotations

import argparse
import time

from tests.fuzz.surface import today
from tests.fuzz.surfaces import SURFACES

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
parser.add_argument("surface", choices=[*SURFACES, "all"])
parser.add_argument("--count", type=int, default=1000, help="cases of each surface")
parser.add_argument("--seed", type=int, default=today(), help="by default that of the day")
args = parser.parse_args()
for name in SURFACES if args.surface == "all" else [args.surface]:
    start = time.monotonic()
    done = SURFACES[name].run(args.count, args.seed)
    print(f"{name}: {done} cases of seed {args.seed} in {time.monotonic() - start:.0f} s, all well")
