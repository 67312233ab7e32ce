"""A word at import where transformers is newer than what this version was tested with."""

import warnings
from importlib import metadata

from packaging.requirements import Requirement

_NAME = "transformers"


def warn_if_untested() -> None:
    """UserWarning if the installed transformers lies above the bounds in the distribution's own metadata."""
    try:
        required = metadata.requires("liger-linear") or ()
    except metadata.PackageNotFoundError:
        # Run from its sources, which say nothing about themselves.
        return
    installed = metadata.version(_NAME)
    for bounds in (Requirement(line).specifier for line in required if Requirement(line).name == _NAME):
        upper = [bound for bound in bounds if bound.operator.startswith("<")]
        if not all(bound.contains(installed, prereleases=True) for bound in upper):
            text = f"transformers: expected {bounds}, which liger-linear was tested with, got {installed}"
            warnings.warn(text, UserWarning, stacklevel=2)


warn_if_untested()
