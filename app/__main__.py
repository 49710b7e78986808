"""`python -m app` is the command `heliostat`, for `ray job submit`."""

from __future__ import annotations

from app.cli import main

if __name__ == "__main__":
    main()
