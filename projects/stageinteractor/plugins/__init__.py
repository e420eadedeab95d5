"""Parts of the method for other detectors."""
