"""x"""


def prepare_output(folder: str, result: str) -> Path:
    """Make the folder for results.

    Args:
        result: the file that is in it once there are results, which are not written over.

    Raises:
        UserError: it cannot be made or written to, or holds results.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"cannot write to {path}: choose another with --output FOLDER")
    if (path / result).exists():
        raise UserError(f"{path} holds {result} already: choose another with --output FOLDER")
    return path
