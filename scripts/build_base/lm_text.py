"""The text of the embedded language model and of its sample: Debian packages, unpacked and cleaned.

Run on Debian or a system made from it: ``python -m scripts.build_base.lm_text`` fetches the packages with apt-get into a
cache folder and writes ``corpus.txt`` there, one entry after the other, and the sample of another domain.
"""

import argparse
import gzip
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .sources import CACHE

LM_CACHE = CACHE.parent / "lm"
PACKAGES = {
    "wordnet-base": "1:3.0-37",
    "jargon-text": "4.4.7-4.1",
    "dict-devil": "1.0-13.1",
    "bible-kjv-text": "4.38",
    "bible-kjv": "4.38",  # the reader of the former, which is compressed in a way of its own
}
END = "\x1e"  # between entries of the corpus; no text holds it
# The sample: book, last verse; the two poetic books teach, the two that are kept apart are of the same kind.
TRAIN = {"psalms": "Ps1:1-Ps150:6", "proverbs": "Pro1:1-Pro31:31"}
HELD_OUT = {"ecclesiastes": "Ecc1:1-Ecc12:14", "song-of-solomon": "Song1:1-Song8:14"}
_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " "})
_KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


def unpack(cache: Path) -> Path:
    """Fetch the packages that are not there yet and unpack them; returns the folder that holds their files."""
    cache.mkdir(parents=True, exist_ok=True)
    root = cache / "root"
    for package, version in PACKAGES.items():
        if not any(cache.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", f"{package}={version}"], cwd=cache, check=True)
        archive = next(cache.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    return root


def wordnet(root: Path) -> Iterator[str]:
    """Every synonym set as ``word, word (kind): gloss``."""
    for ending, kind in _KINDS.items():
        for line in (root / f"usr/share/wordnet/data.{ending}").read_text("utf-8").splitlines():
            data, bar, gloss = line.partition(" | ")
            if line.startswith(" ") or not bar:
                continue
            fields = data.split()
            words = [fields[4 + 2 * number] for number in range(int(fields[3], 16))]
            plain = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words]
            yield f"{', '.join(dict.fromkeys(plain))} ({kind}): {gloss.strip()}"


def jargon(root: Path) -> Iterator[str]:
    """The entries of the lexicon and the stories of the appendix, paragraphs on one line each."""
    packed = root / "usr/share/doc/jargon-text/jargon.txt.gz"
    text = gzip.decompress(packed.read_bytes()).decode().translate(_PLAIN)
    text = text[text.index("Part II. The Jargon Lexicon") : text.rindex("\nBibliography")]
    entry: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if re.search(r"[─-╿]", line) or (len(line) < 40 and not line.startswith(":")):
            continue  # drawings, tables of contents and headings
        if line.startswith(":") and entry:
            yield "\n".join(entry)
            entry = []
        entry.append(re.sub(r"[{}]", "", line).removeprefix(":"))
    yield "\n".join(entry)


def devil(root: Path) -> Iterator[str]:
    """The Devil's Dictionary; verses keep their lines."""
    text = gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
    entry: list[str] = []
    for block in re.split(r"\n\s*\n", text[text.index("ABASEMENT, n.") :]):
        lines = [line.strip() for line in block.splitlines()]
        verse = all(line.startswith("    ") for line in block.splitlines())
        if re.match(r"[A-Z][A-Z' -]+, [a-z]", block) and entry:
            yield "\n".join(entry)
            entry = []
        entry.append("\n".join(lines) if verse else " ".join(lines))
    yield "\n".join(entry)


def corpus(root: Path) -> list[str]:
    """All entries, in the order of their sources."""
    return [re.sub(r"[ \t]+", " ", entry) for source in (wordnet, jargon, devil) for entry in source(root) if entry]


def verses(root: Path, passage: str) -> str:
    """A passage of the King James text, a verse a line and an empty line between chapters."""
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-l", passage]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    chapters = re.split(r"^\w[\w ]* \d+\n", printed, flags=re.MULTILINE)
    joined = (re.sub(r"\n(?!  )", " ", chapter.strip("\n")) for chapter in chapters if chapter.strip())
    return "\n\n".join(re.sub(r"^ +\d+ ", "", chapter, flags=re.MULTILINE) for chapter in joined) + "\n"


def main() -> None:
    """Write the corpus and the sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=LM_CACHE, help="folder for packages and text")
    parser.add_argument("--sample", type=Path, default=Path("samples/text/king-james"), help="folder of the sample to write")
    options = parser.parse_args()
    root = unpack(options.cache)
    entries = corpus(root)
    (options.cache / "corpus.txt").write_text(END.join(entries), "utf-8")
    print(f"{len(entries)} entries, {sum(map(len, entries)) / 1e6:.1f} million characters: {options.cache / 'corpus.txt'}")
    for folder, books in (("train", TRAIN), ("held-out", HELD_OUT)):
        place = options.sample / folder
        place.mkdir(parents=True, exist_ok=True)
        for book, passage in books.items():
            (place / f"{book}.txt").write_text(verses(root, passage), "utf-8")


if __name__ == "__main__":
    main()
