"""How far a reconstructed movie may be believed: what it can be compared with, and how."""
