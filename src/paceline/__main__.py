"""The command as a module: `python -m paceline`, or `accelerate launch -m paceline distill`."""

from paceline.cli import main

if __name__ == "__main__":
    main()
