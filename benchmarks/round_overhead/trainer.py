"""The resident trainer, which notes when steps begin and end."""

from app.trainer import main
from benchmarks.round_overhead import stamps

if __name__ == "__main__":
    stamps.install()
    main()
