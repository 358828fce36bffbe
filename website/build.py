"""`python -m website.build`: the site from docs/, what is generated beside it, and Sphinx with the theme Furo.

Sphinx and not MkDocs, because its search reads an index that is a script: it works on pages opened as files, where a
browser lets no page fetch another.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from sphinx.cmd.build import build_main

from website.pages import write_pages

HERE = Path(__file__).parent
OUT = HERE.parent / "build" / "docs"


def build(out: Path) -> int:
    """Write the site to a folder; a warning, such as a link that leads nowhere, is an error. Returns the status."""
    with TemporaryDirectory() as folder:
        pages = Path(folder)
        write_pages(pages)
        options = ["-b", "html", "-q", "-E", "-W", "--keep-going", "-c", str(HERE)]
        options += ["-D", f"html_extra_path={pages / 'pages' / 'extra'}"]
        doctrees = str(pages / "doctrees")
        return build_main([*options, "-d", doctrees, str(pages / "pages"), str(out)])


def main() -> None:
    """The command of `make docs`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of the site")
    out = parser.parse_args().out
    status = build(out)
    if status == 0:
        print(f"written to {out}/index.html")
    sys.exit(status)


if __name__ == "__main__":
    main()
