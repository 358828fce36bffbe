"""The parser tables of tfg.lark, built once and kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import lark
from platformdirs import user_cache_dir

_GRAMMAR = Path(__file__).with_name("tfg.lark")
_DIGEST_BYTES = 32


@lru_cache(maxsize=1)
def load_grammar() -> lark.Lark:
    """The LALR parser of tfg.lark, from the cache where there is a good entry, else built and cached."""
    text = _GRAMMAR.read_text(encoding="utf-8")
    entry = _cache_entry(text)
    return _read(entry) or _build(text, entry)


def build_grammar(text: str) -> lark.Lark:
    """The LALR parser of a grammar text, built from scratch."""
    return lark.Lark(text, parser="lalr", lexer="basic", propagate_positions=True, maybe_placeholders=True)


def _cache_entry(text: str) -> Path:
    """Where the tables for this grammar, this lark and this Python are kept."""
    key = sha256(f"{lark.__version__} {sys.version} {text}".encode()).hexdigest()[:24]
    return Path(user_cache_dir("fastgrad")) / f"grammar-{key}.pickle"


def _read(entry: Path) -> lark.Lark | None:
    """The cached tables, or None where there are none or their checksum is wrong."""
    try:
        data = entry.read_bytes()
    except OSError:
        return None
    digest, payload = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if sha256(payload).digest() != digest:
        return None
    return lark.Lark.load(BytesIO(payload))


def _build(text: str, entry: Path) -> lark.Lark:
    """Build the tables and try to keep them; a cache folder that cannot be written is no error."""
    built = build_grammar(text)
    buffer = BytesIO()
    built.save(buffer)
    payload = buffer.getvalue()
    with contextlib.suppress(OSError):
        _write(entry, sha256(payload).digest() + payload)
    return built


def _write(entry: Path, data: bytes) -> None:
    """Write through a temporary file, so that no reader ever sees half an entry."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=entry.parent, prefix=entry.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, entry)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
