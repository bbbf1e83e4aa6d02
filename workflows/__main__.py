"""`python -m workflows COMMAND ...` is the program `azeotrope`, also where that is not installed."""

from workflows.cli import main

if __name__ == "__main__":
    main()
