"""The generator of the built-in set, which is shipped as `neftune_dist/data/builtin.jsonl`.

To write that file again: python -m tests.support.builtin_generator

Each family of tasks draws its words and its wording from a generator seeded by its name, so that a
family's rows stay the same when another family changes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

SHIPPED = Path(__file__).parents[2] / "neftune_dist/data/builtin.jsonl"

Draw = tuple[str, str, str]
"""The phrasings of one question separated by " | ", its input (often empty) and its answer."""

Family = Callable[[Random], Draw]

ROWS_PER_FAMILY = 125

BAGS = {
    kind: words.split()
    for kind, words in {
        "animal": "dog cat horse cow goat duck lion tiger bear rabbit monkey zebra camel frog "
        "eagle snake turtle whale shark panda fox donkey",
        "fruit": "apple banana pear grape lemon cherry melon coconut strawberry papaya fig",
        "color": "red blue green yellow black white brown purple pink gray",
        "tool": "hammer wrench drill shovel ladder brush rake chisel screwdriver axe",
        "place": "table chair window bridge garden tower fence bench truck barn box church river "
        "lamp bus sofa road school market village kitchen forest island hotel",
        "name": "Anna Ben Carla David Emma Felix Henry Jack Laura Leo Maria Nina Oscar Paul Zoe",
        "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "month": "January February March April May June July August September October November "
        "December",
        "ordinal": "first second third fourth fifth",
        "opposites": "hot/cold big/small early/late fast/slow high/low full/empty wet/dry good/bad "
        "happy/sad strong/weak clean/dirty loud/quiet near/far thick/thin open/closed push/pull",
    }.items()
}
CATEGORIES = ("animal", "fruit", "color", "tool")
NOUNS = BAGS["animal"] + BAGS["fruit"] + BAGS["tool"] + BAGS["place"]
WORDS = NOUNS + BAGS["color"]
UNITS = (
    ("meters", "centimeters", 100), ("centimeters", "millimeters", 10), ("hours", "minutes", 60),
    ("kilometers", "meters", 1000), ("kilograms", "grams", 1000), ("weeks", "days", 7),
    ("years", "months", 12),
)  # fmt: skip


def edge_letter(random: Random) -> Draw:
    word = random.choice(WORDS)
    edge, letter = random.choice((("first", word[0]), ("last", word[-1])))
    asks = (
        f"What is the {edge} letter of {word}? | Give the {edge} letter of the word {word}."
        f' | Which letter comes {edge} in {word}? | Name the {edge} letter in "{word}".'
    )
    return asks, "", letter


def change_case(random: Random) -> Draw:
    text = " ".join(random.sample(WORDS, random.randrange(1, 4)))
    upper, lower = ("uppercase", text, text.upper()), ("lowercase", text.upper(), text)
    kind, given, wanted = random.choice((upper, lower))
    asks = (
        f"Write the text in {kind} letters. | Change this to {kind}."
        f" | Rewrite the text using only {kind} letters. | Turn all letters into {kind}."
    )
    return asks, given, wanted


def nth_item(random: Random) -> Draw:
    items = random.sample(WORDS, random.randrange(3, 6))
    index = random.randrange(len(items))
    ordinal = BAGS["ordinal"][index]
    asks = (
        f"What is the {ordinal} item of this list? | Give the {ordinal} word in the list."
        f" | Which word is number {index + 1} in this list? | Pick item {index + 1} from the list."
    )
    return asks, ", ".join(items), items[index]


def join_words(random: Random) -> Draw:
    words = random.sample(WORDS, random.randrange(2, 5))
    mark = random.choice("-_/+&:")
    asks = (
        f'Join the words with "{mark}". | Put "{mark}" between the words.'
        f' | Connect these words using "{mark}". | Write the words with "{mark}" between them.'
    )
    return asks, " ".join(words), mark.join(words)


def count_items(random: Random) -> Draw:
    items = random.sample(WORDS, random.randrange(2, 7))
    asks = (
        "How many items are in this list? | Count the words in the list."
        " | What is the number of items in the list? | Give the length of this list."
    )
    return asks, ", ".join(items), str(len(items))


def sort_list(random: Random) -> Draw:
    # Only two-digit numbers: their order as text is their order as numbers.
    numbers = [str(number) for number in random.sample(range(10, 100), random.randrange(3, 5))]
    by_size, by_letter = ("numbers", "smallest to largest"), ("words", "A to Z")
    (kind, order), items = random.choice(((by_size, numbers), (by_letter, random.sample(WORDS, 3))))
    asks = (
        f"Sort the {kind} from {order}. | Put these {kind} in order from {order}."
        f" | Arrange the {kind} from {order}. | List these {kind} from {order}."
    )
    return asks, ", ".join(items), ", ".join(sorted(items))


def reverse_list(random: Random) -> Draw:
    words = random.sample(WORDS, 3)
    asks = (
        "Reverse the order of this list. | Write the list backwards, last item first."
        " | Give the items in reverse order. | Turn the list around, so the last word comes first."
    )
    return asks, ", ".join(words), ", ".join(words[::-1])


def membership(random: Random) -> Draw:
    items = random.sample(WORDS, 4)
    absent = [word for word in WORDS if word not in items]
    word, answer = random.choice(((random.choice(items), "yes"), (random.choice(absent), "no")))
    asks = (
        f"Is {word} in the list? | Does the list contain {word}?"
        f" | Does the word {word} appear in this list? | Can you find {word} in this list?"
    )
    return asks, ", ".join(items), answer


def compare_numbers(random: Random) -> Draw:
    a, b = random.sample(range(1, 100), 2)
    kind, answer = random.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    asks = (
        f"Which number is {kind}, {a} or {b}? | Give the {kind} of {a} and {b}."
        f" | Of {a} and {b}, which is {kind}? | Pick the {kind} number: {a}, {b}."
    )
    return asks, "", str(answer)


def arithmetic(random: Random) -> Draw:
    a, b = random.randrange(10, 60), random.randrange(1, 10)
    sign, word, result = random.choice((("+", "plus", a + b), ("-", "minus", a - b)))
    asks = (
        f"What is {a} {sign} {b}? | Work out {a} {word} {b}."
        f" | Find {a} {sign} {b}. | Calculate {a} {word} {b}."
    )
    return asks, "", str(result)


def parity(random: Random) -> Draw:
    number = random.randrange(1, 200)
    asks = (
        f"Is {number} even or odd? | Tell me if the number {number} is even or odd."
        f" | Classify {number} as even or odd. | Even or odd: {number}?"
    )
    return asks, "", "odd" if number % 2 else "even"


def threshold_rule(random: Random) -> Draw:
    limit = random.randrange(20, 81, 10)
    high, low = random.choice((("high", "low"), ("big", "small"), ("over", "under")))
    above, below = random.randrange(limit + 1, 100), random.randrange(1, limit)
    number, label = random.choice(((above, high), (below, low)))
    asks = (
        f"Answer {high} if the number is above {limit}, otherwise {low}."
        f" | Say {low} if the number is below {limit}, otherwise {high}."
        f" | Label the number: {high} if it is above {limit}, otherwise {low}."
    )
    return asks, str(number), label


def categorize(random: Random) -> Draw:
    category = random.choice(CATEGORIES)
    word = random.choice(BAGS[category])
    asks = (
        f"Is {word} an animal, fruit, color or tool?"
        f" | Classify {word} as animal, fruit, color or tool."
        f" | Which group has {word} in it: animal, fruit, color or tool?"
        f" | Choose the category of {word}: animal, fruit, color or tool."
    )
    return asks, "", category


def step_calendar(random: Random) -> Draw:
    unit, reach = random.choice((("day", 3), ("month", 2)))
    start, steps = random.randrange(len(BAGS[unit])), random.randrange(1, reach + 1)
    side, sign = random.choice((("after", 1), ("before", -1)))
    origin = BAGS[unit][start]
    gap = f"{steps} {unit}s" if steps > 1 else f"1 {unit}"
    asks = (
        f"Which {unit} is {gap} {side} {origin}? | What {unit} comes {gap} {side} {origin}?"
        f" | Name the {unit} {gap} {side} {origin}. | Find the {unit} {gap} {side} {origin}."
    )
    return asks, "", BAGS[unit][(start + sign * steps) % len(BAGS[unit])]


def convert_unit(random: Random) -> Draw:
    source, target, factor = random.choice(UNITS)
    amount = random.randrange(2, 13)
    asks = (
        f"How many {target} are in {amount} {source}? | Convert {amount} {source} to {target}."
        f" | Write {amount} {source} in {target}. | What is {amount} {source} in {target}?"
    )
    return asks, "", str(amount * factor)


def read_table(random: Random) -> Draw:
    items, values = random.sample(BAGS["fruit"] + BAGS["tool"], 3), random.sample(range(1, 60), 3)
    item, value = random.choice(list(zip(items, values, strict=True)))
    colon = random.choice((": ", " | ", " = "))
    asks = (
        f"What is the value for {item} in the table? | Look up {item} in this table."
        f" | Read the number next to {item}. | Find the value of {item}."
    )
    table = (f"{name}{colon}{entry}" for name, entry in zip(items, values, strict=True))
    return asks, "\n".join(table), str(value)


def replace_word(random: Random) -> Draw:
    kinds = ("color", "animal", "place")
    words = [random.choice(BAGS[kind]) for kind in kinds]
    kind, old = random.choice(list(zip(kinds, words, strict=True)))
    new = random.choice([word for word in BAGS[kind] if word != old])
    asks = (
        f'Replace "{old}" with "{new}" in the sentence. | Swap the word "{old}" for "{new}".'
        f' | Change "{old}" to "{new}". | Rewrite the sentence with "{new}" instead of "{old}".'
    )
    sentence = random.choice((
        "The {} {} slept near the {}.",
        "We saw the {} {} behind the {}.",
        "A very {} {} stood in front of the {}.",
    ))  # fmt: skip
    return asks, sentence.format(*words), sentence.format(*(new if w == old else w for w in words))


def extract(random: Random) -> Draw:
    name, user, host = (random.choice(BAGS[kind]) for kind in ("name", "animal", "place"))
    number, email = str(random.randrange(2, 100)), f"{user}@{host}.example.com"
    kind, answer = random.choice((("number", number), ("name", name), ("e-mail address", email)))
    asks = (
        f"Extract the {kind} from the sentence. | Which {kind} is mentioned in this sentence?"
        f" | Find the {kind} in the text. | Copy the {kind} that appears in this sentence."
    )
    sentences = (
        f"Send {number} copies to {name} at {email}.",
        f"Please call {name} in room {number} or write to {email}.",
        f"The address on page {number} is {email} and belongs to {name}.",
    )
    return asks, random.choice(sentences), answer


def opposite(random: Random) -> Draw:
    pair, *others = [pair.split("/") for pair in random.sample(BAGS["opposites"], 3)]
    word, answer = random.sample(pair, 2)
    # One word of each other pair at most, so that the options hold a single opposite.
    options = random.sample([answer, *map(random.choice, others)], 3)
    asks = (
        f"Which of these words is the opposite of {word}? | Choose the opposite of {word}."
        f" | Find the word that means the opposite of {word}. | Pick the antonym of {word}."
    )
    return asks, ", ".join(options), answer


def plural(random: Random) -> Draw:
    noun = random.choice(NOUNS)
    asks = (
        f"What is the plural of {noun}? | Give the plural form of the noun {noun}."
        f" | Write {noun} in the plural. | Make the word {noun} plural."
    )
    if noun.endswith("rry"):
        return asks, "", noun[:-1] + "ies"
    return asks, "", noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def json_pair(random: Random) -> Draw:
    key = random.choice((*CATEGORIES, "name", "place", "day", "month"))
    value = random.choice(BAGS[key])
    asks = (
        f'Write a JSON object with the key "{key}" and the value "{value}".'
        f' | Make a JSON object from the key "{key}" and the value "{value}".'
        f' | Give one line of JSON where "{key}" is "{value}".'
        f' | Format the key "{key}" and the value "{value}" as a JSON object.'
    )
    return asks, "", json.dumps({key: value})


def acronym(random: Random) -> Draw:
    words = random.sample(WORDS, random.randrange(3, 5))
    title = " ".join(words).title()
    asks = (
        f"Write the acronym of {title}. | Make an acronym from the first letters of {title}."
        f" | Abbreviate {title} to its initials. | What are the initials of {title}?"
    )
    return asks, "", "".join(word[0].upper() for word in words)


def repeat_word(random: Random) -> Draw:
    word, times = random.choice(WORDS), random.randrange(2, 6)
    asks = (
        f"Repeat the word {word} {times} times. | Write {word} {times} times in a row."
        f" | Say the word {word} exactly {times} times. | Output {word} {times} times."
    )
    return asks, "", " ".join([word] * times)


def format_date(random: Random) -> Draw:
    year, month, day = random.randrange(1990, 2030), random.randrange(12), random.randrange(1, 29)
    date = f"{year}-{month + 1:02}-{day:02}"
    asks = (
        f"Write the date {date} with the month as a word. | Rewrite {date} with a month name."
        f" | Spell out the month of the date {date}. | Reformat the date {date}."
    )
    return asks, "", f"{day} {BAGS['month'][month]} {year}"


FAMILIES: dict[str, tuple[Family, ...]] = {
    "Answer with the number only.": (
        arithmetic, compare_numbers, count_items, convert_unit, read_table,
    ),
    "Answer with the word only.": (
        nth_item, parity, categorize, step_calendar, opposite, plural, threshold_rule,
    ),
    "Answer with one lowercase letter.": (edge_letter,),
    "Answer yes or no.": (membership,),
    "Answer with a list separated by commas.": (sort_list, reverse_list),
    "Answer with the text only.": (change_case, replace_word),
    "Copy it exactly.": (extract,),
    "Answer with capital letters only.": (acronym,),
    "Answer with JSON only.": (json_pair,),
    "Answer in the form 7 May 2001.": (format_date,),
    "Use no spaces.": (join_words,),
    "Use single spaces.": (repeat_word,),
}  # fmt: skip


def family_rows(family: Family, form: str) -> list[dict[str, str]]:
    task = family.__name__
    random = Random(task)
    answers: dict[tuple[str, str], str] = {}
    while len(answers) < ROWS_PER_FAMILY:
        asks, text, answer = family(random)
        answers[f"{random.choice(asks.split(' | '))} {form}", text] = answer
    return [
        {"instruction": instruction, "input": text, "output": answer, "task": task}
        for (instruction, text), answer in answers.items()
    ]


def rows() -> list[dict[str, str]]:
    """All rows, one of each family in turn; no two share both instruction and input."""
    by_family = [
        family_rows(family, form) for form, families in FAMILIES.items() for family in families
    ]
    return [row for turn in zip(*by_family, strict=True) for row in turn]


def shipped_bytes() -> bytes:
    """The content of `builtin.jsonl`."""
    lines = (json.dumps(row, separators=(",", ":")) + "\n" for row in rows())
    return "".join(lines).encode("ascii")


if __name__ == "__main__":
    SHIPPED.write_bytes(shipped_bytes())
