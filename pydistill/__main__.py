"""``python -m pydistill``: the console command."""

from pydistill.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
