"""Queries of a library of adapters, beside a scan of all entries one after the other.

    python scripts/benchmark_library.py --entries 10000
    python scripts/benchmark_library.py --entries 10000 --width 256

Makes a synthetic library: each entry has a trigger of its own, tags and captions of words that are as frequent as words are
(Zipf's law), and embeddings of the width of CLIP ViT-L/14's (768) by default, a text, three captions and two pictures each.
Then prompts of 8 to 20 words are looked for, one in two with a trigger, and the median and the 95th percentile of a query
are printed: words, embeddings, the best ten with their reasons, and whether their files are there. What it takes to embed
the prompt depends on the encoder and is not in it; that of the embedded base is printed by itself. The scan computes the
same BM25 and the same nearness, entry by entry, as a program does that keeps its adapters in a list. Both sides' first ten
are compared.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.library.encoder import Array, near_pictures, near_texts, unit
from peft_diffusion.library.encoders import encoder_of
from peft_diffusion.library.entries import Entry
from peft_diffusion.library.ranking import CALLED, Snapshot, rank
from peft_diffusion.library.store import Store, Vectors
from peft_diffusion.library.terms import terms_of
from peft_diffusion.library.words import COLUMNS, idf
from scripts.measuring import markdown_table, run

KINDS = ("text", "caption", "caption", "caption", "picture", "picture")
WORDS = 20_000
SHARES = 1 / np.arange(1, WORDS + 1)
SHARES /= SHARES.sum()


class Random:
    """An encoder of a given width whose answers are chance: what they cost does not depend on what they are."""

    name, fingerprint, trust, sees, floor, scale = "random", "", 0.9, True, 0.1, 100.0

    def __init__(self, width: int) -> None:
        self.width = width
        self.rng = np.random.default_rng(1)

    def texts(self, texts: Sequence[str]) -> Array:
        """Rows of length 1."""
        return unit(self.rng.normal(size=(len(texts), self.width)))

    def pictures(self, images: Sequence[Any]) -> tuple[Array, Array]:
        """Rows of length 1, and what their offsets are about."""
        return self.texts([""] * len(images)), np.full(len(images), 25.0, np.float32)

    def asked(self, text: str) -> Array:
        """Two columns that are the same for the same text."""
        rng = np.random.default_rng(zlib.crc32(text.encode()))
        return np.ascontiguousarray(unit(rng.normal(size=(2, self.width))).T)


def main() -> None:
    """Make a library, ask it, scan it, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000, help="adapters in the library")
    parser.add_argument("--queries", type=int, default=200, help="prompts that are looked for")
    parser.add_argument("--scans", type=int, default=10, help="of which so many are scanned for too")
    parser.add_argument("--width", type=int, default=768, help="numbers of an embedding")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """All of it, in a folder."""
    rng = np.random.default_rng(0)
    encoder = Random(options.width)
    begun = time.perf_counter()
    entries = made(folder, options.entries, rng, encoder)
    written = time.perf_counter() - begun
    prompts = [prompt(rng, entries) for _ in range(options.queries)]
    begun = time.perf_counter()
    store = Store(folder / "library.sqlite3")
    snapshot = Snapshot(store)
    query(store, snapshot, encoder, prompts[0])
    opened = time.perf_counter() - begun
    times, found = [], []
    for text in prompts:
        begun = time.perf_counter()
        found.append(query(store, snapshot, encoder, text))
        times.append(1000 * (time.perf_counter() - begun))
    scanned, same = scan(snapshot, store, encoder, prompts[: options.scans], found)
    own = embedding(prompts)
    size = (folder / "library.sqlite3").stat().st_size / 2**20
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{platform.processor() or platform.machine()}, {cores} cores, load {load:.1f}, numpy {np.__version__}")
    print(f"{options.entries:,} adapters of {len(KINDS)} embeddings of {options.width} numbers; {size:.0f} MiB on the disk")
    print(
        f"made in {written:.1f} s; opened, with the first query, in {1000 * opened:.0f} ms; the first ten are the scan's for"
        f" {same} of {options.scans}\n"
    )
    rows = [("library", *figures(times)), ("scan", *figures(scanned)), ("embedding the prompt, icons", *figures(own))]
    print(markdown_table(("a query, in ms", "median", "95%"), rows))


def made(folder: Path, count: int, rng: np.random.Generator, encoder: Random) -> list[Entry]:
    """The library's file; returns its entries."""
    entries = []
    store = Store(folder / "library.sqlite3")
    with store.changing():
        for number in range(count):
            words = [f"w{word}" for word in rng.choice(WORDS, 70, p=SHARES)]
            path = folder / f"adapter{number}.safetensors"
            path.touch()
            told = path.stat()
            entry = Entry(
                path, told.st_size, told.st_mtime_ns, f"{number:064x}",
                name=path.stem, families=("sd1",), made_for="Stable Diffusion 1",
                trigger=f"trigger{number} style", triggers=(f"trigger{number} style",),
                tags={word: 40 - place for place, word in enumerate(dict.fromkeys(words[:30]))},
                captions=tuple(" ".join(words[30 + 10 * place : 40 + 10 * place]) for place in range(4)),
            )  # fmt: skip
            labels = [(kind, "", 25.0 if kind == "picture" else 0.0) for kind in KINDS]
            store.put_vectors(store.put(entry), Vectors(labels, encoder.texts(KINDS)))
            entries.append(entry)
    store.close()
    return entries


def prompt(rng: np.random.Generator, entries: Sequence[Entry]) -> str:
    """Words as frequent as words are, and in one of two prompts a trigger."""
    words = [f"w{word}" for word in rng.choice(WORDS, int(rng.integers(8, 21)), p=SHARES)]
    return " ".join([*words, entries[int(rng.integers(len(entries)))].trigger] if rng.random() < 0.5 else words)


def query(store: Store, snapshot: Snapshot, encoder: Random, text: str) -> list[str]:
    """What `Library.search` does with an open library."""
    snapshot = snapshot if snapshot.changes == store.changes else Snapshot(store)
    ranking = rank(snapshot, text, None, encoder)
    return [one.entry.name for one in ranking.found(ranking.best(10, 0.0), store)]


def scan(
    snapshot: Snapshot, store: Store, encoder: Random, prompts: Sequence[str], found: Sequence[Sequence[str]]
) -> tuple[list[float], int]:
    """Ask all entries one after the other; returns milliseconds, and how often the first ten were the library's."""
    entries = list(store.entries().items())
    counted: list[defaultdict[str, float]] = [defaultdict(float) for _ in entries]
    lengths = []
    for own, (_, entry) in zip(counted, entries, strict=True):
        columns = entry.columns()
        lengths.append(sum(map(len, columns)))
        for (_, weight), column in zip(COLUMNS, columns, strict=True):
            for term in column:
                own[term] += weight
    usual = statistics.mean(lengths)
    having = Counter(term for own in counted for term in own)
    texts, pictures = snapshot.vectors.texts, snapshot.vectors.pictures
    rows = {int(number): (texts.of(place), pictures.of(place)) for place, number in enumerate(snapshot.places)}
    times, same = [], 0
    for text, expected in zip(prompts, found, strict=False):
        begun = time.perf_counter()
        terms, asked = list(dict.fromkeys(terms_of(text))), encoder.asked(text)
        weights = {term: idf(len(entries), having[term]) for term in terms}
        most, scores = sum(weights.values()), []
        for (number, entry), own, length in zip(entries, counted, lengths, strict=True):
            norm = 1.2 * (0.25 + 0.75 * length / usual)
            words = sum(weights[term] * own[term] / (own[term] + norm) for term in terms if term in own) / most
            of, seen = rows[number]
            near = max(
                near_texts(encoder, texts.matrix[of] @ asked[:, 0], texts.extra[of]).max(),
                near_pictures(encoder, pictures.matrix[seen] @ asked[:, 1], pictures.extra[seen]).max(),
            )
            called = " ".join(terms_of(entry.trigger)) in " ".join(terms_of(text))
            scores.append((-(1 - (1 - words) * (1 - near) * (1 - CALLED * called)), number, entry.name))
        best = [name for _, _, name in sorted(scores)[:10]]
        times.append(1000 * (time.perf_counter() - begun))
        same += set(best) == set(expected)
    return times, same


def embedding(prompts: Sequence[str]) -> list[float]:
    """Milliseconds in which the embedded base's encoder embeds a prompt."""
    encoder, times = encoder_of("icons"), []
    for text in prompts:
        begun = time.perf_counter()
        if encoder is not None:
            encoder.asked(text)
        times.append(1000 * (time.perf_counter() - begun))
    return times


def figures(times: Sequence[float]) -> tuple[str, str]:
    """Median and 95th percentile."""
    return f"{statistics.median(times):.1f}", f"{float(np.percentile(times, 95)):.1f}"


if __name__ == "__main__":
    run(main)
