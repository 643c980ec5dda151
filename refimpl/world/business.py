"""Business documents: invoices with a rule to learn, tickets and articles, case ids with near duplicates."""

from __future__ import annotations

import re

from refimpl.world.base import Facts, Format, Split
from refimpl.world.lexicon import COMPANIES, OBJECTS, TOWNS
from refimpl.world.names import names
from refimpl.world.phrasebook import Phrases, article
from refimpl.world.rng import Rng

# ---- invoice: several invoices of one vendor. Which field is to be paid is the vendor's habit and must be
# learned from the solved ones:
#   Invoice 4821 from Falcon
#   Customer: Balbert
#   Net: 120
#   Total: 143
#   Balance: 90
#   Pay: 143
# The last "Pay:" is the boundary. Facts: vendor, field, invoices [{number, customer, amounts}].
FIELDS = ("Net", "Total", "Balance", "Due", "Rest", "Sum")


def _sample_invoice(rng: Rng, split: Split) -> Facts:
    fields = rng.sample(FIELDS, rng.between(3, 5))
    invoices = []
    for _ in range(rng.between(2, 5)):
        order = rng.sample(fields, len(fields))
        amounts = rng.sample(range(10, 1000), len(fields))
        invoices.append(
            {
                "number": rng.between(1000, 9999),
                "customer": rng.choice(names(split)),
                "amounts": dict(zip(order, amounts, strict=True)),
            }
        )
    return {"vendor": rng.choice(COMPANIES), "field": rng.choice(fields), "invoices": invoices}


def _render_invoice(facts: Facts, rng: Rng) -> str:
    parts = []
    for invoice in facts["invoices"]:
        lines = "".join(f"{k}: {v}\n" for k, v in invoice["amounts"].items())
        parts.append(
            f"Invoice {invoice['number']} from {facts['vendor']}\nCustomer: {invoice['customer']}\n{lines}"
            f"Pay: {invoice['amounts'][facts['field']]}\n"
        )
    return "".join(parts)


_INVOICE = re.compile(r"Invoice (\d+) from (\w+)\nCustomer: (\w+)\n((?:\w+: \d+\n)+?)Pay: (\d+)\n")


def _parse_invoice(text: str) -> Facts:
    found = _INVOICE.findall(text)
    if not found:
        raise ValueError("text: no invoice in it")
    invoices, habits = [], set(FIELDS)
    for number, _, customer, lines, pay in found:
        amounts = {k: int(v) for k, v in (line.split(": ") for line in lines.split("\n")[:-1])}
        invoices.append({"number": int(number), "customer": customer, "amounts": amounts})
        habits &= {k for k, v in amounts.items() if v == int(pay)}
    if len(habits) != 1:
        raise ValueError(f"text: the payments follow {len(habits)} fields, expected one")
    facts = {"vendor": found[0][1], "field": habits.pop(), "invoices": invoices}
    if _render_invoice(facts, Rng("unused")) != text:
        raise ValueError("text: not a list of invoices of one vendor")
    return facts


# ---- ticket: a list of articles, then a ticket in other words; the answer is the article's id.
#   Articles:
#   A412: lamp, broken
#   A90: key, late
#   Ticket: Balbert writes: "My lamp fell apart after a day."
#   Article: A412
# Boundary "Article:" (the list's head is "Articles:"). Facts: articles [[id, object, problem]], asked,
# customer.
PROBLEMS = {
    "broken": "My {object} fell apart after a day.|The {object} does not work at all."
    "|The {object} came in two pieces.",
    "late": "I still wait for my {object}.|Where is the {object} that I ordered weeks ago?"
    "|No {object} has come so far.",
    "wrong": "You sent me something else than the {object}.|I did not order this, I ordered the {object}."
    "|In the box of the {object} there was another thing.",
    "price": "You asked too much money for the {object}.|The bill for the {object} is too high."
    "|I paid twice for the {object}.",
    "return": "I want to give the {object} back.|May I send you the {object} again?"
    "|I do not want to keep the {object}.",
    "use": "How do I use the {object}?|I do not understand how the {object} works."
    "|Is there a book about the {object}?",
    "size": "The {object} is too big for me.|The {object} is far too small."
    "|Do you have the {object} in another size?",
    "color": "I would like the {object} in another color."
    "|The {object} does not look as it did in the picture."
    "|The {object} has the wrong color.",
}
_TICKETS = {problem: Phrases(forms.split("|")) for problem, forms in PROBLEMS.items()}
_PROBLEMS = tuple(PROBLEMS)


def _sample_ticket(rng: Rng, split: Split) -> Facts:
    n = rng.between(3, 8)
    objects = rng.sample(OBJECTS, 3)  # few objects, so that both words of an article count
    pairs = rng.sample([(o, p) for o in objects for p in _PROBLEMS], n)
    ids = rng.sample(range(10, 1000), n)
    return {
        "articles": [[f"A{i}", o, p] for i, (o, p) in zip(ids, pairs, strict=True)],
        "asked": rng.below(n),
        "customer": rng.choice(names(split)),
    }


def _render_ticket(facts: Facts, rng: Rng) -> str:
    number, thing, problem = facts["articles"][facts["asked"]]
    articles = "".join(f"{i}: {o}, {p}\n" for i, o, p in facts["articles"])
    words = _TICKETS[problem].write(rng, {"object": thing})
    return f'Articles:\n{articles}Ticket: {facts["customer"]} writes: "{words}"\nArticle: {number}\n'


_TICKET = re.compile(r'Articles:\n((?:A\d+: \w+, \w+\n)+)Ticket: (\w+) writes: "(.+)"\nArticle: (A\d+)\n')


def _parse_ticket(text: str) -> Facts:
    match = _TICKET.fullmatch(text)
    if match is None:
        raise ValueError("text: expected the lines 'Articles:', 'Ticket:' and 'Article:'")
    articles = [re.split(": |, ", line) for line in match[1].split("\n")[:-1]]
    for asked, (number, thing, problem) in enumerate(articles):
        if number == match[4] and _TICKETS[problem].read(match[3]) == {"object": thing}:
            return {"articles": articles, "asked": asked, "customer": match[2]}
    raise ValueError(f"text: article {match[4]!r} does not solve the ticket {match[3]!r}")


# ---- case: cases that differ in a single field, and one question.
#   Case 2041-K: Balbert against Dorlin, about a lamp, court of Ripon.
#   Question: Which case is Balbert against Dorlin, about a lamp, court of Ripon?
#   Answer: 2041-K
# Boundary "Answer:". Facts: cases [[id, plaintiff, defendant, object, town]], asked (index).
def _sample_case(rng: Rng, split: Split) -> Facts:
    pool = names(split)
    base = [*rng.sample(pool, 2), rng.choice(OBJECTS), rng.choice(TOWNS)]
    rows = [base]
    for _ in range(rng.between(2, 7)):
        row, field = list(rng.choice(rows)), rng.below(4)
        row[field] = rng.choice((pool, pool, OBJECTS, TOWNS)[field])
        if row not in rows and row[0] != row[1]:
            rows.append(row)
    rng.shuffle(rows)
    numbers = rng.sample(range(1000, 10000), len(rows))
    cases = [[f"{n}-{rng.choice('ABCDEFGHKLMNPRST')}", *row] for n, row in zip(numbers, rows, strict=True)]
    return {"cases": cases, "asked": rng.below(len(cases))}


def _about(case: list[str]) -> str:
    return f"{case[1]} against {case[2]}, about {article(case[3])}, court of {case[4]}"


def _render_case(facts: Facts, rng: Rng) -> str:
    asked = facts["cases"][facts["asked"]]
    lines = "".join(f"Case {case[0]}: {_about(case)}.\n" for case in facts["cases"])
    return f"{lines}Question: Which case is {_about(asked)}?\nAnswer: {asked[0]}\n"


_CASE = re.compile(r"Case ([0-9A-Z-]+): (\w+) against (\w+), about an? (\w+), court of (\w+)\.")


def _parse_case(text: str) -> Facts:
    cases = [list(row) for row in _CASE.findall(text)]
    number = text.removesuffix("\n").rpartition("Answer: ")[2]
    asked = next((i for i, case in enumerate(cases) if case[0] == number), None)
    if asked is None or _render_case({"cases": cases, "asked": asked}, Rng("unused")) != text:
        raise ValueError(f"text: {number!r} does not answer a question about its cases")
    return {"cases": cases, "asked": asked}


FORMATS = [
    Format("invoice", _sample_invoice, _render_invoice, _parse_invoice, "Pay:", ("footprint C6",)),
    Format("ticket", _sample_ticket, _render_ticket, _parse_ticket, "Article:", ("footprint C6",)),
    Format("case", _sample_case, _render_case, _parse_case, "Answer:", ("footprint C6",)),
]
