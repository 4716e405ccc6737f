"""What is written in a text and not read aloud: markdown, HTML, emoji, and the rest of addresses.

Strangers' texts come here, so no pattern may search to the end of a text from each of its
characters: runs are possessive or bounded, or end at what can begin the next match.
"""

import html
import re
from collections.abc import Callable

_EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u200d\u20e3\U000e0020-\U000e007f]+"
)
_EMOTICON = re.compile(r"(?<!\S)(?:[:;=][-']?[()DPp/\\|]|<3|\^_?\^)(?![^\s.,!?])")
_SHORT_CODE = re.compile(r"(?<![\w:]):[a-z][a-z0-9_+-]{1,30}:(?![\w:])")
_COMMENT = re.compile(r"<!--[^<>]{0,1000}-->")
_TAGS = (
    "a|abbr|b|blockquote|br|center|code|dd|del|details|div|dl|dt|em|font|h[1-6]|hr|i|img|ins|kbd|li"
    "|mark|ol|p|pre|q|s|small|span|strong|sub|summary|sup|table|tbody|td|th|thead|tr|tt|u|ul"
    "|emphasis|phoneme|prosody|say-as|speak|voice"  # of SSML
)
_TAG = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]{{0,500}})?\s?/?>", re.IGNORECASE)
# Of an entity that was escaped again, every "&" is "&amp;".
_ENTITY = re.compile(r"&(?:amp;){0,8}((?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]\w{1,30});)")
# The target of a link, which may have parentheses, and its title.
_TARGET = r"\((?:[^()\s]|\([^()\s]*+\))*+(?:\s+\"[^\"\n]{0,200}\")?\)"
# In the order in which it is taken off; spaces have become single ones before.
_MARKDOWN: list[tuple[re.Pattern, str | Callable[[re.Match], str]]] = [
    (re.compile(r"\\[*_~`#>]"), ""),
    (re.compile(r"\\([\[\]()+.!|<$&{}-])"), r"\1"),
    (re.compile(r"^[ \t]*(?:```|~~~).*$", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*(?:[-*_][ \t]*){3,}$", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*\|?(?:[ \t]*:?-+:?[ \t]*\|)+[ \t:-]*$", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*\[[^\[\]\n]+\]:[ \t]+\S.*$", re.MULTILINE), ""),
    (re.compile(r"\[\^[^\[\]\n]{1,40}\]"), ""),
    (re.compile(rf"!\[([^\[\]\n]*)\]{_TARGET}"), r"\1"),
    (re.compile(rf"\[([^\[\]\n]*)\]{_TARGET}"), r"\1"),
    (re.compile(r"\[([^\[\]\n]+)\]\[[^\[\]\n]*\]"), r"\1"),
    (re.compile(r"<(https?://[^<>\s]+)>"), r"\1"),
    (re.compile(r"^[ \t]*(?:>[ \t]*)+", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*#{1,6}[ \t]+(.*)$", re.MULTILINE), lambda found: _heading(found[1])),
    (re.compile(r"^[ \t]*[-*+\u2022][ \t]+(?:\[[ xX]\][ \t]+)?", re.MULTILINE), ""),
    (re.compile(r"`+([^`\n]*)`+"), r"\1"),
    (re.compile(r"(\*{1,3}|~~)(?=\S)([^*~\n]+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<!\w)(_{1,3})(?=\S)([^_\n]+?)(?<=\S)\1(?!\w)"), r"\2"),
    (re.compile(r"^[ \t]*\|[ \t]*(.*?)[ \t]*\|[ \t]*$", re.MULTILINE), r"\1"),
    (re.compile(r"[ \t]+\|[ \t]+"), ", "),
    (re.compile("[\u2122\u00a9\u00ae]"), ""),
]
_URL = re.compile(
    r"\b(?:[a-z][a-z0-9+]{1,15}://|www\.)[^\s<>\"')\]]+[^\s<>\"')\].,;:!?]", re.IGNORECASE
)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+\b")
# Hosts that are written without a scheme, of the endings that are no words.
_HOST = re.compile(
    r"(?<![\w@.-])(?:[a-z0-9-]+\.)+(?:com|org|net|edu|gov|io|ai|dev|app)(?:\.[a-z]{2})?"
    r"(?![\w@-]|\.\w)(?::\d{1,5})?(?:/[^\s<>\"')\]]*[^\s<>\"')\].,;:!?])?/?",
    re.IGNORECASE,
)


def strip_markup(text: str) -> str:
    """A text without what is not read aloud. Of a link its words stay, of a URL its host."""
    text = _ENTITY.sub(lambda found: html.unescape(f"&{found[1]}"), text)
    for pattern in (_COMMENT, _TAG, _EMOJI, _EMOTICON, _SHORT_CODE):
        text = pattern.sub(" ", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    for pattern, replacement in _MARKDOWN:
        text = pattern.sub(replacement, text)
    text = _URL.sub(_speak_url, text)
    text = _EMAIL.sub(lambda found: _dotted(found[0].replace("@", " at ")), text)
    return _HOST.sub(_speak_url, text)


def _heading(line: str) -> str:
    """A heading without the signs that may close it: "C#" is none of them."""
    line = line.rstrip()
    opened = line.rstrip("#")
    return opened.rstrip() if opened[-1:] in ("", " ") else line


def _speak_url(found: re.Match) -> str:
    host = re.sub(r"^(?:\w[\w+]*://)?(?:[^/@\s]*@)?(?:www\.)?", "", found[0], flags=re.IGNORECASE)
    return _dotted(re.split(r"[/?#:]", host, maxsplit=1)[0])


def _dotted(name: str) -> str:
    return name.replace(".", " dot ")
