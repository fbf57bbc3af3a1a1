"""``python -m convex_head``."""

from convex_head.cli import main

if __name__ == "__main__":  # worker processes import this module
    main()
