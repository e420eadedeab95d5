"""PNG files that may replace an earlier picture of the same tool, and nothing else."""

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ..errors import UserError

SOFTWARE = "stageinteractor tools/visualize.py"  # noted in the file, to recognise it later


def prepare_png(path: Path):
    """Make the folder of a picture that is going to be written.

    Raises:
        UserError: the name does not end in .png, or the file exists and is not one of ours.
        OSError: the folder cannot be made.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path}: a PNG file is written, so its name must end in .png")
    if path.exists() and not is_ours(path):
        raise UserError(f"{path} is not a picture of this tool: choose another --output")
    path.parent.mkdir(parents=True, exist_ok=True)


def is_ours(path: Path) -> bool:
    """Return whether a file is a picture that `save_png` has written."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == SOFTWARE
    except OSError:  # not a PNG file
        return False


def save_png(figure: Figure, path: Path):
    """Write a figure, and print where."""
    done = "replaced" if path.exists() else "written"
    figure.savefig(path, format="png", metadata={"Software": SOFTWARE})
    print(f"{path} {done}")
