"""From two cameras to one movie."""
