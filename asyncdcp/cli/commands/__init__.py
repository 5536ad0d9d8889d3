"""One module per command, each with its ``command``; imported when it is called, so that the others cost nothing."""
