"""What kohya's scripts read from the name of a folder: how often its images are drawn, and their caption."""

import re

_NAME = re.compile(r"([1-9]\d{0,2})_(?=\D|\d+[^\d_])")  # of "10_cat" and "10_1girl", not of "10_12" or "10_12_2024"


def repeats_and_words(name: str) -> tuple[int, str]:
    """Read the name of a folder.

    Args:
        name: Its name, without the folders above.

    Returns:
        The repeats, and the words, which are the caption of images without caption files; 0 and "" for any other name.
    """
    match = _NAME.match(name)
    return (int(match[1]), " ".join(name[match.end() :].split())) if match else (0, "")
