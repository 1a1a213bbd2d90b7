"""``python -m mm`` is the command ``mm``."""

if not __package__:
    raise SystemExit("Run `mm …` or `python -m mm …`: run as a file, mm/tokenizers would hide the library tokenizers.")

from mm.cli import main

if __name__ == "__main__":
    main()
