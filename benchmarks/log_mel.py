"""How fast log-mel frames are made, beside the reference's extractor, on one thread:
`OMP_NUM_THREADS=1 python benchmarks/log_mel.py [FOLDER OF SOUND]`.

Without a folder, noise of 3, 10 and 30 seconds. Of the reference, both paths: numpy's, in float64, which ours equals, and torch's.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from jaxft.data.processors.log_mel import LogMel
from jaxft.data.processors.sound import at_rate, read_sound

RATE, TURNS = 16000, 5


def best_of(make: Callable[[np.ndarray], np.ndarray], clips: list[np.ndarray]) -> float:
    """Milliseconds per clip, in the fastest of several turns."""
    times = []
    for _ in range(TURNS):
        before = time.perf_counter()
        for clip in clips:
            make(clip)
        times.append(time.perf_counter() - before)
    return min(times) / len(clips) * 1000


def compared(what: str, clips: list[np.ndarray], bins: int) -> None:
    extractor, ours = WhisperFeatureExtractor(feature_size=bins), LogMel(feature_size=bins)

    def padded(clip: np.ndarray) -> np.ndarray:
        return np.pad(clip[: 30 * RATE], (0, max(0, 30 * RATE - len(clip))))[None]

    makers = {
        "jaxft": ours,
        "reference, numpy": lambda clip: extractor._np_extract_fbank_features(padded(clip), "cpu")[0],
        "reference, torch": lambda clip: extractor._torch_extract_fbank_features(padded(clip))[0],
    }
    apart = [max(float(np.abs(ours(clip) - makers[name](clip).T).max()) for clip in clips) for name in list(makers)[1:]]
    times = {name: best_of(make, clips) for name, make in makers.items()}
    mine, by_numpy, by_torch = times.values()
    seconds = sum(map(len, clips)) / len(clips) / RATE
    print(
        f"{what}, {bins} bins, {len(clips)} clips of {seconds:.1f} s: jaxft {mine:.2f} ms, "
        f"numpy {by_numpy:.2f} ms ({by_numpy / mine:.1f} times, apart {apart[0]:.1e}), "
        f"torch {by_torch:.2f} ms ({by_torch / mine:.1f} times, apart {apart[1]:.1e})"
    )


def main() -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":
        sys.exit("set OMP_NUM_THREADS=1: numpy reads it when it is loaded, and one thread is what is compared")
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        paths = sorted(
            path for path in Path(sys.argv[1]).rglob("*") if path.suffix in (".wav", ".flac", ".ogg", ".mp3")
        )
        sets = {sys.argv[1]: [at_rate(read_sound(path, str(path)), RATE)[0] for path in paths]}
    else:
        rng = np.random.default_rng(0)
        sets = {
            f"noise of {n} s": [rng.normal(size=n * RATE).astype(np.float32) for _ in range(5)] for n in (3, 10, 30)
        }
    for bins in (80, 128):
        for what, clips in sets.items():
            compared(what, clips, bins)


if __name__ == "__main__":
    main()
