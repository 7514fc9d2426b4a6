"""Text of any length made short enough to be shown. Imports no torch."""


def shortened(text: str, most: int) -> str:
    """Cut a text that is too long to be shown, where it has a space if there is one near.

    Args:
        text: The text.
        most: Characters that are shown, 20 or more.

    Returns:
        The text, or its beginning and an ellipsis, of at most so many characters.
    """
    if len(text) <= most:
        return text
    start = text[: most - 1]
    space = start.rfind(" ", most - 20)
    return f"{start[:space] if space > 0 else start}\u2026"


def brief(text: str) -> str:
    """Make one short line of a text, to name it in a message.

    Args:
        text: The text.

    Returns:
        Its words with single spaces, of at most 60 characters.
    """
    return shortened(in_one_line(text), 60)


def in_one_line(text: str) -> str:
    """Bring a text into one line.

    Args:
        text: The text.

    Returns:
        Its words with single spaces, without what cannot be shown.
    """
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
