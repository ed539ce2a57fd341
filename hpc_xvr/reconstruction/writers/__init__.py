"""Write reconstructed frames in the formats people open, and small movies to look at.

A file or folder appears under its name only when it is complete.
"""

from hpc_xvr.reconstruction.writers.about import FULL, Calibration, Provenance
from hpc_xvr.reconstruction.writers.film import (
    Doubt,
    Movie,
    check_movie,
    frames_shown,
    open_movie,
    write_movie,
)
from hpc_xvr.reconstruction.writers.sequence import (
    SEQUENCE_FORMATS,
    Dtype,
    as_stored,
    check_sequence,
    write_sequence,
)

__all__ = [
    "FULL",
    "SEQUENCE_FORMATS",
    "Calibration",
    "Doubt",
    "Dtype",
    "Movie",
    "Provenance",
    "as_stored",
    "check_movie",
    "check_sequence",
    "frames_shown",
    "open_movie",
    "write_movie",
    "write_sequence",
]
