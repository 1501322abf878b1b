"""Run the console command with ``python -m pydistill``."""

from pydistill.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
