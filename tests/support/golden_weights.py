"""Names and shapes of what the released checkpoints hold (see golden/README.md)."""

from pathlib import Path

RELEASED = Path(__file__).parent / "golden/released"


def released_shapes(model: str) -> dict[str, tuple]:
    """Name and shape of every entry of a released checkpoint, such as "r50" or "swin_s"."""
    lines = (line.split(" ") for line in (RELEASED / f"{model}.txt").read_text().splitlines())
    return {name: tuple(map(int, filter(None, shape.split(",")))) for name, shape in lines}
