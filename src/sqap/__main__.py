"""``python -m sqap``."""

from sqap.cli import app

if __name__ == "__main__":
    app(prog_name="sqap")
