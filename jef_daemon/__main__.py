"""`python -m jef_daemon` is `jef`."""

from jef_daemon.cli import main

if __name__ == "__main__":
    main()
