#!/usr/bin/env python
"""The old name of `tools/convert.py dataset`, which works until version 0.3."""

import sys

import _start  # noqa: F401
import convert

if __name__ == "__main__":
    sys.exit(convert.main(["dataset", *sys.argv[1:]]))
