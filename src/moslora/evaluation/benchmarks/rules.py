"""How answers to picture benchmarks are read and scored without a judge: the rules of VLMEvalKit, to the letter.

They are those of ``ms-vlmeval`` 0.0.20, which is VLMEvalKit as PyPI has it; ``benchmarks/vlm_rules.py`` compares them
with its functions. Rules move between its versions (a bare letter was unread in some), so a score needs the version
beside it. Their oddities are kept, because published figures have them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

__all__ = [
    "RULES_VERSION",
    "TEXT_RULES",
    "UNREAD",
    "anls",
    "contains_any",
    "find_choice",
    "find_yes_or_no",
    "relaxed_accuracy",
    "split_answers",
    "vqa_accuracy",
]

RULES_VERSION = "VLMEvalKit as in ms-vlmeval 0.0.20, without a judge"
UNREAD = "Z"  # an answer in which no option was found, or that refuses to answer

# --- Choices ------------------------------------------------------------------------------------------------

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# A letter counts only among the last words: earlier it may be an article.
LAST_WORDS = 4


def find_choice(answer: str, options: Mapping[str, str]) -> str:
    """Find the option that an answer names.

    Args:
        answer: What the model wrote.
        options: Text of each option, by letter.

    Returns:
        The letter that alone stands among the answer's last four words; else the letter of the only option whose text
        occurs in an answer that is at most twice as long as all options; else ``UNREAD``.
    """
    if "Failed to obtain answer via API" not in answer:
        if any(refusal in answer for refusal in REFUSALS):
            return UNREAD
        words = answer.translate(SEPARATORS).split()
        letters = [letter for letter in options if letter in words]
        if len(letters) == 1 and words.index(letters[0]) >= len(words) - LAST_WORDS:
            return letters[0]
        if not letters and UNREAD in words:
            return UNREAD
    lower = answer.lower()
    if len(lower) > 2 * sum(map(len, options.values())):
        return UNREAD
    named = [letter for letter, text in options.items() if text.lower() in lower]
    return named[0] if len(named) == 1 else UNREAD


# --- Yes or no ----------------------------------------------------------------------------------------------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
# The published function passes a flag (re.UNICODE, 32) where the number of replacements is expected.
MOST_PERIODS = 32


def _without_punctuation(text: str) -> str:
    joins = COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if beside_space or joins else " ")
    return LONE_PERIOD.sub("", cleaned, count=MOST_PERIODS)


def find_yes_or_no(answer: str) -> str:
    """Find whether an answer says yes or no.

    Args:
        answer: What the model wrote.

    Returns:
        ``"Yes"``, ``"No"``, or ``UNREAD`` if it has neither word or both.
    """
    words = _without_punctuation(answer.lower()).split()
    says = ("yes" in words, "no" in words)
    return {(True, False): "Yes", (False, True): "No"}.get(says, UNREAD)


# --- Texts --------------------------------------------------------------------------------------------------

NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = ("a", "an", "the")
# Of the VQA evaluation (Agrawal, 2014): each is also meant where one of its apostrophes is missing.
CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)
CONTRACTIONS = {
    word[: found.start()] + word[found.end() :]: word
    for word in CONTRACTED.split()
    for found in re.finditer("'", word)
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # as published


def _plain_words(text: str) -> str:
    """Return a text as the VQA evaluation compares it."""
    lower = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower()
    words = [NUMBERS.get(word, word) for word in lower.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Score an answer by the answers of several people (TextVQA).

    Args:
        answer: What the model wrote.
        references: What people wrote.

    Returns:
        Each reference is left out in turn; the mean of a third per match among the others, at most 1.
    """
    own = _plain_words(answer)
    matches = [_plain_words(reference) == own for reference in references]
    total = sum(matches)
    return fmean(min(1.0, (total - match) / 3) for match in matches)


def anls(answer: str, references: Sequence[str]) -> float:
    """Score an answer by its edit distance (DocVQA and InfoVQA: average normalized Levenshtein similarity).

    Args:
        answer: What the model wrote.
        references: Accepted texts.

    Returns:
        1 less the smallest distance relative to the longer text; 0 below 0.5.
    """
    score = 1 - min(_distance(reference, answer) for reference in references)
    return score if score >= 0.5 else 0.0


def _distance(reference: str, answer: str) -> float:
    # Compared in lower case and with single spaces, and divided by the length before that.
    longest = max(len(reference.upper()), len(answer.upper()))
    edits = _edits(*(" ".join(text.strip().lower().split()) for text in (reference, answer)))
    return edits / longest if longest else 0.0


def _edits(one: str, two: str) -> int:
    """Return Levenshtein's distance."""
    row = list(range(len(one) + 1))
    for letter in two:
        above, row[0] = row[0], row[0] + 1
        for at, other in enumerate(one, 1):
            above, row[at] = row[at], above if other == letter else 1 + min(above, row[at], row[at - 1])
    return row[-1]


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """Score an answer as ChartQA does: a number may be off by 5 %, a text may not.

    Args:
        answer: What the model wrote.
        references: Accepted answers; ``5%`` is 0.05.

    Returns:
        1 if any fits, else 0.
    """
    return float(any(_is_close(reference, answer.strip()) for reference in references))


def _is_close(reference: str, answer: str) -> bool:
    expected, found = _as_number(reference), _as_number(answer)
    if found is not None and expected:  # a reference of 0 is compared as text
        return abs(found - expected) / abs(expected) <= 0.05
    return answer.lower() == reference.lower()


def _as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


FORMULAS = "Handwritten Mathematical Expression Recognition"  # a category of OCRBench


def contains_any(answer: str, references: Sequence[str], category: str = "") -> float:
    """Score an answer as OCRBench does: it contains an accepted text.

    Args:
        answer: What the model wrote.
        references: Accepted texts.
        category: Of the item; formulas are compared without spaces, and with their case.

    Returns:
        1 if it does, else 0.
    """

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if category == FORMULAS else text.lower()

    # Case is removed before white space at the ends, which is the same but for letters whose lower case has some.
    return float(any(plain(reference) in plain(answer) for reference in references))


def split_answers(cell: str) -> list[str]:
    """Return the accepted answers of a cell: a Python list of texts, or one text.

    Args:
        cell: Of the column ``answer``.
    """
    if cell.startswith("[") and cell.endswith("]"):
        try:
            found = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [cell]
        if isinstance(found, list) and found:
            return [str(text) for text in found]
    return [cell]


TEXT_RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "vqa": vqa_accuracy,
    "anls": anls,
    "relaxed": relaxed_accuracy,
    "contains": contains_any,
}
