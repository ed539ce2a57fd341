"""Camera files into a corpus."""
