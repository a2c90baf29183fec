"""From named sources of rows to batches of arrays.

``sources`` reads rows, ``tokenizer`` turns text into ids, ``encode`` makes a whole split into compact arrays, ``loader``
makes batches whose content is a pure function of (seed, step).
"""
