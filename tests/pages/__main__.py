"""Write the generated pages: `python -m tests.pages`; print which of them changed.

The exit code is 1 if one changed, so that a commit hook stops for it.
"""

import sys

from .written import ROOT, changed


def main() -> int:
    """Write what differs from its files."""
    pages = changed()
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 1 if pages else 0


if __name__ == "__main__":
    sys.exit(main())
