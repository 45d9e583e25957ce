"""What to install for the parts of the package that need more than the rest."""

from __future__ import annotations


def missing(package: str, extra: str, error: ImportError) -> ImportError:
    """What to raise where `package`, of an extra of ours, cannot be imported, or is too old."""
    return ImportError(f"{package} is needed here ({error}): pip install 'cute_flash[{extra}]'")
