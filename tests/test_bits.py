"""A statistical battery for the bits of dropout, and proof that it can fail.

The battery runs on the hash, on threefry (the control) and on generators that are bad on purpose, each of which a named test
must catch. A test returns one p-value, already multiplied by the number of comparisons it made (Bonferroni), so that a sound
generator gives less than p with probability of at most p. The level was set before any run: with LEVEL = 1e-4 / (generators that must pass
* tests), fewer than one choice of seeds in 10,000 would raise a false alarm anywhere; the seeds are fixed. Bad generators
must fail at that same level. Statistics are exact (binomial) or Poisson, or have cells of a hundred and more and sums of
thousands behind their chi-square and normal approximations; all are two-sided: what is too even fails too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import special, stats

from jaxft.layers import bits as _bits

bits: Any = _bits  # annotated for jax's arrays; its operators take numpy's as well

U32 = np.uint32
Words = np.ndarray  # uint32
Seeded = Callable[[Words, Words], Words]  # (high, low) -> bits, broadcast
Generator = Callable[[Words], Seeded]  # of key data [..., 2]
Test = Callable[[Generator], float]

T = 512  # columns of attention
RATES = (0.1, 0.5)


# Generators


def hashed(keys: Words) -> Seeded:
    """The hash under test. Its code is operators only, so numpy arrays go through it as well (and as fast as they can)."""
    words = _words(keys)
    return lambda high, low: bits.hash_bits(words, high, low)


def threefry(keys: Words) -> Seeded:
    """jax.random.bits at the flat index high * 2**32 + low: threefry-2x32 (Salmon et al. 2011), the two words xored."""
    k = keys[..., 0], keys[..., 1], keys[..., 0] ^ keys[..., 1] ^ U32(0x1BD11BDA)

    def draw(high: Words, low: Words) -> Words:
        x, y = high + k[0], low + k[1]
        for i in range(5):
            for r in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
                x = x + y
                y = (y << U32(r) | y >> U32(32 - r)) ^ x
            x, y = x + k[(i + 1) % 3], y + k[(i + 2) % 3] + U32(i + 1)
        return x ^ y

    return draw


def _words(keys: Words) -> tuple[Words, Words]:
    first, second = bits.hash_words(jax.random.wrap_key_data(jnp.asarray(keys)))
    return np.asarray(first), np.asarray(second)


def _built(of_rows: Callable[[Words, Words, Words], Words]) -> Generator:
    """A generator from the sound row words a, b and the position."""

    def generator(keys: Words) -> Seeded:
        words = _words(keys)

        def bits_of(high: Words, low: Words) -> Words:
            a, b = bits.row_words(words, high)
            return of_rows(a, b, low)

        return bits_of

    return generator


def _one_round(a: Words, b: Words, low: Words) -> Words:
    x = (low ^ (low >> U32(16)) ^ a) * bits._M1
    x = x ^ (x >> U32(15)) ^ b
    return x ^ (x >> U32(16))


def _no_weyl(a: Words, b: Words, low: Words) -> Words:
    x = bits.mix(low ^ a, b)
    return x ^ (x >> U32(16))


def _key_last(keys: Words) -> Seeded:
    first, _ = _words(keys)
    return lambda high, low: bits._lowbias32(low ^ bits._lowbias32(high + U32(1))) ^ first


def _key_raw(keys: Words) -> Seeded:
    return lambda high, low: bits._lowbias32(low ^ bits._lowbias32(high ^ keys[..., 0])) ^ keys[..., 1]


def _row_plain(keys: Words) -> Seeded:
    first, _ = _words(keys)
    return lambda high, low: bits._lowbias32(low ^ (high ^ first))


def _row_shifts(keys: Words) -> Seeded:
    first, _ = _words(keys)
    return lambda high, low: bits._lowbias32(low + (high * U32(T) + first))


def _raw_key(keys: Words) -> Seeded:
    return lambda high, low: bits._lowbias32(low ^ bits._lowbias32(high ^ keys[..., 0]) ^ keys[..., 1])


def _sticky(keys: Words) -> Seeded:
    """Threefry, but each 64th element (at random) has the bits of its neighbour."""
    sound, which = threefry(keys), threefry(keys ^ U32(1 << 31))
    return lambda high, low: sound(high, low - (which(high, low) < U32(1 << 26)).astype(U32))


def _of_threefry(change: Callable[[Words], Words]) -> Generator:
    return lambda keys: lambda high, low: change(threefry(keys)(high, low))


# name: (generator, the tests that must each catch it)
BAD: dict[str, tuple[Generator, tuple[str, ...]]] = {
    "LCG of the counter": (
        _built(lambda a, b, low: U32(1664525) * (low + a) + U32(1013904223)),
        ("avalanche_low", "lags", "spectrum", "serial"),
    ),
    "one multiply": (_built(_one_round), ("avalanche_low", "uniformity")),
    "no Weyl sequence": (_built(_no_weyl), ("uniformity",)),
    "rows xor-permuted, mixed": (_built(lambda a, b, low: bits._lowbias32(low ^ a)), ("collisions",)),
    "rows shifted, mixed": (_built(lambda a, b, low: bits._lowbias32(low + a)), ("collisions",)),
    "rows xor-permuted, plain": (_row_plain, ("permuted_streams",)),
    "rows shifted, plain": (_row_shifts, ("shifted_streams", "avalanche_high", "lags")),
    "key xored last": (_key_last, ("neighbours", "permuted_streams")),
    "key xored last, plain": (_key_raw, ("avalanche_key",)),
    "key unmixed": (_raw_key, ("neighbours", "permuted_streams")),
    "sticky": (_sticky, ("lags", "serial", "runs", "birthday_spacings")),
    "uneven": (_of_threefry(lambda w: w - (w >> U32(8))), ("kept", "runs")),
    "twin bits": (_of_threefry(lambda w: w ^ (w ^ w >> U32(24)) & U32(8)), ("balance",)),
}


# Keys and draws


@functools.cache
def family(kind: str, count: int) -> Words:
    """Key data [count, 2] of related keys: seeds, or fold_in of layers or steps."""
    index, base = jnp.arange(count), jax.random.key(7)
    keys = {
        "seed": lambda i: jax.random.key(i),
        "layer": lambda i: jax.random.fold_in(base, i),
        "step": lambda i: jax.random.fold_in(jax.random.fold_in(base, i), 3),
    }[kind]
    return np.asarray(jax.random.key_data(jax.vmap(keys)(index)))


def counters(count: int, start: int = 0) -> Words:
    return np.arange(start, start + count, dtype=np.uint64).astype(U32)


def draw(generator: Generator, keys: Words, high: Words, low: Words) -> Words:
    """Bits [high, low] under one key or [keys, high, low], in pieces that stay in the cache."""
    if keys.ndim == 2:
        return np.stack([draw(generator, key, high, low) for key in keys])
    seeded, out = generator(keys[None]), np.empty((high.size, low.size), U32)
    wide = min(low.size, 1 << 14)
    tall = (1 << 14) // wide
    for i in range(0, high.size, tall):
        for j in range(0, low.size, wide):
            out[i : i + tall, j : j + wide] = seeded(high[i : i + tall, None], low[None, j : j + wide])
    return out


def kept(words: Words, rate: float) -> tuple[np.ndarray, float]:
    keep = round((1 - rate) * 65536)
    return (words >> U32(16)) < keep, keep / 65536


@functools.cache
def layouts(generator: Generator) -> tuple[Words, Words]:
    """The bits of attention [heads, S, T], where a head is a row, and of hidden states [1, S, D], where a token is."""
    key, other, *_ = family("layer", 16)[2:]
    return (
        draw(generator, key, counters(8), counters(T * T)).reshape(8, T, T),
        draw(generator, other, counters(2048), counters(768))[None],
    )


def streams(generator: Generator, count: int) -> Iterator[Words]:
    """Sixteen streams each that must have nothing to do with each other: heads, layers, steps, seeds; [16, count]."""
    one, low = np.zeros(1, U32), counters(count)
    yield draw(generator, family("layer", 16)[0], counters(16), low)
    for kind in ("layer", "step", "seed"):
        yield draw(generator, family(kind, 16), one, low)[:, 0]


# Statistics


def bonferroni(p: Any) -> float:
    p = np.asarray(p)
    return float(min(1.0, p.min() * p.size))


def binomial(counts: np.ndarray, n: int, q: float) -> np.ndarray:
    return 2 * np.minimum(stats.binom.cdf(counts, n, q), stats.binom.sf(counts - 1, n, q))


def normal(z: np.ndarray) -> np.ndarray:
    return 2 * special.ndtr(-np.abs(z))


def chi_square(x: np.ndarray | float, degrees: int) -> np.ndarray:
    return 2 * np.minimum(special.chdtr(degrees, x), special.chdtrc(degrees, x))


def poisson(count: int, mean: float) -> float:
    return 2 * float(min(stats.poisson.cdf(count, mean), stats.poisson.sf(count - 1, mean)))


def cells(index: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Chi-square of the cells that ``index`` falls in. Cells that expect few are one cell, together with the next larger ones."""
    counts, expected = np.bincount(index.ravel(), minlength=probability.size), probability * index.size
    if expected.min() < 100:
        pooled = expected <= expected[expected >= 100].min() * 1.001
        counts, expected = (np.append(x[~pooled], x[pooled].sum()) for x in (counts, expected))
    return chi_square(((counts - expected) ** 2 / expected).sum(), expected.size - 1)


def signs(words: Words) -> np.ndarray:
    """[32, n] of +-1: the bits of ``words``."""
    planes = np.unpackbits(words.ravel().view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    return (planes.T.astype(np.float32) * 2 - 1).copy()


# The tests


def balance(generator: Generator) -> float:
    """Each bit is 1 half the time, as is the xor of any two: along positions, rows and keys."""
    one, key, n = np.full(1, 5, U32), family("layer", 16)[1], 1 << 16
    out = []
    for words in (
        draw(generator, key, one, counters(n)),
        draw(generator, key, counters(n), one),
        generator(family("layer", n))(one, one),
    ):
        planes = signs(words)
        ones = (n + np.concatenate([planes.sum(1), (planes @ planes.T)[np.triu_indices(32, 1)]])) / 2
        out.append(binomial(ones.round(), n, 0.5))
    return bonferroni(np.concatenate(out))


def _avalanche(draws: Callable[[int], tuple[Words, Words]], flips: int) -> float:
    """``draws`` gives the bits of consecutive counters and of the same with one bit flipped: half of the bits change."""
    out = []
    for flip in range(flips):
        before, after = draws(flip)
        planes = np.unpackbits((before ^ after).ravel().view(np.uint8).reshape(-1, 4), axis=1)
        out.append(binomial(planes.sum(0, dtype=np.int64), len(planes), 0.5))
    return bonferroni(np.concatenate(out))


_SAMPLES = 1 << 14


def _without(flip: int) -> Words:
    """Counters whose bit ``flip`` is 0, consecutive but for that (so that no pair comes twice)."""
    i = counters(_SAMPLES).astype(np.uint64)
    below = (1 << flip) - 1
    return ((i & below) | (i & ~np.uint64(below)) << 1).astype(U32)


def avalanche_low(generator: Generator) -> float:
    seeded, high = generator(family("layer", 16)[1:2]), np.full(1, 3, U32)
    return _avalanche(lambda k: (seeded(high, x := _without(k)), seeded(high, x ^ U32(1 << k))), 32)


def avalanche_high(generator: Generator) -> float:
    seeded, low = generator(family("layer", 16)[1:2]), np.full(1, 77, U32)
    return _avalanche(lambda k: (seeded(x := _without(k), low), seeded(x ^ U32(1 << k), low)), 32)


def avalanche_key(generator: Generator) -> float:
    """Of the two words of the key itself, at one counter and from keys (0, i) and (i, 0) as jax.random.key makes them."""
    high, low = np.full(1, 3, U32), np.full(1, 77, U32)

    def draws(flip: int) -> tuple[Words, Words]:
        keys = np.zeros((2, _SAMPLES, 2), U32)
        keys[0, :, flip // 32] = _without(flip % 32)
        keys[1] = keys[0]
        keys[1, :, flip // 32] ^= U32(1 << flip % 32)
        both = generator(keys)(high, low)
        return both[0], both[1]

    return _avalanche(draws, 64)


def uniformity(generator: Generator) -> float:
    """The upper 16 bits in 256 bins, by their upper and by their lower byte: along positions and along rows.

    Of each of sixteen rows, of each of sixteen columns, and of these together.
    """
    n, key = 1 << 20, family("layer", 16)[3]
    x = np.empty((2, 16, 2))
    for i in range(16):
        for along, place in enumerate(((counters(1, i), counters(n)), (counters(n), counters(1, i)))):
            table = np.bincount(draw(generator, key, *place).ravel() >> U32(16), minlength=1 << 16).reshape(256, 256)
            x[along, i] = [((table.sum(axis) - n / 256) ** 2).sum() * 256 / n for axis in (0, 1)]
    return bonferroni(np.concatenate([chi_square(x, 255).ravel(), chi_square(x.sum(1), 16 * 255).ravel()]))


def kept_fraction(generator: Generator) -> float:
    """Kept overall, in each row and each column, and how much rows and columns vary."""
    out: list[Any] = []
    for words in layouts(generator):
        for rate in RATES:
            mask, q = kept(words, rate)
            out.append(binomial(mask.sum(), mask.size, q))
            for axis in (1, 2):
                n, counts = mask.shape[axis], mask.sum(axis)
                out.append(bonferroni(binomial(counts, n, q)))
                out.append(chi_square(((counts - n * q) ** 2).sum() / (n * q * (1 - q)), counts.size))
    return bonferroni(out)


def lags(generator: Generator) -> float:
    """Autocorrelation of the keep mask, and of the upper 16 bits, along the flat positions of each head."""
    out = []
    for words in layouts(generator):
        t = words.shape[2]
        for values in _standard(words.reshape(len(words), -1)):
            for lag in sorted({1, 2, 3, t - 1, t, t + 1, 2 * t, *(1 << k for k in range(17))}):
                before, after = values[:, :-lag], values[:, lag:]
                out.append(normal(np.einsum("hn,hn->h", before, after).sum() / np.sqrt(before.size)))
    return bonferroni(out)


def _standard(words: Words) -> Iterator[np.ndarray]:
    """Keep masks at each rate and the upper 16 bits, of mean 0 and variance 1."""
    for rate in RATES:
        mask, q = kept(words, rate)
        yield ((mask - q) / np.sqrt(q * (1 - q))).astype(np.float32)
    upper = (words >> U32(16)).astype(np.float32)
    yield (upper - np.float32(65535 / 2)) / np.float32(65536 / np.sqrt(12))


def neighbours(generator: Generator) -> float:
    """Correlation of each two of sixteen heads, layers, steps and seeds, place by place."""
    out, n = [], 1 << 17
    pairs = np.triu_indices(16, 1)
    for words in streams(generator, n):
        for values in _standard(words):
            z = (values @ values.T)[pairs] / np.sqrt(n)
            out += [bonferroni(normal(z)), chi_square((z**2).sum(), z.size)]
    return bonferroni(out)


def _all_shifts(generator: Generator, transform: Callable[[np.ndarray], np.ndarray]) -> float:
    """The largest correlation of two streams over all n relative places, by a transform that turns it to products.

    Of masks at rate 0.5, +-1: the tail of a sum of such is below the normal one.
    """
    n, out = 1 << 12, []
    for words in streams(generator, n):
        spectra = transform(np.where(kept(words, 0.5)[0], 1.0, -1.0))
        for i in range(16):
            products = spectra[i + 1 :] * spectra[i].conj()
            if products.size:
                out.append(np.abs(transform(products)).max() / np.sqrt(n))
    return min(1.0, float(normal(np.max(out))) * 4 * 120 * n)


def shifted_streams(generator: Generator) -> float:
    """No stream is another one shifted."""

    def transform(x: np.ndarray) -> np.ndarray:
        return np.fft.fft(x) if x.dtype == np.float64 else np.fft.ifft(x)

    return _all_shifts(generator, transform)


def permuted_streams(generator: Generator) -> float:
    """No stream is another one with its positions xored by a constant: the same with the Walsh-Hadamard transform."""

    def transform(x: np.ndarray) -> np.ndarray:
        n, half = x.shape[-1], 1
        while half < n:
            x = x.reshape(-1, n // (2 * half), 2, half)
            x = np.stack([x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]], 2)
            half *= 2
        return x.reshape(-1, n) / np.sqrt(n)

    def scaled(x: np.ndarray) -> np.ndarray:  # both transforms together carry 1 / n once, as fft and ifft do
        return transform(x) * (np.sqrt(x.shape[-1]) if (np.abs(x) == 1).all() else 1 / np.sqrt(x.shape[-1]))

    return _all_shifts(generator, scaled)


def serial(generator: Generator) -> float:
    """Pairs and triples in each direction, blocks of 2 x 2 and of 2 x 2 x 2 in keep masks; pairs of the upper six bits."""
    out = []
    for words in layouts(generator):
        for rate in RATES:
            mask, q = kept(words, rate)
            for block in ((1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 1, 3), (1, 3, 1), (1, 2, 2), (2, 2, 2)):
                h, s, t = (n // b for n, b in zip(mask.shape, block, strict=True))
                if h:
                    whole = mask[: h * block[0], : s * block[1], : t * block[2]]
                    parts = whole.reshape(h, block[0], s, block[1], t, block[2]).transpose(0, 2, 4, 1, 3, 5)
                    size = int(np.prod(block))
                    ones = np.array([bin(i).count("1") for i in range(1 << size)])
                    index = parts.reshape(-1, size) @ (1 << np.arange(size))
                    out.append(cells(index, q**ones * (1 - q) ** (size - ones)))
        six = (words >> U32(26)).astype(np.int64)
        even = np.full(4096, 1 / 4096)
        out.append(cells(six[..., ::2] * 64 + six[..., 1::2], even))
        out.append(cells(six[:, ::2] * 64 + six[:, 1::2], even))
    return bonferroni(out)


def runs(generator: Generator) -> float:
    """The number of runs (Wald and Wolfowitz 1940, the rate known) and the gaps between dropped elements, down and across."""
    out = []
    for words in layouts(generator):
        for flat in (words.reshape(len(words), -1), words.transpose(0, 2, 1).reshape(len(words), -1)):
            for rate in RATES:
                mask, q = kept(flat, rate)
                n, p = mask.shape[1], q * (1 - q)
                changes = (mask[:, 1:] != mask[:, :-1]).sum(1)
                variance = (n - 1) * 2 * p * (1 - 2 * p) + 2 * (n - 2) * (p - 4 * p * p)
                out += [*normal((changes - (n - 1) * 2 * p) / np.sqrt(variance))]
                # A number of gaps set beforehand, which is sure to be reached: then they are independent.
                gaps = np.diff(np.flatnonzero(~mask.ravel()))[: round(mask.size * (1 - q) * 0.95)] - 1
                longest = int(np.log(1000 / gaps.size) / np.log(q))  # some 1000 gaps are that long
                tail = q ** np.arange(longest + 1)
                out.append(cells(np.minimum(gaps, longest), np.append(tail[:-1] * (1 - q), tail[-1])))
    return bonferroni(out)


def spectrum(generator: Generator) -> float:
    """The largest periodogram ordinate of keep masks at rate 0.5, along flat positions and of each [S, T]."""
    out = []
    for words in layouts(generator):
        plus = np.where(kept(words, 0.5)[0], 1.0, -1.0)
        size = plus[0].size
        flat = np.fft.rfft(plus.reshape(-1, size))[:, 1:-1]
        plane = np.fft.rfft2(plus)[:, :, 1:-1]
        for power in (np.abs(flat) ** 2 / size, np.abs(plane) ** 2 / size):
            out.append(bonferroni(np.exp(-power)))  # exponential, of mean 1
    return bonferroni(out)


def collisions(generator: Generator) -> float:
    """Equal words among 4096 positions of 4096 rows: 256 rows of 16 layers.

    Rows that are permutations of each other share all their words. Of two rows with seeds as good as random but nothing
    except a seed between them, 4096 / 2**32 do: of these 8 million pairs, eight.
    """
    words = np.sort(draw(generator, family("layer", 16), counters(256), counters(4096)), axis=None)
    n = float(words.size)
    expected = n * (n - 1) / 2**33 - n**3 / (6 * 2.0**64)
    return poisson(int((words[1:] == words[:-1]).sum()), expected)


def birthday_spacings(generator: Generator) -> float:
    """Equal spacings of 2048 sorted words (Marsaglia 1985), along positions, rows and keys, 128 times each.

    128 * 2048**3 = 2**40 = (2**32)**(5 / 4): as far as the Poisson distribution holds (L'Ecuyer and Simard 2001).
    """
    n, times, key = 2048, 128, family("layer", 16)[5]
    out = []
    for words in (
        draw(generator, key, counters(times), counters(n)),
        draw(generator, key, counters(n), counters(times)).T,
        generator(family("layer", n)[:, None])(np.full(1, 3, U32), counters(times)[None]).T,
    ):
        spacings = np.sort(np.diff(np.sort(words, axis=1), axis=1), axis=1)
        out.append(poisson(int((spacings[:, 1:] == spacings[:, :-1]).sum()), times * n**3 / 2**34))
    return bonferroni(out)


TESTS: dict[str, Test] = {
    "balance": balance,
    "avalanche_low": avalanche_low,
    "avalanche_high": avalanche_high,
    "avalanche_key": avalanche_key,
    "uniformity": uniformity,
    "kept": kept_fraction,
    "lags": lags,
    "neighbours": neighbours,
    "shifted_streams": shifted_streams,
    "permuted_streams": permuted_streams,
    "serial": serial,
    "runs": runs,
    "spectrum": spectrum,
    "collisions": collisions,
    "birthday_spacings": birthday_spacings,
}
SOUND: dict[str, Generator] = {"hash": hashed, "threefry": threefry}
LEVEL = 1e-4 / (len(SOUND) * (len(TESTS) + 1))  # one more: test_rows_that_meet


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("generator", SOUND)
def test_sound(generator: str, test: str) -> None:
    assert TESTS[test](SOUND[generator]) > LEVEL


@pytest.mark.parametrize(("generator", "test"), [(g, t) for g, (_, tests) in BAD.items() for t in tests])
def test_bad_is_caught(generator: str, test: str) -> None:
    assert TESTS[test](BAD[generator][0]) < LEVEL


def test_each_test_can_fail() -> None:
    assert {test for _, tests in BAD.values() for test in tests} == set(TESTS)


def _rows_that_meet(of_rows: Callable[[Words, Words, Words], Words]) -> float:
    """The worst pairs among 2**18 rows: their Weyl sequences meet, so that but for b one is the other moved along.

    Brought in line, their keep masks must still be uncorrelated. ``of_rows`` gives bits from a, b and low * GOLDEN.
    """
    n = 1 << 12
    a, b = bits.row_words(_words(family("layer", 16)[4:5]), counters(1 << 18))
    place = a * U32(pow(int(bits.GOLDEN), -1, 1 << 32))  # in units of the sequence
    order = np.argsort(place)
    i, j = order[:-1], order[1:]
    close = np.flatnonzero(place[j] - place[i] < n)[:1024]
    i, j, low, out = i[close, None], j[close, None], counters(n), []
    assert len(close) == 1024
    one = of_rows(a[i], b[i], (low + (place[j] - place[i])) * bits.GOLDEN)
    other = of_rows(a[j], b[j], low[None] * bits.GOLDEN)
    for x, y in zip(_standard(one), _standard(other), strict=True):
        z = np.einsum("rn,rn->r", x, y) / np.sqrt(n)
        # Of the pairs together: a single z, of 4096 elements at rate 0.1, is not quite normal in its tails.
        out += [normal(z.sum() / np.sqrt(z.size)), chi_square((z**2).sum(), z.size)]
    return bonferroni(out)


def _added(a: Words, b: Words, weyl: Words) -> Words:
    x = weyl + a
    x = (x ^ (x >> U32(16))) * bits._M1
    return ((x ^ (x >> U32(15))) + b) * bits._M2


def test_rows_that_meet() -> None:
    assert _rows_that_meet(lambda a, b, weyl: bits.mix(weyl + a, b)) > LEVEL


@pytest.mark.parametrize("of_rows", [_added, lambda a, b, weyl: bits.mix(weyl + a, U32(0))])
def test_rows_that_meet_are_caught(of_rows: Callable[[Words, Words, Words], Words]) -> None:
    """A second word that is added, not xored, before the last multiply (no test above can tell), and no second word."""
    assert _rows_that_meet(of_rows) < LEVEL


# What is not statistics


def _counters(shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    rows, s, t = shape
    return jnp.arange(rows, dtype=jnp.uint32)[:, None, None], jnp.arange(s * t, dtype=jnp.uint32).reshape(s, t)


def test_the_control_is_jax() -> None:
    key = jax.random.key(11)
    ours = threefry(np.asarray(jax.random.key_data(key)))(np.zeros(1, U32), counters(1000))
    np.testing.assert_array_equal(ours, jax.random.bits(key, (1000,), jnp.uint32))


def test_compiled_bits_are_those_of_numpy() -> None:
    words = bits.hash_words(jax.random.key(3))
    high, low = _counters((4, 16, 24))
    compiled = jax.jit(bits.hash_bits)(words, high, low)
    assert compiled.dtype == jnp.uint32
    key = np.asarray(jax.random.key_data(jax.random.key(3)))
    plain = draw(hashed, key, counters(4), counters(16 * 24))
    np.testing.assert_array_equal(compiled.reshape(4, -1), plain)


def test_bits_stay_what_they_are() -> None:
    """Runs that go on after an update go on with the same masks."""
    words = bits.hash_words(jax.random.key(0))
    high, low = jnp.asarray([[0], [1]], jnp.uint32), jnp.asarray([0, 1, 2**32 - 1], jnp.uint32)
    assert bits.hash_bits(words, high, low).tolist() == [
        [1945213720, 1369227550, 1968020269],
        [3882869320, 3875109646, 2477589129],
    ]


def test_any_block_is_that_of_the_whole() -> None:
    words = bits.hash_words(jax.random.key(5))
    high, low = _counters((6, 32, 48))
    whole = bits.hash_bits(words, high, low)
    block = bits.hash_bits(words, high[2:5], low[7:20, 31:48])
    np.testing.assert_array_equal(block, whole[2:5, 7:20, 31:48])


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("y", "x"), P(None, "y", "x")])
def test_bits_do_not_depend_on_the_mesh(spec: P) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((4, 2), ("x", "y"))

    def mask(key: jax.Array) -> jax.Array:
        return bits.keep_at(bits.hash_words(key), 0.1, *_counters((8, 16, 8)))[0]

    split = jax.jit(mask, out_shardings=NamedSharding(mesh, spec))(jax.random.key(9))
    assert split.sharding.spec == spec
    np.testing.assert_array_equal(split, mask(jax.random.key(9)))


def test_kernels_make_the_same_bits() -> None:
    words = jnp.stack(bits.hash_words(jax.random.key(2)))
    s, t = 16, 128

    def kernel(words_ref, out_ref) -> None:
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (s, t), axis) for axis in (0, 1))
        low = (rows * t + columns).astype(jnp.uint32)
        high = pl.program_id(0).astype(jnp.uint32)
        out_ref[0] = bits.keep_at((words_ref[0], words_ref[1]), 0.5, high, low)[0].astype(jnp.int32)

    made = pl.pallas_call(
        kernel,
        grid=(3,),
        in_specs=[pl.BlockSpec((2,), lambda i: (0,))],
        out_specs=pl.BlockSpec((1, s, t), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((3, s, t), jnp.int32),
        interpret=True,
    )(words)
    np.testing.assert_array_equal(made, bits.keep_at((words[0], words[1]), 0.5, *_counters((3, s, t)))[0])


@pytest.mark.parametrize("rate", [0.0, 1e-5, 0.1, 0.5, 0.999])
def test_keeps_by_the_upper_bits(rate: float) -> None:
    words = bits.hash_words(jax.random.key(1))
    place = _counters((2, 64, 64))
    mask, scale = bits.keep_at(words, rate, *place)
    expected, q = kept(np.asarray(bits.hash_bits(words, *place)), rate)
    np.testing.assert_array_equal(mask, expected)
    assert scale == np.float32(1 / q)
    assert mask.dtype == bool


def test_rows_and_keys_have_words_of_their_own() -> None:
    key = family("seed", 1 << 16)
    first, second = _words(key)
    assert len(np.unique(first.astype(np.uint64) << np.uint64(32) | second)) == len(key)
    a, b = bits.row_words(_words(key[:1]), counters(1 << 16))
    assert len(np.unique(a)) == len(a)
    assert not (a == b).any()


def test_keys_of_four_words_count_each_of_them() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (2000, 4), dtype=np.uint32)
    words[1000:] = words[:1000]
    words[np.arange(1000, 2000), np.arange(1000) % 4] ^= np.uint32(1)  # one bit of one word is another
    pairs = np.stack(bits.hash_words(jax.random.wrap_key_data(jnp.asarray(words), impl="rbg")), axis=-1)
    assert len(np.unique(pairs, axis=0)) == len(words)


if __name__ == "__main__":  # the table of p-values, and which tests catch what
    for name, generator in {**SOUND, **{k: g for k, (g, _) in BAD.items()}}.items():
        p = {t: test(generator) for t, test in TESTS.items()}
        layouts.cache_clear()
        print(f"{name}:", *(f"{t} {v:.2g}{'!' if v < LEVEL else ''}" for t, v in p.items()))
