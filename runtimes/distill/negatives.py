"""Tokens besides the likeliest: uniform, each at most once, and the same wherever and however often they are drawn.

There is no generator whose state would have to be kept. Of a position with number p, the draws are the first ones of a
permutation of all tokens but its likeliest, keyed by the seed and p: a Feistel network on the next power of four,
walked until it lands inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROUNDS = 6
Words = NDArray[np.uint64]


def negatives(topk: Tensor, positions: Tensor, *, count: int, vocabulary: int, seed: int) -> Tensor:
    """``count`` tokens for each position that are not among its likeliest.

    topk: int [n, K], each token at most once in a row    positions: int [n], their numbers    ->  int64 [n, count]
    """
    others = vocabulary - topk.shape[1]
    assert 0 < count <= others, "more negatives than tokens"
    drawn = torch.from_numpy(permuted(positions.cpu().numpy(), count, others, seed)).to(topk.device)
    # the x-th token that is not taken is x plus the number of taken ones before it
    taken = topk.long().sort(1).values
    free_before = taken - torch.arange(taken.shape[1], device=taken.device)
    return drawn + torch.searchsorted(free_before.contiguous(), drawn, right=True)


def permuted(keys: NDArray[np.int64], count: int, size: int, seed: int) -> NDArray[np.int64]:
    """The first ``count`` values of a permutation of ``range(size)`` for each of ``keys``: [n, count]."""
    half = 1
    while 1 << (2 * half) < size:
        half += 1
    key = _mixed(_mixed(np.full(1, seed, np.uint64)) + keys.astype(np.uint64))
    keyed = np.repeat(key, count)
    found = np.tile(np.arange(count, dtype=np.uint64), len(keys))
    outside = np.arange(len(found))
    while len(outside):
        found[outside] = _shuffled(found[outside], keyed[outside], half)
        outside = outside[found[outside] >= size]
    return found.astype(np.int64).reshape(len(keys), count)


def _shuffled(values: Words, keys: Words, half: int) -> Words:
    """One pass of the network over values of ``2 * half`` bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for number in range(_ROUNDS):
        turned = _mixed(keys ^ _mixed(right + np.uint64(number << 32))) & mask
        left, right = right, left ^ turned
    return (left << bits) | right


def _mixed(x: Words) -> Words:
    """The finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014); overflow is meant."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
