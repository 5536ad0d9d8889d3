"""Other checkpoint formats, and other libraries' interfaces. Each module imports its library only when it is used."""
