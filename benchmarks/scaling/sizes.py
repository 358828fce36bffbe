"""The decoder that the model of many ranks trains, and what its parts send, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, takewhile

from fastgrad_compiler.runtime.monomials import rank

SUM_BYTES = 8  # the sums of features are in float64
LENGTH_BYTES = 16  # two int64 of a rank's piece
COUNT_BYTES, LOSS_BYTES = 8, 4  # of a rank's tokens, and of its share of the loss


@dataclass(frozen=True)
class Decoder:
    """A decoder like examples/gpt.tfg: in each layer a mixer or softmax attention, then swiglu; a tied table.

    d: width of queries and keys of the mixer (softmax has that of values); near: tokens of a block of its near field;
    convolution: tokens of its short convolution; batch: sequences at once.
    """

    layers: int = 24
    width: int = 2048
    heads: int = 32
    hidden: int = 8192
    vocab: int = 32_768
    d: int = 16
    degree: int = 2
    near: int = 64
    convolution: int = 4
    batch: int = 1

    @property
    def dv(self) -> int:
        """Width of a head's values."""
        return self.width // self.heads

    @property
    def state_bytes(self) -> int:
        """Of the sums of one attention: for each head of each sequence r (dv + 1), and what its gates leave."""
        return self.batch * self.heads * (rank(self.d, self.degree) * (self.dv + 1) + 1) * SUM_BYTES

    @property
    def near_numbers(self) -> int:
        """What a token of a near field has for others: k, its rotary form, v and a gate, of each head."""
        return self.heads * (2 * self.d + self.dv + 1)

    def layer_weights(self, *, softmax: bool) -> int:
        """Weights of a layer: of its mixer or softmax attention, of swiglu and of two norms."""
        keys = self.heads * (self.dv if softmax else self.d)
        own = 0 if softmax else self.width * (self.convolution + self.heads) + self.heads  # with gates
        return self.width * (2 * keys + 2 * self.width + 3 * self.hidden + 2) + own

    def weights(self, *, softmax: bool) -> int:
        """All of them."""
        return self.layers * self.layer_weights(softmax=softmax) + self.root_weights

    @property
    def root_weights(self) -> int:
        """Outside of the layers: the table, tied, and the last norm."""
        return (self.vocab + 1) * self.width


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends to others in one step.

    states, halos: of attentions and convolutions, both passes; weights: gathered for both passes, and the gradients;
    numbers: lengths of pieces and shares of the loss. A collective is counted as the least that a rank must send: to
    gather, its part to all others; to reduce and scatter, all parts but its own; to reduce for all, both of these.
    """

    states: int
    halos: int
    weights: float
    numbers: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.states + self.halos + self.weights + self.numbers


def sent(decoder: Decoder, lengths: tuple[int, ...], place: int, itemsize: int = 4, reduced: int = 4) -> Sent:
    """What the rank of a place sends, with pieces of these lengths and weights in parts on all ranks.

    itemsize: bytes of a number of weights and activations; reduced: of a gradient.
    """
    if len(lengths) == 1:
        return Sent(0, 0, 0, 0)
    ranks = len(lengths)
    states = decoder.layers * decoder.state_bytes * (_rounds(place, ranks, 1) + _rounds(place, ranks, -1))
    halos = itemsize * decoder.batch * decoder.layers * (
        decoder.near_numbers * halo_tokens(lengths, place, decoder.near)
        + decoder.width * halo_tokens(lengths, place, decoder.convolution - 1, blocks=False)
    )  # fmt: skip
    layers, root = decoder.layers * decoder.layer_weights(softmax=False), decoder.root_weights
    gathered = (
        (ranks - 1) / ranks * itemsize * (2 * layers + root)
    )  # layers are given back between the passes
    scattered = (ranks - 1) / ranks * reduced * (layers + root)
    numbers = (ranks - 1) * LENGTH_BYTES + 2 * (ranks - 1) / ranks * (COUNT_BYTES + LOSS_BYTES)
    return Sent(states, halos, gathered + scattered, numbers)


def exchanged_by_all(decoder: Decoder, lengths: tuple[int, ...], itemsize: int) -> int:
    """States and halos that all ranks send together: whatever one asks for is sent to it, and its gradient back."""
    if len(lengths) == 1:
        return 0
    asked = [
        2 * sum(first - _start(first, width, blocks) for first in accumulate(lengths[:-1], initial=0))
        for width, blocks in ((decoder.near, True), (decoder.convolution - 1, False))
    ]
    halos = (
        itemsize
        * decoder.batch
        * decoder.layers
        * (decoder.near_numbers * asked[0] + decoder.width * asked[1])
    )
    sums = 2 * sum(len(lengths) - (1 << k) for k in range(rounds(len(lengths))))
    return halos + decoder.layers * decoder.state_bytes * sums


def _start(first: int, width: int, blocks: bool) -> int:
    """From where on the piece that begins at a place needs tokens."""
    return max(0, (first // width - 1) * width if blocks else first - width)


def _rounds(place: int, ranks: int, way: int) -> int:
    """Sums that a rank sends by recursive doubling: forward to later ranks, backward (-1) to earlier ones."""
    return sum(0 <= place + way * (1 << k) < ranks for k in range(rounds(ranks)))


def rounds(ranks: int) -> int:
    """Of recursive doubling: log2(ranks), rounded up."""
    return (ranks - 1).bit_length()


def halo_tokens(lengths: tuple[int, ...], place: int, width: int, *, blocks: bool = True) -> int:
    """Tokens that a rank sends to later ranks in the forward pass, and gets, whose gradients it sends back.

    width: of a block of a near field, of which a piece needs its own from where it begins and the one before it; or
    without blocks the tokens before the piece.
    """
    offsets = tuple(accumulate(lengths, initial=0))
    starts = [_start(each, width, blocks) for each in offsets]
    first, last = offsets[place], offsets[place + 1]
    later = takewhile(lambda each: starts[each] < last, range(place + 1, len(lengths)))
    given = sum(max(0, last - max(first, starts[each])) for each in later)
    return given + first - starts[place]
