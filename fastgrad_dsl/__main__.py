"""`python -m fastgrad_dsl`: the command line, for a machine on which the command `fastgrad` is not found."""

from fastgrad_dsl.commands.cli import main

if __name__ == "__main__":
    main()
