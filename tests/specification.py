#!/usr/bin/env python3
"""Checks SPECIFICATION.md: every promise that is held names a test, and every test named is one that cargo runs."""
import os
import pathlib
import re
import subprocess
import sys

root = pathlib.Path(__file__).resolve().parent.parent
cargo = os.environ.get("CARGO", "cargo")


def names(*flags):
    command = [cargo, "test", "--workspace", "--quiet", "--", "--list", *flags]
    run = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return {line.removesuffix(": test") for line in run.stdout.splitlines() if line.endswith(": test")}


# A test that is not run shows nothing.
listed = names() - names("--ignored")
wrong = []
named = 0
for row in (root / "SPECIFICATION.md").read_text().splitlines():
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    if len(cells) != 3 or cells[2] not in ("held", "partial", "open"):
        continue
    promise, tests, state = cells[0], re.findall(r"`([^`]+)`", cells[1]), cells[2]
    named += len(tests)
    if state != "open" and not tests:
        wrong.append(f"no test shows this: {promise}")
    wrong += [f"no runner lists {test}, which is to show this: {promise}" for test in tests if test not in listed]
if wrong or not named:
    sys.exit("SPECIFICATION.md: " + "\n".join(wrong or ["names no test"]))
print(f"SPECIFICATION.md: {named} names of tests, all listed")
