#!/usr/bin/env python
"""The old name of `tools/check.py data`, which works until version 0.3."""

import sys

import _start  # noqa: F401
import check

if __name__ == "__main__":
    sys.exit(check.main(["data", *sys.argv[1:]]))
