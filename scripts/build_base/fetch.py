"""Fetch the icon sets and the emoji keywords from npm, at pinned versions, into a cache folder."""

import argparse
import functools
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from .sources import CACHE, ICON_SETS, KEYWORDS_PACKAGE, KEYWORDS_VERSION, UNSEEN_SETS, IconSet


def _pack(package: str, version: str, archive: str, cache: Path) -> Path:
    """Download one npm package unless the cache already has it."""
    path = cache / archive
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", f"{package}@{version}", "--pack-destination", str(cache), "--json", "--silent"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError("npm is needed to fetch the icon sets: install Node.js, which brings it") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"npm could not fetch {package}@{version}: {error.stderr.strip()}") from error
    answer = json.loads(done.stdout)
    packed = answer[0] if isinstance(answer, list) else next(iter(answer.values()))
    (cache / packed["filename"].replace("@", "").replace("/", "-")).replace(path)
    return path


def fetch(icon_set: IconSet, cache: Path = CACHE) -> Path:
    """The archive of one icon set, downloaded at its first use."""
    return _pack(icon_set.package, icon_set.version, icon_set.archive, cache)


def fetch_keywords(cache: Path = CACHE) -> Path:
    """The archive of the emoji labels and tags, downloaded at its first use."""
    return _pack(KEYWORDS_PACKAGE, KEYWORDS_VERSION, f"{KEYWORDS_PACKAGE}-{KEYWORDS_VERSION}.tgz", cache)


def _read_json(archive: Path, member: str) -> Any:
    with tarfile.open(archive) as tar:
        file = tar.extractfile(member)
        if file is None:
            raise RuntimeError(f"{archive} has no {member}: delete the file and fetch it again")
        return json.load(file)


@functools.lru_cache(maxsize=4)
def read_icons(icon_set: IconSet, cache: Path = CACHE) -> dict[str, Any]:
    """The `icons.json` of a set, as its package has it."""
    icons: dict[str, Any] = _read_json(fetch(icon_set, cache), "package/icons.json")
    return icons


@functools.lru_cache(maxsize=1)
def read_keywords(cache: Path = CACHE) -> list[dict[str, Any]]:
    """Every emoji with its English label, tags and shortcodes."""
    keywords: list[dict[str, Any]] = _read_json(fetch_keywords(cache), "package/en/data.json")
    return keywords


def main() -> None:
    """Fetch everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder the archives are kept in")
    cache: Path = parser.parse_args().cache
    for icon_set in (*ICON_SETS, *UNSEEN_SETS):
        print(f"{icon_set.style}: {fetch(icon_set, cache)}")
    print(f"keywords: {fetch_keywords(cache)}")


if __name__ == "__main__":
    main()
