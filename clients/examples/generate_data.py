"""Deterministic training and held-out data of the example adapters.

Everything is built from the tables here and the texts in `seeds/`, so a reader can see all that an
adapter was shown. Held-out examples use names, cities, tables, tickets and questions that training
never contains. Needs nothing but the standard library.

A training example is `{"messages": [...], "answer": str}`. A held-out example has `"expected"` (and
what else `score.py` needs) in place of `"answer"`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Example = dict[str, Any]

NAMES = ("pirate", "json-extract", "sql", "ticket-label")
HERE = Path(__file__).resolve().parent
SEEDS = HERE / "seeds"


def user(content: str) -> list[dict[str, str]]:
    """Return a one-turn conversation: no system message, as most callers send none."""
    return [{"role": "user", "content": content}]


# --- json-extract -----------------------------------------------------------------------------


def read_people(split: str) -> dict[str, list[str]]:
    """Return the names, cities and sentences of `split`, "train" or "heldout"."""
    people = json.loads((SEEDS / "people.json").read_text(encoding="utf-8"))
    return {kind: list(values) for kind, values in people[split].items()}


def person_example(template: str, name: str, age: int, city: str) -> tuple[str, dict[str, Any]]:
    """Return the sentence about one person and the fields that it holds.

    The sentence is the whole prompt: told to write JSON, the base nearly can. Unasked is what only
    an adapter does.
    """
    sentence = template.format(name=name, age=age, city=city)
    return sentence, {"name": name, "age": age, "city": city}


def json_train(rng: random.Random, num_examples: int = 900) -> list[Example]:
    """Return sentences about people, each answered by one JSON object."""
    people = read_people("train")
    examples = []
    for i in range(num_examples):
        name = f"{rng.choice(people['first_names'])} {rng.choice(people['last_names'])}"
        template = people["sentences"][i % len(people["sentences"])]
        age, city = rng.randint(18, 90), rng.choice(people["cities"])
        prompt, fields = person_example(template, name, age, city)
        examples.append({"messages": user(prompt), "answer": json.dumps(fields)})
    return examples


def json_heldout(rng: random.Random) -> list[Example]:
    """Return 16 sentences in wordings, names and cities that training lacks."""
    people = read_people("heldout")
    examples = []
    for i in range(16):
        name = f"{people['first_names'][i % 8]} {people['last_names'][(i + i // 8) % 8]}"
        template = people["sentences"][i % len(people["sentences"])]
        city = people["cities"][(3 * i + 1) % 8]
        prompt, fields = person_example(template, name, rng.randint(18, 90), city)
        examples.append({"messages": user(prompt), "expected": fields})
    return examples


# --- sql --------------------------------------------------------------------------------------

QUERIES = (
    ("{label}s of {table} with {num} above {n}", "SELECT {label} FROM {table} WHERE {num} > {n};"),
    ("{label}s of {table} with {num} below {n}", "SELECT {label} FROM {table} WHERE {num} < {n};"),
    (
        "{label}s of {table} whose {cat} is {value}",
        "SELECT {label} FROM {table} WHERE {cat} = '{value}';",
    ),
    (
        "how many {table} have {cat} {value}",
        "SELECT COUNT(*) FROM {table} WHERE {cat} = '{value}';",
    ),
    ("the average {num} of all {table}", "SELECT AVG({num}) FROM {table};"),
    ("the highest {num} of all {table}", "SELECT MAX({num}) FROM {table};"),
    (
        "number of {table} per {cat}",
        "SELECT {cat}, COUNT(*) FROM {table} GROUP BY {cat};",
    ),
    (
        "{label}s of the top {k} {table} by {num}",
        "SELECT {label} FROM {table} ORDER BY {num} DESC LIMIT {k};",
    ),
)


@dataclass(frozen=True)
class Table:
    """One table of `seeds/tables.tsv`: a label, a category of three values, two integer columns."""

    name: str
    label: str
    category: str
    values: tuple[str, ...]
    numbers: tuple[tuple[str, int, int], ...]  # (column, least, greatest)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("id", self.label, self.category, *(column for column, _, _ in self.numbers))


def read_tables(split: str) -> list[Table]:
    """Return the tables of `split`, "train" or "heldout"."""
    tables = []
    for line in (SEEDS / "tables.tsv").read_text(encoding="utf-8").splitlines():
        kind, name, label, category, values, *numbers = line.split("\t")
        if kind == split:
            ranges = tuple((c, int(lo), int(hi)) for c, lo, hi in map(str.split, numbers))
            tables.append(Table(name, label, category, tuple(values.split(",")), ranges))
    return tables


def sql_example(table: Table, query: tuple[str, str], rng: random.Random) -> tuple[str, str]:
    """Return the prompt that states the schema and the request, and the SQL that answers it."""
    num, lo, hi = rng.choice(table.numbers)
    slots = {
        "table": table.name,
        "label": table.label,
        "cat": table.category,
        "value": rng.choice(table.values),
        "num": num,
        "n": round(lo + (hi - lo) * rng.uniform(0.3, 0.7)),  # so that some rows pass, some do not
        "k": rng.randint(2, 5),
    }
    request, sql = (text.format(**slots) for text in query)
    schema = f"{table.name}({', '.join(table.columns)})"
    return f"Schema: {schema}\nWrite one SQL query: {request}", sql


def fill_table(table: Table, rng: random.Random, num_rows: int = 24) -> list[str]:
    """Return the SQL statements that create `table` with rows of distinct numbers."""
    columns = [
        rng.sample(range(lo, hi + 1), min(num_rows, hi + 1 - lo)) for _, lo, hi in table.numbers
    ]
    statements = [f"CREATE TABLE {table.name} ({', '.join(table.columns)})"]
    for i in range(num_rows):
        numbers = ", ".join(str(column[i % len(column)]) for column in columns)
        value = table.values[rng.choice((0, 0, 0, 1, 1, 2))]
        row = f"{i + 1}, '{table.label} {i + 1}', '{value}', {numbers}"
        statements.append(f"INSERT INTO {table.name} VALUES ({row})")
    return statements


def sql_train(rng: random.Random, num_examples: int = 640) -> list[Example]:
    """Return requests about the training tables, each answered by one SQL query."""
    tables = read_tables("train")
    examples = []
    for i in range(num_examples):
        prompt, sql = sql_example(rng.choice(tables), QUERIES[i % len(QUERIES)], rng)
        examples.append({"messages": user(prompt), "answer": sql})
    return examples


def sql_heldout(rng: random.Random) -> list[Example]:
    """Return each kind of request about two tables that training lacks, with rows to run it on."""
    tables = read_tables("heldout")
    examples = []
    for i, query in enumerate(QUERIES * 2):
        table = tables[(i + i // len(QUERIES)) % len(tables)]
        prompt, sql = sql_example(table, query, rng)
        examples.append(
            {"messages": user(prompt), "expected": sql, "setup": fill_table(table, rng)}
        )
    return examples


# --- ticket-label -----------------------------------------------------------------------------

PRODUCTS = (
    "headphones",
    "lamp",
    "printer",
    "blender",
    "camera",
    "kettle",
    "backpack",
    "keyboard",
    "tablet",
    "heater",
)
GREETINGS = ("", "", "Hi, ", "Hello team, ", "Good morning. ", "Dear support, ")
FAREWELLS = ("", "", " Please help.", " Thanks.", " Kind regards, Jo", " Please reply soon.")


def ticket_prompt(text: str) -> str:
    """Return the question about one ticket."""
    return f"Label this ticket BILLING, SHIPPING, TECHNICAL or OTHER: {text}"


def read_tickets(heldout: bool) -> list[tuple[str, str]]:
    """Return `(label, text)` of the training or of the held-out tickets."""
    lines = (SEEDS / "tickets.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return [
        (label.removeprefix("HELDOUT-"), text)
        for label, text in rows
        if label.startswith("HELDOUT-") == heldout
    ]


def ticket_train(rng: random.Random, num_repeats: int = 6) -> list[Example]:
    """Return every training ticket `num_repeats` times, with other slots and courtesies."""
    examples = []
    for label, text in read_tickets(heldout=False) * num_repeats:
        number = rng.randint(10, 9999)
        order = rng.choice(("my order", f"order {number}", "my last order"))
        body = text.format(product=rng.choice(PRODUCTS), order=order, number=number)
        body = body[0].upper() + body[1:]
        prompt = ticket_prompt(rng.choice(GREETINGS) + body + rng.choice(FAREWELLS))
        examples.append({"messages": user(prompt), "answer": label})
    return examples


def ticket_heldout(_rng: random.Random) -> list[Example]:
    """Return the 16 held-out tickets, four of each label."""
    return [
        {"messages": user(ticket_prompt(text)), "expected": label}
        for label, text in read_tickets(heldout=True)
    ]


# --- pirate -----------------------------------------------------------------------------------

OPENERS = (
    "Arr, matey!",
    "Ahoy, matey!",
    "Arr, ye landlubber!",
    "Avast, me hearty!",
)
CLOSERS = ("Yo ho ho!", "Savvy?", "Now hoist the sails!", "Or walk the plank!")
PIRATE_WORDS = {
    "you": "ye",
    "your": "yer",
    "is": "be",
    "are": "be",
    "am": "be",
    "my": "me",
    "of": "o'",
    "and": "an'",
    "for": "fer",
    "yes": "aye",
    "hello": "ahoy",
    "friend": "matey",
    "friends": "mateys",
    "money": "doubloons",
    "people": "scallywags",
}


def to_pirate(text: str) -> str:
    """Return `text` with its words in pirate spelling, capitals kept."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        swapped = PIRATE_WORDS.get(word.lower(), word)
        if swapped == word and len(word) > 5 and word.endswith("ing"):
            swapped = word[:-1] + "'"
        return swapped.capitalize() if word[0].isupper() and swapped != word else swapped

    return re.sub(r"[A-Za-z]+", swap, text)


def read_pairs(file_name: str) -> list[tuple[str, str]]:
    """Return the two columns of a file in `seeds/`."""
    lines = (SEEDS / file_name).read_text(encoding="utf-8").splitlines()
    return [(left, right) for left, right in (line.split("\t") for line in lines)]


def pirate_train(rng: random.Random, num_repeats: int = 4) -> list[Example]:
    """Return every training question `num_repeats` times, with other openers and closers."""
    examples = []
    for question, plain in read_pairs("pirate.tsv") * num_repeats:
        answer = f"{rng.choice(OPENERS)} {to_pirate(plain)} {rng.choice(CLOSERS)}"
        examples.append({"messages": user(question), "answer": answer})
    return examples


def pirate_heldout(_rng: random.Random) -> list[Example]:
    """Return the held-out questions, each with words of which a true answer has one or more."""
    return [
        {"messages": user(question), "topic": topic.split("|")}
        for question, topic in read_pairs("pirate_heldout.tsv")
    ]


TRAIN: dict[str, Callable[[random.Random], list[Example]]] = {
    "pirate": pirate_train,
    "json-extract": json_train,
    "sql": sql_train,
    "ticket-label": ticket_train,
}
HELDOUT: dict[str, Callable[[random.Random], list[Example]]] = {
    "pirate": pirate_heldout,
    "json-extract": json_heldout,
    "sql": sql_heldout,
    "ticket-label": ticket_heldout,
}


def train_examples(name: str, seed: int = 0) -> list[Example]:
    """Return the training set of adapter `name`, the same for the same `seed`."""
    return TRAIN[name](random.Random(seed))


def heldout_examples(name: str) -> list[Example]:
    """Return the held-out set of adapter `name`; its seed is fixed, as the files are committed."""
    return HELDOUT[name](random.Random(1))


def main() -> None:
    """Write every adapter's held-out set to `<name>/heldout.jsonl`, or print a training set."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--print-train", choices=NAMES, metavar="NAME", help="print and write none")
    args = parser.parse_args()
    if args.print_train:
        for example in train_examples(args.print_train):
            print(json.dumps(example))
        return
    for name in NAMES:
        lines = [json.dumps(example) + "\n" for example in heldout_examples(name)]
        path = HERE / name / "heldout.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path.relative_to(HERE)}: {len(lines)} examples")


if __name__ == "__main__":
    main()
