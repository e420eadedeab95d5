"""Convert a checkpoint of the authors to this project's format, in detrex or in our repository.

    python projects/stageinteractor/converter.py \\
        --source_model released.pth --output_model here.pth

``tools/convert.py checkpoint`` of the full repository converts in both directions.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder, which has a `data`

from projects.stageinteractor.checkpoint.conversion import convert  # noqa: E402
from projects.stageinteractor.errors import UserError  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source_model", required=True, metavar="FILE")
    parser.add_argument("--output_model", required=True, metavar="FILE")
    args = parser.parse_args()
    try:
        print(convert(args.source_model, args.output_model, "project"))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
