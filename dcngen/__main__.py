import sys

from dcngen.cli import main

if __name__ == "__main__":
    sys.exit(main())
