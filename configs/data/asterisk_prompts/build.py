"""Spoken prompts of a telephone exchange with their words: about 500 clips of one voice, 25 minutes at 8 kHz (CC-BY-SA-3.0).

    apt-get download asterisk-core-sounds-en-wav asterisk-core-sounds-en
    for file in *.deb; do dpkg-deb -x $file package; done
    python configs/data/asterisk_prompts/build.py package FOLDER

FOLDER gets train.jsonl and test.jsonl, rows of ``audio``, the path of a clip, and ``text``, what is said. One in ten is held out, by the
hash of its words: the same words are never on both sides. Notes in brackets are no words; clips of tones and of more than ten seconds are
left out. Nothing is copied: rows name the clips where they lie.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import wave
from pathlib import Path

_LONGEST = 10.0


def transcripts(package: Path) -> dict[str, str]:
    """The words of each clip, by its name."""
    (listing,) = package.rglob("core-sounds-en.txt.gz")
    found = {}
    for line in gzip.decompress(listing.read_bytes()).decode("utf-8", "replace").splitlines():
        name, colon, text = line.partition(":")
        text = re.sub(r"[\[(<{].*?[\])>}]", " ", text)
        text = " ".join(text.replace("...", " ").split()).strip(' "')
        if colon and not name.startswith(";") and re.search("[a-z]", text.lower()):
            found[name.strip()] = text
    return found


def seconds(clip: Path) -> float:
    """How long a clip is."""
    with wave.open(str(clip)) as file:
        return file.getnframes() / file.getframerate()


def main(package: Path, target: Path) -> None:
    """Writes both splits."""
    target.mkdir(parents=True, exist_ok=True)
    texts, rows = transcripts(package), dict[str, list[dict[str, str]]](train=[], test=[])
    for clip in sorted(package.rglob("*.wav")):
        (folder,) = [parent for parent in clip.parents if parent.name.startswith("en")][:1]
        text = texts.get(clip.relative_to(folder).with_suffix("").as_posix())
        if text is None or seconds(clip) > _LONGEST:
            continue
        held_out = hashlib.sha256(text.lower().encode()).digest()[0] < 26
        rows["test" if held_out else "train"].append({"audio": str(clip.resolve()), "text": text})
    for name, some in rows.items():
        with (target / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        print(f"{target / name}.jsonl: {len(some)} clips")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
