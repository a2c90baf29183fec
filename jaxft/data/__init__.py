"""From named sources of rows to batches of arrays.

``sources`` reads rows, ``tokenizer`` turns text into ids, ``encode`` makes rows into arrays, ``cache`` keeps them on disk, ``loader``
makes batches whose content is a pure function of (seed, step).
"""
