"""Writes the generated parts of docs/coverage.md: ``python docs/coverage.py``. ``--check`` changes nothing; status 1 if they are not true."""

import re
import sys
from pathlib import Path

from tpinv import contract

FILE = Path(__file__).with_name("coverage.md")


def render(text: str, parts: dict[str, str]) -> str:
    """``text`` with what stands between <!-- name --> and <!-- end --> replaced."""
    for name, part in parts.items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda found, part=part: found[1] + part + found[2], text, flags=re.S
        )
        if count != 1:
            raise ValueError(f"{FILE.name} has {count} places for {name}; it must have one")
    return text


def parts() -> dict[str, str]:
    from tpinv.integrations.megatron import settings  # needs megatron-core

    return {"sums": contract.markdown(), "megatron": settings.render_markdown().replace("\n### ", "\n#### ").replace("### ", "#### ", 1)}


def main() -> int:
    written = FILE.read_text(encoding="utf-8")
    true = render(written, parts())
    if "--check" in sys.argv:
        return int(true != written)
    FILE.write_text(true, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
