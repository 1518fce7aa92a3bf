"""Caption cleaning, as LlamaGen's text encoders were given their captions (its algorithm is DeepFloyd IF's)."""

import html
import re
import warnings
from contextlib import suppress
from urllib.parse import unquote_plus

import ftfy
from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
from bs4.exceptions import ParserRejectedMarkup

# A caption that is only a file name or an address is no mistake here.
warnings.filterwarnings("ignore", category=MarkupResemblesLocatorWarning)

_DOMAIN = r"[a-z0-9.-]+\.(com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_SUFFIXES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)

_Rules = list[tuple[re.Pattern[str], str]]


def _rules(*rules: tuple[str, str]) -> _Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_ADDRESSES = _rules(
    (r"<person>", "person"),
    # Twice: where one address is taken away, another may come forth.
    (rf"\b(https?:(/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
    (rf"\b(www:(/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
)
_SYMBOLS = _rules(
    (r"@\w+\b", ""),
    (r"[\u31c0-\u9fff]+", ""),  # CJK: strokes, enclosed and squared forms, ideographs, hexagrams
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # the end of an article's id
    (r"\\n", " "),
    (r"#(\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.({_SUFFIXES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JUNK = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(for|on)\s\w+", ""),
    (rf"\b({_SUFFIXES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 640x480, with the letter x, its Cyrillic twin or the sign
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_ENDS = _rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str) -> str:
    """Clean a caption once. LlamaGen, and :class:`TextEncoder`, do so twice.

    In this order: undo URL quoting; lower case; drop web addresses, HTML, @names, CJK ideographs; unify dashes and
    quotes; drop IP addresses, long numbers, file names and runs of symbols; make spaces of hyphens and underscores, if
    there are more than three; mend broken Unicode; drop product codes, shop phrases and image sizes; tidy punctuation
    and spaces.

    Args:
        text: a caption.

    Returns:
        The cleaned caption; may be empty.
    """
    text = _apply(_ADDRESSES, unquote_plus(text).strip().lower())
    with suppress(ParserRejectedMarkup):  # "<![", say: no markup then
        text = BeautifulSoup(text, "html.parser").get_text()
    text = _apply(_SYMBOLS, text)
    if len(re.findall("[-_]", text)) > 3:
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_ENDS, _apply(_JUNK, text)).strip()


def _apply(rules: _Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
