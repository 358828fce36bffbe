"""Tokenizers of the two kinds that language models have, with a few words."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ("<s>", "</s>")


def write_tokenizer(path: Path) -> int:
    """One like GPT-2's, of bytes that are shown as letters; returns its size, 261."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate([*letters, "th", "the", "ca"])}
    found = Tokenizer(models.BPE(words, [("t", "h"), ("th", "e"), ("c", "a")]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(list(SPECIAL))
    found.save(str(path))
    return found.get_vocab_size()


def write_byte_fallback(path: Path) -> int:
    """One like Llama's: words with their space before them, and a token for each byte; returns its size."""
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        space,
        *"abc",
        f"{space}a",
        "ab",
        f"{space}ab",
    ]
    merges = [(space, "a"), ("a", "b"), (f"{space}a", "b")]
    words = {piece: number for number, piece in enumerate(pieces)}
    found = Tokenizer(models.BPE(words, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    parts = [
        decoders.Replace(space, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    found.decoder = decoders.Sequence(parts)
    found.add_special_tokens(list(SPECIAL))
    found.save(str(path))
    return found.get_vocab_size()
