"""`python -m gpt2np` is the `gpt2np` command."""

from .cli import main

main()
