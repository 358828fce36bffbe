"""A page with every block of the standard library: what its comment says, its signature, its source."""

from __future__ import annotations

from fastgrad_compiler.frontend.modules import standard_library
from fastgrad_dsl.lsp.words import comment_above, signature
from fastgrad_grammar import ast
from fastgrad_grammar.quote import html

INTRODUCTION = """# Standard library: source

Every block of `std`, with its source: [the standard library](standard-library.md) says what they compute and how to
choose. The files are in `grammar/fastgrad_grammar/std/`; copy a block into a file of your own to change it.
"""


def library_page() -> str:
    """The page in Markdown, one section for each file and one below it for each block."""
    files: dict[str, list[ast.BlockDecl]] = {}
    for block in standard_library().blocks.values():
        files.setdefault(block.span.source.path, []).append(block)
    parts = [INTRODUCTION]
    for path, blocks in files.items():
        parts.append(f"## {path}\n")
        parts += [_section(block) for block in blocks]
    return "\n".join(parts)


def _section(block: ast.BlockDecl) -> str:
    comment = comment_above(block.span.source, block)
    said = f"```text\n{comment}\n```\n\n" if comment else ""
    line = block.span.source.position(block.span.start)[0]
    where = html(f"{block.span.source.path}, line {line}")
    heading = f"### std.{block.name.text}\n\n`{signature(block, 'std.')}`\n\n"
    return f"{heading}{said}```tfg\n{block.span.text}\n```\n\n<small>{where}</small>\n"
