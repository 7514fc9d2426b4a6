"""Text of files that people and their programs wrote: by its mark, as UTF-8, or not at all."""

import codecs
import re

_MARKS: tuple[tuple[bytes, str], ...] = (  # the longer first: UTF-32's little mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_SIGNS = frozenset("€„…’“”•–—™\u00a0¡£§©«®°²³´·»½¼¾¿")
# Signs where only letters stand: those of pages of DOS and Unix.
_IN_WORDS = re.compile(r"[^\W\d_][€„…“”•™¡£§©«®°²³´»½¼¾¿][^\W\d_]|[²³´½¼¾][^\W\d_]")
_LETTERS = frozenset({*map(chr, range(0xC0, 0x100)), *"œšž"} - {"×", "÷"})
_OTHER_PAGES: dict[str, tuple[str, ...]] = {  # the letters beside a to z of the languages that were written in each
    # Polish, Czech, Slovak, Hungarian, Romanian; Croatian, Slovene and their neighbours
    "cp1250": ("ąćęłńóśźż", "áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž", "áéíóöőúüű", "ăâîşţ", "čćđšž"),
    "cp1254": ("âçğı\u0307îöşûü",),  # Turkish; lowering its dotted capital gives a dot by itself
    "cp1257": ("ąčęėįšųūž", "āčēģīķļņšūž", "äõöšüž"),  # Lithuanian, Latvian, Estonian
}


def unicode_text(data: bytes) -> str:
    """Read UTF-8, and UTF-16 and UTF-32 where the text begins with their byte-order mark, as PowerShell writes it.

    Args:
        data: The content of a file.

    Returns:
        The text, without the mark.

    Raises:
        ValueError: It is none of them; says why in words that follow a name of a file.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        name = encoding.upper().removesuffix("-SIG")
        raise ValueError(f"is no text in {name}: byte {error.start + 1}, in line {line}, is none of it") from None
    if "\0" in text:
        raise ValueError("is no text: it holds bytes of zero, as UTF-16 without a byte-order mark does")
    return text


def western_text(data: bytes) -> str | None:
    """Read cp1252, the Western European code page of Windows, where the text is unlikely to be of another code page.

    Two kinds of others are told apart. Code pages of other scripts use the same bytes for their own letters, so read as
    cp1252 their words have hardly any letter of ASCII. Other code pages of Latin letters give another text, which is taken
    as possible where all its letters are of one language.

    Args:
        data: The content of a file that is no Unicode.

    Returns:
        The text; None where it may be anything else.
    """
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    strange = {letter for letter in text if not letter.isascii()} - _SIGNS - _LETTERS
    if strange or re.search(r"[\0-\x08\x0b\x0e-\x1f\x7f]", text):
        return None
    if re.search(r"[”™]\w", text):  # the second half of a character of two bytes
        return None
    if _IN_WORDS.search(text):
        return None
    for word in re.findall(r"[^\W\d_]+", text):
        foreign = sum(letter in _LETTERS for letter in word)
        if foreign > max(1, len(word) - foreign) or re.search(r"[À-ÿœšž]{3}", word):
            return None
    return None if any(_may_be(data, page, text) for page in _OTHER_PAGES) else text


def _may_be(data: bytes, page: str, western: str) -> bool:
    """Whether another page of Latin letters gives another text, in letters that one of its languages has."""
    try:
        text = data.decode(page)
    except UnicodeDecodeError:
        return False
    other = [place for place, letter in enumerate(text) if letter != western[place]]
    # A letter beside a figure is none: "£5" is no "Ł5".
    beside = "".join(text[max(0, place - 1) : place + 2] for place in other)
    if not other or not all(text[place].isalpha() for place in other) or re.search(r"\d", beside):
        return False
    letters = {letter for letter in text.lower() if not letter.isascii() and (letter.isalpha() or letter == "\u0307")}
    return any(letters <= set(alphabet) for alphabet in _OTHER_PAGES[page])
