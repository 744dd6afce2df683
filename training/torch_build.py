"""Which build of torch fits the GPUs of this machine, for `make setup`.

It runs before torch is installed, so it needs the standard library only.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The oldest driver for each major version of CUDA, by NVIDIA's CUDA compatibility guide.
DRIVERS = {11: 450, 12: 525, 13: 580}
# First and last compute capability of each build of torch 2.13, by PyTorch's support matrix. The
# first build is what pip installs for a plain version.
BUILDS = {"cu130": (75, 129), "cu126": (50, 90)}
PAGE = "pytorch.org/get-started/previous-versions"
WAY_OUT = "`make -B setup` installs the build that fits, or says why there is none"


def choose(cards: Sequence[tuple[str, int, int]], pin: str) -> tuple[str, str]:
    """The requirement for pip, and a line about it where it is not the pin or does not fit.

    Args:
        cards: Name, major driver version and compute capability (90 for 9.0) of each.
        pin: Such as "torch==2.13.0".
    """
    lacks: list[str] = []
    for build, (first, last) in BUILDS.items():
        needed = DRIVERS[int(build[2:4])]
        old = any(driver < needed for _, driver, _ in cards)
        other = any(not first <= arch <= last for *_, arch in cards)
        if not (old or other):
            break
        lack = [f"driver {needed} or newer"] * old + [f"sm_{first} to sm_{last}"] * other
        lacks.append(f"{build} needs {' and '.join(lack)}")
    else:
        return pin, f"no build of {pin} fits, {', '.join(lacks)}; the CPU will be used"
    if not lacks:
        return pin, ""
    wanted = f"{pin}+{build}"
    return wanted, (
        f"{wanted} fits, {lacks[0]}; if pip does not find it, {pin} follows, which cannot use the "
        f"GPU: PIP_EXTRA_INDEX_URL=... make -B setup, with the index that {PAGE} names for CUDA "
        f"{build[2:4]}.{build[4:]}"
    )


def find_cards() -> list[tuple[str, int, int]]:
    """The cards for `choose`; none where nvidia-smi does not list them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    said = done.stdout.decode(errors="replace")
    found = re.findall(r"^(.+), (\d+)[\d.]*, (\d+)\.(\d)\s*$", said, re.MULTILINE)
    return [(name, int(driver), int(major + minor)) for name, driver, major, minor in found]


def main() -> None:
    """Print the requirement for pip, and on stderr why it is that one."""
    pins = Path(__file__).parents[1].joinpath("requirements.txt").read_text(encoding="utf-8")
    cards = find_cards()
    wanted, line = choose(cards, re.findall(r"^torch==[\d.]+", pins, re.MULTILINE)[0])
    if line:
        found = {f"{name} (sm_{arch}, driver {driver})": None for name, driver, arch in cards}
        print(f"setup: {' and '.join(found)}: {line}", file=sys.stderr)
    print(wanted)


if __name__ == "__main__":
    main()
