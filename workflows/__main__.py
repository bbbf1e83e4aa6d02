"""The program `azeotrope` without its installation: `python -m workflows COMMAND ...`."""

from workflows.cli import main

if __name__ == "__main__":
    main()
