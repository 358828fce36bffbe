"""The command line, a file for each command: its options, and what it does with them."""
