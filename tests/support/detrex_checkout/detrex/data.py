"""The mapper of detrex's common data, in whose place our configs put Detectron2's."""


def DetrDatasetMapper(**options):
    raise AssertionError(f"a config has kept detrex's mapper, with {options}")
