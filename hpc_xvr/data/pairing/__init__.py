"""How a camera's files are read, and how two cameras belong together."""
