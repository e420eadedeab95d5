"""detrex for the tests: the checkout that DETREX_CHECKOUT names, otherwise a stand-in.

The stand-in has the files that our folder and a run meet, with detrex's names, fields, defaults and
order of calls. The checkout needs what detrex imports, but not its compiled part.
"""

import os
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("DETREX_CHECKOUT", "")
FOLDER = Path(CHECKOUT).resolve() if CHECKOUT else Path(__file__).with_name("detrex_checkout")
needs_detrex = pytest.mark.skipif(not CHECKOUT, reason="DETREX_CHECKOUT names no detrex")

if CHECKOUT:
    if not (FOLDER / "detrex/modeling/criterion").is_dir():
        raise SystemExit(f"DETREX_CHECKOUT={CHECKOUT} is no checkout of detrex")
    sys.path.append(str(FOLDER))  # behind our own `projects`, `tools` and `configs`
