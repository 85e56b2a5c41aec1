"""One module per command of the command line, each a function with Typer-annotated parameters."""
