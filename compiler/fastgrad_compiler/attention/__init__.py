"""What an attention is, and how it is recognised in a program."""
