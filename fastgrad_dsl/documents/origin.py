"""MODEL.origin.json: what an imported checkpoint was, so that it can be written back in the same layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta

from fastgrad_dsl.documents.base import Count, Document, FilePath, Place

Dtype = Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]


class TensorOrigin(Document, frozen=True):
    """A tensor of the checkpoint: the file that holds it, its type and its shape."""

    file: FilePath
    dtype: Dtype
    shape: tuple[Count, ...]


class Origin(Document, frozen=True):
    """The checkpoint: `texts` are its JSON files as they were, `metadata` what its files of weights say of themselves.

    `kept` names the tensors that hold no weights of the spec; they lie in MODEL.kept.safetensors.
    """

    format: Literal["fastgrad-origin-1"]
    texts: dict[FilePath, str]
    metadata: dict[FilePath, dict[str, str]]
    tensors: Annotated[dict[str, TensorOrigin], Meta(min_length=1)]
    kept: tuple[str, ...]

    def faults(self) -> Iterator[tuple[Place, str]]:
        """Texts of files that no file can hold: JSON may have half of a surrogate pair, UTF-8 may not."""
        yield from ((("texts", name), _HALF) for name, text in self.texts.items() if _halved(name + text))
        for name, found in self.metadata.items():
            if _halved("".join((name, *found, *found.values()))):
                yield ("metadata", name), _HALF


_HALF = "half of a surrogate pair"


def _halved(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)
