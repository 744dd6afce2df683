"""Imports, builds and the interpreter tests of the kernels under other versions, outside CI.

    python -m tests.matrix
    python -m tests.matrix 3.13/2.15.0/3.9.0      # Python, torch and triton

Each is a throw-away environment of up to 6 GB, so they come one after another. A row whose Python
is neither in PATH nor under pyenv has shown nothing and is red; --skip-missing passes over it. The
exit status is 1 if a row is red.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants import TESTS

ROOT = Path(__file__).parents[1]
# The oldest and the newest that are supported, and the newest but one.
DEFAULT = ("3.11/2.11.0/3.6.0", "3.12/2.14.1/3.8.0", "3.13/2.15.0/3.9.0")
CHECKS = {
    "imports": ["-c", "import train, kernels; kernels.TRITON; print('imports')"],
    "builds": ["-m", "bench.resources"],
    "tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow",
              "tests/test_interpreter.py", *(file for files in TESTS.values() for file in files)],
}  # fmt: skip


def find_python(version: str) -> str | None:
    pyenv = Path.home() / ".pyenv" / "versions"
    found = sorted(pyenv.glob(f"{version}.*/bin/python{version}"))
    # pyenv's own name in PATH is a script that may refuse to run the version.
    return str(found[-1]) if found else shutil.which(f"python{version}")


def make_environment(folder: Path, python: str, torch: str, triton: str) -> str:
    """An environment of the pins of `make setup`, but for these two; returns its Python."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = str(folder / "bin" / "python")
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    others = [pin for pin in pins if re.match(r"(?!torch|triton)\w", pin)]
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    # torch asks for the triton it was released with; others are what this is about.
    subprocess.run([*pip, "--no-deps", f"triton=={triton}"], check=True)
    subprocess.run([*pip, *others, "pytest", "hypothesis"], check=True)
    return inside


def try_versions(row: str, checks: Sequence[str], skip_missing: bool = False) -> bool:
    """Run the checks under one row; prints a line for each."""
    version, torch, triton = row.split("/")
    python = find_python(version)
    if python is None:
        verdict = "skipped" if skip_missing else "RED"
        print(f"{row}: {verdict}, there is no python{version} here", flush=True)
        return skip_missing
    # No compiled module and no kernel of another version may be found.
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environ |= {"TRITON_CACHE_DIR": f"{name}/triton", "PYTHONPYCACHEPREFIX": name}
        try:
            inside = make_environment(Path(name, "venv"), python, torch, triton)
        except subprocess.CalledProcessError as error:
            print(f"{row}: RED, cannot be installed: {error}", flush=True)
            return False
        green = True
        for what in checks:
            begun = time.monotonic()
            command = [inside, *CHECKS[what]]
            done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
            lines = (done.stdout + done.stderr).strip().splitlines()
            verdict = "green" if done.returncode == 0 else "RED"
            seconds = time.monotonic() - begun
            print(f"{row}: {what} {verdict}, {seconds:.0f} s: {''.join(lines[-1:])}", flush=True)
            if done.returncode:
                print(*(f"    {line}" for line in lines[-40:]), sep="\n", flush=True)
                green = False
        return green


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("rows", nargs="*", default=DEFAULT, help="PYTHON/TORCH/TRITON")
    parser.add_argument("--check", action="append", choices=[*CHECKS], help="default: all")
    parser.add_argument("--skip-missing", action="store_true", help="rows without their Python")
    args = parser.parse_args(argv)
    if bad := [row for row in args.rows if not re.fullmatch(r"[\d.]+/[\w.+]+/[\w.+]+", row)]:
        parser.error(f"rows: expected PYTHON/TORCH/TRITON, got {bad[0]!r}")
    checks = args.check or [*CHECKS]
    verdicts = [try_versions(row, checks, args.skip_missing) for row in args.rows]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
