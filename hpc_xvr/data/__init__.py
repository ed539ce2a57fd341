"""From camera files or simulated experiments to a corpus, and from there to samples."""
