"""Each reward pays exactly what its table says: a row a case, with the reason."""

import json
import random
import time
from decimal import Decimal

import pytest
from conftest import GSM8K

import rewards

GOOD = "<reasoning>\nTwo and two.\n</reasoning>\n<answer>\n4\n</answer>"


FIVE = rewards.REWARD_FUNCS[:5]  # a function that you add behind them has its own tests


def pay(reward_func, text, gold="4"):
    (reward,) = reward_func(prompts=["?"], completions=[[{"role": "assistant", "content": text}]], answer=[gold])
    return reward


XMLCOUNT = [
    (GOOD, 0.5, "ends in EOS, no newline"),
    (GOOD + "\n", 0.5, "one newline after the answer is free"),
    (GOOD + "\n\n", 0.498, "the second newline is charged"),
    (GOOD + "\nabc", 0.494, "characters after that newline are charged"),
    (GOOD + "abc", 0.494, "and without the newline too"),
    (GOOD + "x" * 100, 0.3, "0.002 a character"),
    (GOOD + "x" * 1000, 0.0, "never below 0"),
    ("<reasoning>\n" + "long. " * 500 + "\n</reasoning>\n<answer>\n4\n</answer>", 0.5, "length before the end is free"),
    ("<reasoning>\nTwo", 0.125, "a quarter for the first tag: the slope to climb"),
    ("<reasoning>\nTwo\n</reasoning>\n", 0.25, "two quarters"),
    ("<reasoning>\nTwo\n</reasoning>\n<answer>\n4", 0.375, "three quarters; nothing to charge after a missing tag"),
    ("<reasoning>Two</reasoning><answer>4</answer>", 0.0, "tags need their newlines here"),
    (GOOD + "\n" + GOOD, 0.0, "each part stands twice"),
    ("<reasoning>\n<reasoning>\nTwo\n</reasoning>\n<answer>\n4\n</answer>", 0.375, "one part twice"),
    ("<reasoning>\nTwo\n</reasoning>\n</reasoning>\n<answer>\n4\n</answer>", 0.375, "twice, sharing a newline"),
    ("<reasoning>\n</reasoning>\n<answer>\n</answer>", 0.5, "counts tags, not contents"),
    ("", 0.0, "empty"),
]

SOFT = [
    (GOOD, 0.5, "the required format"),
    ("<reasoning>Two.</reasoning><answer>4</answer>", 0.5, "no line breaks"),
    (
        "<reasoning>\nTwo.\nAnd two.\n\nSo four.\n</reasoning>\n\n\n<answer>4</answer>",
        0.5,
        "reasoning of several lines",
    ),
    ("  \n" + GOOD, 0.5, "blank space first"),
    (GOOD + "\nAnything else", 0.5, "anything may follow"),
    ("Sure! " + GOOD, 0.0, "but nothing may precede"),
    (GOOD + "\n<answer>\n5\n</answer>", 0.0, "two answer blocks"),
    (GOOD + GOOD, 0.0, "everything twice"),
    ("<answer>4</answer><reasoning>Two.</reasoning>", 0.0, "wrong order"),
    ("<reasoning>Two.</reasoning></answer>4<answer>", 0.0, "closing tag first"),
    ("<reasoning></reasoning><answer>4</answer>", 0.0, "no reasoning"),
    ("<reasoning>\n \n</reasoning>\n<answer>\n4\n</answer>", 0.0, "blank reasoning"),
    ("<reasoning>Two.</reasoning><answer> \n</answer>", 0.0, "blank answer"),
    ("<reasoning>Two.</reasoning> so <answer>4</answer>", 0.0, "text between the blocks"),
    ("<reasoning>Two.<answer>4</answer>", 0.0, "a tag is missing"),
    ("<reasoning>Two.</reasoning><answer>4", 0.0, "truncated before the end"),
    ("<Reasoning>Two.</Reasoning><Answer>4</Answer>", 0.0, "tags are lower case"),
    ("", 0.0, "empty"),
]

STRICT = [
    (GOOD, 0.5, "the required format, ending in EOS"),
    (GOOD + "\n", 0.5, "one newline may follow"),
    ("<reasoning>\nTwo.\n\nAnd two.\n</reasoning>\n<answer>\n4\napples\n</answer>", 0.5, "both texts may span lines"),
    ("<reasoning>\n\nTwo.\n\n</reasoning>\n<answer>\n4\n</answer>", 0.5, "blank lines inside are text"),
    (GOOD + "\n\n", 0.0, "two newlines"),
    (GOOD + " ", 0.0, "anything else after it"),
    ("\n" + GOOD, 0.0, "anything before it"),
    ("<reasoning>Two.\n</reasoning>\n<answer>\n4\n</answer>", 0.0, "no newline after a tag"),
    ("<reasoning>\nTwo.\n</reasoning>\n<answer>\n4</answer>", 0.0, "no newline before a tag"),
    ("<reasoning>\nTwo.\n</reasoning>\n\n<answer>\n4\n</answer>", 0.0, "blank line between the blocks"),
    ("<reasoning>\nTwo.\n</reasoning><answer>\n4\n</answer>", 0.0, "no line between the blocks"),
    ("<reasoning>\n\n</reasoning>\n<answer>\n4\n</answer>", 0.0, "blank reasoning"),
    ("<reasoning>\n</reasoning>\n<answer>\n4\n</answer>", 0.0, "no reasoning line at all"),
    ("<reasoning>\nTwo.\n</reasoning>\n<answer>\n\t\n</answer>", 0.0, "blank answer"),
    (GOOD + "\n" + GOOD, 0.0, "everything twice"),
    (GOOD.replace("\n", "\r\n"), 0.0, "carriage returns are not the format"),
    ("", 0.0, "empty"),
]

INT = [
    ("4", 0.5, "a bare number, as in the original"),
    ("-5", 0.5, "negative: GSM8K has some; the original's isdigit refused it"),
    ("1,080", 0.5, "thousands comma: GSM8K has 93"),
    ("-1,080,000", 0.5, "both"),
    ("−5", 0.5, "U+2212, the minus of formulas"),
    ("–1,080", 0.5, "an en dash in its place"),
    ("—5", 0.0, "an em dash is none"),
    ("5-3", 0.0, "nor is arithmetic an integer"),
    ("€5", 0.0, "any currency"),
    ("007", 0.5, "leading zeros"),
    ("9" * 32, 0.5, "32 characters"),
    ("9" * 33, 0.0, "33: too long to be an answer"),
    ("9" * 5000, 0.0, "int() would raise on it"),
    ("10,80", 0.0, "comma in the wrong place"),
    ("1,0800", 0.0, "too many digits after a comma"),
    (",080", 0.0, "nothing before a comma"),
    ("1080,", 0.0, "trailing comma"),
    ("4.0", 0.0, "decimals are no integer text"),
    ("$4", 0.0, "currency is no integer text"),
    ("+4", 0.0, "no plus sign"),
    ("- 4", 0.0, "no space"),
    ("--4", 0.0, "one sign"),
    ("4 apples", 0.0, "words"),
    ("٤٢", 0.0, "Arabic-Indic digits: isdigit is True"),
    ("４", 0.0, "full-width digit"),
    ("7²", 0.0, "superscript: isdigit is True, int() raises"),
    ("1_000", 0.0, "int() would accept it"),
    ("", 0.0, "empty"),
]

SAME_NUMBER = [
    ("72", "72", True, "equal text"),
    ("1,080", "1080", True, "comma on one side"),
    ("$1,080.00", "1,080", True, "currency, decimals"),
    ("72.", "72", True, "the sentence's full stop"),
    ("72.0", "72", True, "as numbers"),
    ("0.50", "0.5", True, "trailing zero"),
    ("50%", "50", True, "per cent"),
    ("50%.", "50", True, "per cent at a sentence's end"),
    ("-$5", "-5", True, "sign before the currency"),
    ("$-5", "-5", True, "and after it"),
    ("−5", "-5", True, "U+2212, the minus of formulas"),
    ("–$1,080.00", "-1080", True, "an en dash in its place"),
    ("£−5", "-5", True, "behind the currency"),
    ("€540", "540", True, "GSM8K asks for euros"),
    ("£1,080.50.", "1080.5", True, "and for pounds"),
    ("−5", "5", False, "that sign matters too"),
    ("-5", "5", False, "sign matters"),
    ("-0", "0", True, "zero has none"),
    (" \n72\t", "72", True, "white space around"),
    ("007", "7", True, "leading zeros"),
    ("9" * 32, "9" * 32, True, "32 characters"),
    ("9" * 33, "9" * 33, False, "over 32 is no number, though the texts agree"),
    ("9" * 5000, "9" * 5000, False, "int() raises"),
    ("36 green leaves", "36", False, "words"),
    ("x = 36", "36", False, "an equation"),
    ("1e3", "1000", False, "exponents: Decimal('1e2000000') would take minutes"),
    ("1_000", "1000", False, "Decimal() would accept it"),
    ("٧٢", "72", False, "Decimal() would accept it"),
    ("7²", "72", False, "superscript"),
    ("nan", "nan", False, "not a number"),
    ("inf", "inf", False, "nor this"),
    ("10,80", "1080", False, "comma in the wrong place"),
    ("$$5", "5", False, "one currency sign"),
    ("$-€5", "-5", False, "one of any kind"),
    ("-−5", "-5", False, "one minus of any kind"),
    ("—5", "-5", False, "an em dash is no minus"),
    ("¥5", "5", False, "other currencies"),
    ("5-3", "2", False, "arithmetic"),
    ("-$-5", "-5", False, "one minus sign"),
    ("5$", "5", False, "currency comes first"),
    (".5", "0.5", False, "digits come first"),
    ("5..", "5", False, "one full stop"),
    ("+5", "5", False, "no plus sign"),
    ("1/2", "0.5", False, "fractions"),
    ("", "", False, "empty is not equal to empty"),
    ("5", None, False, "no gold answer"),
    (None, None, False, "nothing is not equal to nothing"),
]


@pytest.mark.parametrize(("text", "reward", "reason"), XMLCOUNT)
def test_xmlcount_pays_for_each_part_and_charges_what_follows(text, reward, reason):
    assert pay(rewards.xmlcount_reward_func, text) == pytest.approx(reward), reason


@pytest.mark.parametrize(("text", "reward", "reason"), SOFT)
def test_soft_format_pays_for_the_order_of_the_tags(text, reward, reason):
    assert pay(rewards.soft_format_reward_func, text) == reward, reason


@pytest.mark.parametrize(("text", "reward", "reason"), STRICT)
def test_strict_format_pays_for_exactly_the_prompted_format(text, reward, reason):
    assert pay(rewards.strict_format_reward_func, text) == reward, reason


@pytest.mark.parametrize(("answer", "reward", "reason"), INT)
def test_int_pays_for_integers_right_or_wrong(answer, reward, reason):
    assert pay(rewards.int_reward_func, f"<answer>\n{answer}\n</answer>", gold="1") == reward, reason
    assert pay(rewards.int_reward_func, answer, gold="1") == reward, f"without tags: {reason}"


@pytest.mark.parametrize(("first", "second", "same", "reason"), SAME_NUMBER)
def test_same_number_compares_values_not_text(first, second, same, reason):
    assert rewards.same_number(first, second) is same, reason
    assert rewards.same_number(second, first) is same, reason


@pytest.mark.parametrize(
    ("text", "extracted", "reason"),
    [
        (GOOD, "4", "the block, stripped"),
        ("<answer>3</answer> no, <answer>4</answer>", "4", "the last block"),
        ("<answer>4", "4", "truncated before the closing tag"),
        ("</answer><answer>4</answer>", "4", "the closing tag after the last opening one"),
        ("<answer></answer>", "", "an empty block"),
        ("  just 4 ", "just 4", "no tag: the whole text"),
        ("", "", "empty"),
    ],
)
def test_extract_xml_answer(text, extracted, reason):
    assert rewards.extract_xml_answer(text) == extracted, reason


@pytest.mark.parametrize(
    ("text", "gold", "reason"),
    [
        ("Half of 8 is 4.\n#### 4", "4", "GSM8K's form"),
        ("#### 1,080 ", "1,080", "comma kept, space stripped"),
        ("4", None, "no mark"),
        ("####", "", "nothing after the mark"),
    ],
)
def test_extract_hash_answer(text, gold, reason):
    assert rewards.extract_hash_answer(text) == gold, reason


def test_correctness_pays_2_for_the_gold_number_with_and_without_tags():
    assert pay(rewards.correctness_reward_func, GOOD, gold="4") == 2.0
    assert pay(rewards.correctness_reward_func, "4", gold="4") == 2.0, "as in the original"
    assert pay(rewards.correctness_reward_func, GOOD, gold="5") == 0.0
    assert pay(rewards.correctness_reward_func, "It is 4", gold="4") == 0.0, "a sentence is no number"


def test_full_score_is_4():
    assert sum(pay(func, GOOD) for func in FIVE) == 4.0
    assert sum(pay(func, rewards.XML_COT_FORMAT.format(reasoning="Two\nand two.", answer=4)) for func in FIVE) == 4.0


def test_names_and_order_are_the_originals():
    assert [func.__name__ for func in rewards.REWARD_FUNCS[:5]] == [
        "xmlcount_reward_func",
        "soft_format_reward_func",
        "strict_format_reward_func",
        "int_reward_func",
        "correctness_reward_func",
    ]


def test_one_reward_a_completion_whatever_the_message_holds():
    completions = [
        [{"role": "assistant", "content": GOOD}],
        [{"role": "assistant"}],
        [{"content": None}],
        [{"content": ""}],
    ]
    for func in FIVE:
        paid = func(prompts=["?"] * 4, completions=completions, answer=["4"] * 4, trainer_state=None)
        assert all(type(reward) is float for reward in paid)
        assert paid[0] > 0
        assert paid[1:] == [0.0, 0.0, 0.0]


def test_correctness_reports_gold_extracted_and_shares_to_the_trainer():
    columns, metrics = {}, {}
    completions = [[{"content": GOOD}], [{"content": "Let me CHECK AGAIN. <answer>5</answer>"}]]
    rewards.correctness_reward_func(
        ["?"] * 2, completions, ["4", "4"], log_extra=columns.__setitem__, log_metric=metrics.__setitem__
    )
    assert columns == {"gold": ["4", "4"], "extracted": ["4", "5"]}
    assert metrics == {"correct_rate": 0.5, "reflection_rate": 0.5}


HOSTILE = [
    " " * 50_000,
    "\n" * 50_000,
    "<answer>" + " " * 50_000,
    "<answer>" * 6_000,
    "</answer>" * 5_000,
    "<reasoning>\n" * 4_000,
    "\n</answer>" * 5_000,
    "<reasoning>" + " \n" * 20_000 + "</reasoning>" + " \n" * 5_000 + "<answer>",
    "9" * 50_000,
    "1," * 25_000,
    "$-" * 25_000,
    "<" * 50_000,
    "\x00\ud800\u202e" * 10_000,
    "####" * 10_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_of_50_000_characters_neither_raises_nor_stalls(text):
    """Linear code takes milliseconds here; a backtracking expression took 139 s on 8,000 blanks."""
    started = time.process_time()
    for func in FIVE:
        assert 0.0 <= pay(func, text) <= 2.0
    assert time.process_time() - started < 2.0


def test_random_text_of_tags_and_numbers_never_raises_and_pays_in_range():
    rng = random.Random(0)
    pieces = [*rewards.TAGS, "\n", " ", "4", "-", "−", "–", "$", "€", ",", ".", "%", "x", "١", "²", "1e9", "\x1b[2J"]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        total = sum(pay(func, text) for func in FIVE)
        assert 0.0 <= total <= 4.0
        if pay(rewards.strict_format_reward_func, text):
            assert pay(rewards.soft_format_reward_func, text), "the strict format is a soft format too"


def test_parse_number_values():
    assert rewards.parse_number("$1,080.50") == Decimal("1080.5")
    assert rewards.parse_number("-7.") == -7


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the real GSM8K is not there")
def test_every_gold_answer_of_gsm8k_earns_everything_with_and_without_its_comma():
    rows = [json.loads(line) for split in ("train", "test") for line in (GSM8K / f"{split}.jsonl").open()]
    assert len(rows) == 8792
    for row in rows:
        gold = rewards.extract_hash_answer(row["answer"])
        for written in (gold, gold.replace(",", "")):
            text = rewards.XML_COT_FORMAT.format(reasoning=row["answer"].partition("####")[0].strip(), answer=written)
            total = sum(pay(func, text.rstrip("\n"), gold) for func in FIVE)
            assert total == 4.0, row
