"""The prompt, its parser and the five rewards: all that defines 'a good completion'.

Every reward is a pure function of TRL's form `f(completions, **kwargs) -> list[float]`: B completions give B finite
floats, no printing, no exception whatever the model wrote, time linear in its length. A completion is conversational: a
list whose first message holds the text under "content". The full score is 4.0: 0.5 + 0.5 + 0.5 + 0.5 + 2.0.

Standard library only, so that `pytest tests/test_rewards.py` runs in a second.
"""

import re
from decimal import Decimal

SYSTEM_PROMPT = """\
Solve the problem. Reply in exactly this format, with nothing but the final number as the answer:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""

XML_COT_FORMAT = """\
<reasoning>
{reasoning}
</reasoning>
<answer>
{answer}
</answer>
"""

# A worked example in that format, for ONE_SHOT and for sampling the policy's own cold start.
ONE_SHOT_QUESTION = "A baker fills 3 trays with 12 rolls each and sells 20 of the rolls. How many rolls are left?"
ONE_SHOT_ANSWER = XML_COT_FORMAT.format(
    reasoning="3 trays of 12 rolls are 3 * 12 = 36 rolls.\nAfter selling 20 of them, 36 - 20 = 16 rolls are left.",
    answer="16",
).rstrip("\n")

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

# Signs of self-reflection, the 'aha moment' of the R1 report: lower-cased substrings.
REFLECTION_PHRASES = (
    "recheck",
    "rethink",
    "reevaluate",
    "re-evaluate",
    "reevaluation",
    "re-examine",
    "reexamine",
    "try again",
    "check again",
    "think again",
    "go over the steps",
)

MAX_NUMBER_LENGTH = 32  # characters; int() and Decimal() take quadratic time or raise on what a policy can write
MINUS = "[-−–]"  # a hyphen, U+2212, which models write in formulas, and an en dash in its place
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"  # [0-9], because \d and str.isdigit accept other scripts' digits
INTEGER = re.compile(rf"{MINUS}?{DIGITS}")
NUMBER = re.compile(rf"({MINUS}?[$€£]?|[$€£]{MINUS})(?P<digits>{DIGITS}(?:\.[0-9]+)?)(?:\.?%?|%\.)")


def to_prompt(
    question: str, system_prompt: str = SYSTEM_PROMPT, one_shot: bool = False, in_question: bool = False
) -> list[dict]:
    """System and user message; with `one_shot`, a solved problem as an earlier turn between them. `in_question`: the
    system prompt is no message of its own, but stands at the head of the first question."""
    example = [("user", ONE_SHOT_QUESTION), ("assistant", ONE_SHOT_ANSWER)] if one_shot else []
    messages = [("system", system_prompt), *example, ("user", question)]
    if in_question:
        (_, first), *others = messages[1:]
        messages = [("user", f"{system_prompt}\n\n{first}"), *others]
    return [{"role": role, "content": text} for role, text in messages]


def question_of(prompt: list[dict]) -> str:
    """The question that `to_prompt` was given."""
    return prompt[-1]["content"].removeprefix(f"{SYSTEM_PROMPT}\n\n")


# ---- parsing


def extract_xml_answer(text: str) -> str:
    """What stands between the last `<answer>` and the `</answer>` after it, stripped; without the tag, the whole text
    stripped."""
    _, tag, tail = text.rpartition("<answer>")
    return tail.partition("</answer>")[0].strip() if tag else text.strip()


def extract_hash_answer(text: str) -> str | None:
    """GSM8K's gold answer: what follows `####`, stripped; None without it."""
    _, mark, answer = text.partition("####")
    return answer.strip() if mark else None


def parse_number(text: str | None) -> Decimal | None:
    """The number that `text` is, or None: `1,080`, `$1,080.00`, `-$5`, `€540`, `72.` and `50%` are numbers; `36
    leaves`, `1e3`, `1_000`, digits of other scripts and anything over 32 characters are not."""
    text = (text or "").strip()
    match = NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER_LENGTH else None
    if match is None:
        return None
    number = Decimal(match["digits"].replace(",", ""))
    return -number if match[1].strip("$€£") else number


def same_number(first: str | None, second: str | None) -> bool:
    """Whether both texts are numbers and the same one."""
    number = parse_number(first)
    return number is not None and number == parse_number(second)


# a number in a text, by its parts, for lenient accuracy; a reward of your own may use it as well
NO_EXPONENT = r"(?<![0-9^])(?<!\^[-{])(?<!\^\{-)"  # not the 2 of 9^2, 9^-2, 9^{2}, 9^{-2}, nor behind a digit
NO_UNIT = r"(?<![\W\dcdkm]m)(?<!ft)"  # not the 2 of m2, cm2, ft2
TOUCHING = rf"(?<![\w.,)\]}}%]){MINUS}"  # a sign with nothing in front to subtract from: of -4, not of 9-4
APART = rf"(?:\A|(?<==)|(?<== )){MINUS} "  # and a blank: at the start, or behind an equals sign, = - 4
SEPARATOR = r"(?:,\\[!,]|\{,}|\\[,:;! ]|[, ~'’\u00a0\u2009\u202f])"  # of thousands; the first three are TeX's
GROUPED = rf"[0-9]{{1,3}}(?:{SEPARATOR}[0-9]{{3}})+(?![0-9]|-[a-z])"  # 1 080; of '3 120-page books' 120 alone
PLAIN = r"[0-9](?:[0-9,]*[0-9])?"  # 1080
NONE = r"(?<![\w.])(?=\.[0-9])"  # as in .5, but not in No.5
MINUTES = r"(?!:00):[0-9]{2}(?=\s?[ap]\.?m)"  # of 2:30 pm, which is no number
POWER = r"\^\{?[0-9]+"  # of 2^3, which is none either
FULL_HOUR = r"(?::00)+(?![0-9:])"  # 2:00 is 2
NUMBER_IN_TEXT = re.compile(
    rf"{NO_EXPONENT}{NO_UNIT}(?P<sign>{TOUCHING}|{APART})?\\?(?P<currency>[$€£]?)"
    rf"(?:(?P<digits>{GROUPED}|{PLAIN})|{NONE})(?P<rest>(?:\.[0-9]+)?(?:{MINUTES}|{POWER})?)(?:{FULL_HOUR})?"
)


def last_number(text: str) -> str | None:
    """The last number anywhere in the text, for `parse_number` (which reads no 2^3, no 2:30 pm); None without one."""
    numbers = list(NUMBER_IN_TEXT.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    digits = (last["digits"] or "0").replace("{,}", ",")  # commas stay
    digits = re.sub(r"\\.|[^0-9,]", "", digits)  # other separators go, TeX's commands first
    return f"{'-' if last['sign'] else ''}{last['currency']}{digits}{last['rest']}"


MINUS_BEFORE_BOX = re.compile(rf"(?<![\w)}}\]]){MINUS}\s?\\boxed\s*\{{\Z")  # not the difference 9-\boxed{7}
BOXED_OR_BRACE = re.compile(r"\\boxed\s{0,4}\{|\\[{}]|[{}]")


def boxed_span(text: str) -> tuple[int, int] | None:
    """Where the content of the last closed `\\boxed{}` stands, its braces balanced; None without one."""
    opened, found = [], None  # where the content of each open box starts, None for another brace
    for match in BOXED_OR_BRACE.finditer(text):
        if match[0].endswith("{") and match[0] != "\\{":
            opened.append(match.end() if len(match[0]) > 1 else None)
        elif match[0] == "}" and opened and (start := opened.pop()) is not None:
            found = (start, match.start())
    return found


def native_answer(text: str) -> str | None:
    """The number in the last `\\boxed{}`, with a minus in front of it, else the last number; None without either."""
    start, end = boxed_span(text) or (0, None)
    sign = "-" if MINUS_BEFORE_BOX.search(text[max(0, start - 20) : start]) else ""
    return last_number(sign + text[start:end].strip())


def reflects(text: str) -> bool:
    """Whether the text holds a phrase of self-reflection."""
    lowered = text.lower()
    return any(phrase in lowered for phrase in REFLECTION_PHRASES)


def completion_text(completion: list[dict]) -> str:
    """The text of a conversational completion; '' where the message has none."""
    return completion[0].get("content") or ""


def _stands_once(text: str, part: str) -> bool:
    """Whether `part` occurs exactly once, overlaps counted: str.count sees '\\n</a>\\n</a>\\n' as one '\\n</a>\\n'."""
    return text.find(part) == text.rfind(part) != -1


def _sections(text: str) -> tuple[str, str, str, str] | None:
    """(reasoning, gap, answer, rest) of a text that starts with `<reasoning>` and has each tag once, in order.

    str.partition instead of a regular expression: `\\s*(.*?)\\s*` is cubic on a run of blanks.
    """
    if not text.startswith("<reasoning>") or not all(_stands_once(text, tag) for tag in TAGS):
        return None
    reasoning, _, tail = text.removeprefix("<reasoning>").partition("</reasoning>")
    gap, _, tail = tail.partition("<answer>")
    answer, closing_tag, rest = tail.partition("</answer>")
    if not closing_tag or not reasoning.strip() or not answer.strip():
        return None
    return reasoning, gap, answer, rest


# ---- rewards


def xmlcount_reward_func(completions: list[list[dict]], **kwargs) -> list[float]:
    """0 to 0.5, a part of the format at a time, so that a policy that knows none of it still has a slope to climb.

    0.125 for each of `<reasoning>\\n`, `\\n</reasoning>\\n`, `\\n<answer>\\n` and `\\n</answer>` that stands exactly
    once; where `\\n</answer>` does, minus 0.002 for every character after it beyond one newline; never below 0.

    The original split at `\\n</answer>\\n`, so that a perfect completion ending in EOS instead of a newline was charged
    0.001 for every character of its whole text: a hidden reward for brevity.
    """
    return [_xmlcount(completion_text(completion)) for completion in completions]


def _xmlcount(text: str) -> float:
    parts = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    reward = 0.125 * sum(_stands_once(text, part) for part in parts)
    if _stands_once(text, "\n</answer>"):
        trailing = text.partition("\n</answer>")[2].removeprefix("\n")
        reward -= 0.002 * len(trailing)
    return max(0.0, reward)


def soft_format_reward_func(completions: list[list[dict]], **kwargs) -> list[float]:
    """0.5 for reasoning and answer in their tags and in this order, whatever the line breaks and whatever follows.

    From the first non-blank character on: `<reasoning>`, text, `</reasoning>`, white space, `<answer>`, text,
    `</answer>`; each of the four tags exactly once; neither text blank.

    In the original's regular expression `.` stopped at a newline, so it never paid for the format its prompt asked for;
    with DOTALL it would have paid for several answer blocks.
    """
    return [0.5 if _soft_format(completion_text(completion)) else 0.0 for completion in completions]


def _soft_format(text: str) -> bool:
    sections = _sections(text.lstrip())
    return sections is not None and not sections[1].strip()


def strict_format_reward_func(completions: list[list[dict]], **kwargs) -> list[float]:
    """0.5 for exactly the format of `SYSTEM_PROMPT`: `<reasoning>\\n…\\n</reasoning>\\n<answer>\\n…\\n</answer>`.

    At most one newline may follow; each tag exactly once; neither text blank. Both texts may span lines, which the
    original's regular expression forbade.
    """
    return [0.5 if is_strict_format(completion_text(completion)) else 0.0 for completion in completions]


def is_strict_format(text: str) -> bool:
    """Whether `strict_format_reward_func` pays for this text; evaluate.py's 'required format'."""
    sections = _sections(text)
    if sections is None:
        return False
    reasoning, gap, answer, rest = sections
    own_lines = all(part.startswith("\n") and part.endswith("\n") for part in (reasoning, answer))
    return own_lines and gap == "\n" and rest in ("", "\n")


def int_reward_func(completions: list[list[dict]], **kwargs) -> list[float]:
    """0.5 where the extracted answer is an integer, right or wrong: GSM8K's answers all are.

    An optional minus, then ASCII digits, or digits with correctly placed thousands commas; at most 32 characters. The
    original's `str.isdigit` refused `-5` and `1,080`, which are gold answers, and accepted `7²`.
    """
    answers = [extract_xml_answer(completion_text(completion)) for completion in completions]
    return [0.5 if len(a) <= MAX_NUMBER_LENGTH and INTEGER.fullmatch(a) else 0.0 for a in answers]


def correctness_reward_func(
    prompts: list, completions: list[list[dict]], answer: list[str], *, log_extra=None, log_metric=None, **kwargs
) -> list[float]:
    """2.0 where the extracted answer and the gold answer are the same number (see `parse_number`).

    The original compared strings, so that `1,080`, `$18` or `18.00` earned nothing.

    Args:
        prompts: B prompts; not used, but part of the original's signature.
        completions: B conversational completions.
        answer: B gold answers, the dataset's column of that name.
        log_extra: TRL's hook for columns of the completions table: gets `gold` and `extracted`.
        log_metric: TRL's hook for scalars: gets `correct_rate` and `reflection_rate`, shares from 0 to 1.

    Returns:
        B floats, each 0.0 or 2.0.
    """
    texts = [completion_text(completion) for completion in completions]
    extracted = [extract_xml_answer(text) for text in texts]
    correct = [same_number(found, gold) for found, gold in zip(extracted, answer, strict=True)]
    if log_extra is not None:
        log_extra("gold", list(answer))
        log_extra("extracted", extracted)
    if log_metric is not None and texts:
        log_metric("correct_rate", sum(correct) / len(texts))
        log_metric("reflection_rate", sum(map(reflects, texts)) / len(texts))
    return [2.0 if right else 0.0 for right in correct]


REWARD_FUNCS = [
    xmlcount_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    int_reward_func,
    correctness_reward_func,
]
