"""The built-in instruction set: its generator, shape, pinned content, answers and scorer.

The answers are worked out again from the text of each row, without the generator's vocabulary.
"""

import calendar
import hashlib
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import date

import pytest

from neftune_dist.data.builtin import exact_match, rows
from tests.support import builtin_generator

CONTENT = "0274ad9c7bee728337baa06f3dbb391a1857ebf8527fc9ddd499f4d72cc457d1"

ROWS = rows()
TASKS = sorted({row["task"] for row in ROWS})


def rows_of(task: str) -> list[dict[str, str]]:
    return [row for row in ROWS if row["task"] == task]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]+)"', text)


def found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    assert match, f"{pattern} is not in {text}"
    return match.groups()


def arithmetic(ask: str, text: str) -> str:
    a, b = numbers(ask)
    return str(a + b if re.search(r"\+|plus", ask) else a - b)


def compare_numbers(ask: str, text: str) -> str:
    a, b = numbers(ask)
    return str(a if (a > b) == ("larger" in ask) else b)


def convert_unit(ask: str, text: str) -> str:
    sizes = {"millimeters": 1, "centimeters": 10, "meters": 1_000, "kilometers": 1_000_000}
    sizes |= {"grams": 1, "kilograms": 1_000, "minutes": 1, "hours": 60}
    sizes |= {"days": 1, "weeks": 7, "months": 1, "years": 12}
    amount, source = found(r"(\d+) (\w+)", ask)
    (target,) = [word for word in words(ask) if word in sizes and word != source]
    return str(int(amount) * sizes[source] // sizes[target])


def read_table(ask: str, text: str) -> str:
    (value,) = [line.split()[-1] for line in text.splitlines() if words(line)[0] in words(ask)]
    return value


def nth_item(ask: str, text: str) -> str:
    (place,) = found(r"(first|second|third|fourth|fifth|\d)", ask)
    ordinals = ["first", "second", "third", "fourth", "fifth"]
    return words(text)[ordinals.index(place) if place in ordinals else int(place) - 1]


def threshold_rule(ask: str, text: str) -> str:
    label, side, limit, other = found(r"(\w+) if .* (above|below) (\d+), otherwise (\w+)", ask)
    holds = int(text) > int(limit) if side == "above" else int(text) < int(limit)
    return label if holds else other


def edge_letter(ask: str, text: str) -> str:
    (word,) = found(r'(\w+)"?[?.] Answer', ask)
    return word[0] if " first " in ask else word[-1]


def sort_list(ask: str, text: str) -> str:
    items = text.split(", ")
    assert all(item.isdigit() for item in items) == ("numbers" in ask)
    return ", ".join(sorted(items, key=int if "numbers" in ask else str))


def replace_word(ask: str, text: str) -> str:
    old, new = reversed(quoted(ask)) if "instead of" in ask else quoted(ask)
    changed, times = re.subn(rf"\b{old}\b", new, text)
    assert times == 1
    return changed


def extract(ask: str, text: str) -> str:
    emails = re.findall(r"[\w.]+@[\w.]+\w", text)
    if "e-mail" in ask:
        (answer,) = emails
    elif "number" in ask:
        (answer,) = re.findall(r"\d+", text)
    else:
        (answer,) = re.findall(r"(?<=\s)[A-Z]\w+", text)
    return str(answer)


def step_calendar(ask: str, text: str) -> str:
    steps, unit, side, start = found(r"(\d) (day|month)s? (after|before) (\w+)", ask)
    cycle = list(calendar.day_name if unit == "day" else calendar.month_name[1:]) * 3
    if side == "before":
        cycle.reverse()
    return cycle[cycle.index(start) + int(steps)]


def plural(ask: str, text: str) -> str:
    (noun,) = found(r"(?:Write|noun|word|plural of) (\w+)", ask)
    with_es = {"fox", "wrench", "brush", "bench", "box", "church", "bus"}
    with_ies = {"cherry": "cherries", "strawberry": "strawberries"}
    return with_ies.get(noun, noun + ("es" if noun in with_es else "s"))


def acronym(ask: str, text: str) -> str:
    (title,) = found(r"(?:of|Abbreviate) ((?:[A-Z][a-z]+ ?)+)", ask)
    return "".join(filter(str.isupper, title))


def repeat_word(ask: str, text: str) -> str:
    word, times = found(r"(\w+) (?:exactly )?(\d) times", ask)
    return (f"{word} " * int(times)).rstrip()


def format_date(ask: str, text: str) -> str:
    (iso,) = found(r"(\d{4}-\d\d-\d\d)", ask)
    day = date.fromisoformat(iso)
    return f"{day.day} {day:%B} {day.year}"


SOLVERS: dict[str, Callable[[str, str], str]] = {
    "acronym": acronym,
    "arithmetic": arithmetic,
    "change_case": lambda ask, text: text.upper() if "uppercase" in ask else text.lower(),
    "compare_numbers": compare_numbers,
    "convert_unit": convert_unit,
    "count_items": lambda ask, text: str(text.count(",") + 1),
    "edge_letter": edge_letter,
    "extract": extract,
    "format_date": format_date,
    "join_words": lambda ask, text: text.replace(" ", quoted(ask)[0]),
    "json_pair": lambda ask, text: '{{"{}": "{}"}}'.format(*quoted(ask)),
    "membership": lambda ask, text: "yes" if set(words(ask)) & set(words(text)) else "no",
    "nth_item": nth_item,
    "parity": lambda ask, text: "even" if str(numbers(ask)[0])[-1] in "02468" else "odd",
    "plural": plural,
    "read_table": read_table,
    "repeat_word": repeat_word,
    "replace_word": replace_word,
    "reverse_list": lambda ask, text: ", ".join(reversed(text.split(", "))),
    "sort_list": sort_list,
    "step_calendar": step_calendar,
    "threshold_rule": threshold_rule,
}


@pytest.mark.parametrize("task", SOLVERS)
def test_answers_are_those_of_a_second_solver(task: str) -> None:
    family = rows_of(task)
    assert family
    solved = {
        (row["instruction"], row["input"]): SOLVERS[task](row["instruction"], row["input"])
        for row in family
    }
    assert solved == {(row["instruction"], row["input"]): row["output"] for row in family}


def test_only_the_families_of_word_knowledge_have_no_second_solver() -> None:
    assert set(TASKS) - set(SOLVERS) == {"categorize", "opposite"}


def test_each_word_has_one_category() -> None:
    categories: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows_of("categorize"):
        (word,) = found(r"(?:Is|Classify|has|category of) (\w+)", row["instruction"])
        categories[word].add(row["output"])
    assert all(len(names) == 1 for names in categories.values())
    known = {"dog": "animal", "pear": "fruit", "blue": "color", "hammer": "tool"}
    assert {word: categories[word] for word in known} == {w: {c} for w, c in known.items()}


def test_opposites_are_mutual_and_one_option_is_right() -> None:
    opposites: dict[str, str] = {}
    for row in rows_of("opposite"):
        (word,) = found(r"(\w+)[?.] Answer", row["instruction"])
        assert opposites.setdefault(word, row["output"]) == row["output"]
    for row in rows_of("opposite"):
        (word,) = found(r"(\w+)[?.] Answer", row["instruction"])
        options = row["input"].split(", ")
        assert len(set(options)) == 3 and word not in options and row["output"] in options
    assert all(opposites.get(other, word) == word for word, other in opposites.items())
    known = {"hot": "cold", "full": "empty", "near": "far"}
    assert known.items() <= opposites.items()


def test_content_is_pinned() -> None:
    canonical = json.dumps(rows(), sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == CONTENT


def test_shipped_bytes_are_the_generators() -> None:
    assert builtin_generator.SHIPPED.read_bytes() == builtin_generator.shipped_bytes()


def test_a_caller_that_changes_its_rows_changes_no_others() -> None:
    mine = rows()
    mine.pop()["output"] = mine[0]["output"] = "changed"
    assert rows() == ROWS


def test_rows_load_quickly() -> None:
    start = time.perf_counter()
    rows()
    assert time.perf_counter() - start < 1


def test_rows_have_the_four_fields_and_are_distinct() -> None:
    assert {tuple(row) for row in ROWS} == {("instruction", "input", "output", "task")}
    assert len({(row["instruction"], row["input"]) for row in ROWS}) == len(ROWS) >= 2_900


def test_families_are_many_and_none_is_large() -> None:
    counts = Counter(row["task"] for row in ROWS)
    assert len(counts) >= 20
    assert max(counts.values()) <= 0.08 * len(ROWS)


def test_families_are_interleaved() -> None:
    for start in range(0, len(ROWS), len(TASKS)):
        assert sorted(row["task"] for row in ROWS[start : start + len(TASKS)]) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_a_family_is_asked_in_several_ways(task: str) -> None:
    openings = Counter(row["instruction"].split()[0] for row in rows_of(task))
    assert len([opening for opening, count in openings.items() if count >= 10]) >= 3


@pytest.mark.parametrize("task", TASKS)
def test_no_constant_answer_solves_a_family(task: str) -> None:
    ((_, count),) = Counter(row["output"] for row in rows_of(task)).most_common(1)
    assert count <= 0.6 * len(rows_of(task))


def test_prompts_and_answers_are_short() -> None:
    prompts = [len(row["instruction"] + row["input"]) for row in ROWS]
    answers = [len(row["output"]) for row in ROWS]
    assert min(prompts) >= 30 and max(prompts) <= 160 and sum(prompts) <= 100 * len(ROWS)
    assert min(answers) >= 1 and max(answers) <= 60 and sum(answers) <= 20 * len(ROWS)


def test_text_is_plain() -> None:
    for row in ROWS:
        assert all(value.isascii() and value == value.strip() for value in row.values())
        assert not re.search(r"[{}|]|  ", row["instruction"]) and "\n" not in row["output"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42", "42"),
        ("  42\n", "42"),
        ("42.", "42"),
        ("42", "42."),
        ("red,\n  blue", "red, blue"),
        ("The fox slept. ", "The fox slept."),
        ("", " "),
    ],
)
def test_scorer_forgives_white_space_and_one_full_stop(answer: str, expected: str) -> None:
    assert exact_match(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("43", "42"),
        ("Yes", "yes"),
        ("42..", "42"),
        (".42", "42"),
        ("42!", "42"),
        ("4 2", "42"),
        ("a,b", "a, b"),
        ("The answer is 42", "42"),
        ("", "42"),
    ],
)
def test_scorer_refuses_any_other_difference(answer: str, expected: str) -> None:
    assert not exact_match(answer, expected)


def test_scorer_tells_the_answers_of_a_family_apart() -> None:
    for task in TASKS:
        outputs = {row["output"] for row in rows_of(task)}
        accepted = sum(exact_match(a, b) for a in outputs for b in outputs)
        assert accepted == len(outputs)
