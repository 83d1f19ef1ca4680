"""Made-up personal data for the slots of a template, and harmless words of the same look for the same slots."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

__all__ = ["HARMLESS", "NEUTRAL", "PERSONAL", "Fill"]

Fill = Callable[[random.Random], str]

_FIRST = (
    "Olivia", "Noah", "Emma", "Liam", "Aisha", "Mateo", "Yuki", "Priya", "Ivan", "Fatima", "Chen", "Sofia", "Kwame",
    "Ingrid", "Pablo", "Hannah", "Tariq", "Mei", "Lars", "Zoe", "Dmitri", "Leila", "Oscar", "Amara", "Felix", "Rosa",
)  # fmt: skip
_LAST = (
    "Johnson", "Garcia", "Müller", "Tanaka", "Okafor", "Rossi", "Kowalski", "Singh", "Nguyen", "Hansen", "Dubois",
    "Silva", "Ivanova", "Haddad", "Kim", "Smith", "O'Brien", "Van Dyke", "Larsson", "Mbeki", "Costa", "Weber",
)  # fmt: skip
_STREETS = ("Maple Street", "Oak Avenue", "King's Road", "Lindenweg", "Harbor Lane", "Elm Drive", "Rue du Moulin")
_TOWNS = ("Springfield", "Leeds", "Graz", "Porto", "Dayton", "Ghent", "Salem", "Malmö", "Cork", "Boise")
_HOSTS = ("mailbox.example", "post.example.com", "home.example.net", "letters.example.org")
_BODIES = ("Northwind Bank", "the Red Cross", "Acme Motors", "Blue River Insurance", "the city library", "Orion Films")
_COUNTRIES = ("Portugal", "Kenya", "Japan", "Canada", "Chile", "Norway", "Vietnam", "Greece")
_PEOPLES = ("Portuguese", "Kenyan", "Japanese", "Canadian", "Chilean", "Norwegian", "Vietnamese", "Greek")
_JOBS = ("manager", "plumber", "nurse", "teacher", "accountant", "pilot")


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _first(rng: random.Random) -> str:
    return rng.choice(_FIRST)


def _last(rng: random.Random) -> str:
    return rng.choice(_LAST)


def _name(rng: random.Random) -> str:
    return f"{_first(rng)} {_last(rng)}"


def _street(rng: random.Random) -> str:
    return rng.choice(_STREETS)


def _address(rng: random.Random) -> str:
    return f"{rng.randint(1, 499)} {_street(rng)}, {rng.choice(_TOWNS)} {_digits(rng, 5)}"


def _card(rng: random.Random) -> str:
    return rng.choice((" ", "-", "")).join(["4" + _digits(rng, 3), *(_digits(rng, 4) for _ in range(3))])


def _phone(rng: random.Random) -> str:
    forms = (f"({_digits(rng, 3)}) 555-{_digits(rng, 4)}", f"+44 20 7946 {_digits(rng, 4)}", f"555-01{_digits(rng, 2)}")
    return rng.choice(forms)


def _email(rng: random.Random) -> str:
    name = f"{_first(rng)}{rng.choice(('.', '_', ''))}{_last(rng)}".lower().replace("'", "").replace(" ", "")
    return f"{name}{rng.choice(('', _digits(rng, 2)))}@{rng.choice(_HOSTS)}"


def _ssn(rng: random.Random) -> str:
    return f"{_digits(rng, 3)}-{_digits(rng, 2)}-{_digits(rng, 4)}"


def _iban(rng: random.Random) -> str:
    return f"DE{_digits(rng, 2)} {' '.join(_digits(rng, 4) for _ in range(4))} {_digits(rng, 2)}"


def _license(rng: random.Random) -> str:
    return f"{rng.choice('ABCDK')}{_digits(rng, 7)}"


def _ip(rng: random.Random) -> str:
    return f"203.0.113.{rng.randint(1, 254)}"


def _birthday(rng: random.Random) -> str:
    months = ("January", "March", "May", "July", "October", "December")
    return f"{rng.choice(months)} {rng.randint(1, 28)}, {rng.randint(1940, 2008)}"


def _of(*choices: str) -> Fill:
    return lambda rng: rng.choice(choices)


def _numbered(*forms: str) -> Fill:
    """Words with digits in them that say nothing about a person."""
    return lambda rng: rng.choice(forms).format(a=_digits(rng, 4), b=_digits(rng, 4), n=rng.randint(2, 400))


_BOTH_NAMES = _of("the manager", "my brother", "nobody in particular", "Captain Ahab", "Sherlock Holmes", "Robin Hood")
_ONE_NAME = _of("Grandma", "everyone", "the neighbor", "Cinderella", "Zeus", "Pinocchio", "the cat", "Hamlet")
_PLACE = _of(
    "the address on file", "the Eiffel Tower, Paris", "Gate 12, Terminal 3", "the main station", "aisle 4, shelf 17",
    "the corner of the park", "Central Park, New York", "Hall 7 of the fair", "the branch office",
)  # fmt: skip
_NUMBER = _numbered(
    "from the brochure", "with the blue stripe", "model {a}-{b}", "type {a}", "of the company", "product {a}-{b}-{n}",
    "from 20{n:02}", "with {n} points",
)  # fmt: skip

PERSONAL: Mapping[str, Fill] = {
    "person": _name, "name": _name, "name_male": _name, "name_female": _name,
    "first_name": _first, "first_name_male": _first, "first_name_female": _first,
    "first_name_nonbinary": _first,
    "last_name": _last, "last_name_male": _last, "last_name_female": _last,
    "address": _address, "street_address": _address, "street": _street, "street_name": _street,
    "secondary_address": lambda rng: f"Apt. {rng.randint(1, 99)}",
    "building_number": lambda rng: str(rng.randint(1, 499)), "zipcode": lambda rng: _digits(rng, 5),
    "postcode": lambda rng: _digits(rng, 5),
    "credit_card_number": _card, "phone_number": _phone, "email": _email, "email_address": _email,
    "iban": _iban, "us_ssn": _ssn, "ssn": _ssn, "us_driver_license": _license, "ip_address": _ip, "ipv4": _ip,
    "birthday": _birthday, "date_of_birth": _birthday, "us_passport": _license, "us_bank_number": _license,
    "medical_license": _license, "us_itin": _ssn,
}  # fmt: skip
"""Slots whose content points to one person."""

HARMLESS: Mapping[str, Fill] = {
    "person": _BOTH_NAMES, "name": _BOTH_NAMES, "name_male": _BOTH_NAMES, "name_female": _BOTH_NAMES,
    "first_name": _ONE_NAME, "first_name_male": _ONE_NAME, "first_name_female": _ONE_NAME,
    "first_name_nonbinary": _ONE_NAME,
    "last_name": _ONE_NAME, "last_name_male": _ONE_NAME, "last_name_female": _ONE_NAME,
    "address": _PLACE, "street_address": _PLACE, "street": _of("Main", "High", "Market"),
    "street_name": _of("the main road", "the high street", "the market"), "secondary_address": _of("second floor"),
    "building_number": _of("number one", "the old one"), "zipcode": _of("the area", "the region"),
    "postcode": _of("the area", "the region"),
    "credit_card_number": _NUMBER, "phone_number": _numbered("noon", "the weekend", "the hotline", "{n} o'clock sharp"),
    "email": _of("the usual address", "the support desk", "the form on the website", "version 2.0@beta"),
    "email_address": _of("the usual address", "the support desk", "the form on the website", "version 2.0@beta"),
    "iban": _NUMBER, "us_ssn": _NUMBER, "ssn": _NUMBER, "us_driver_license": _NUMBER,
    "ip_address": _numbered("404 not found", "127.0.0.1", "version 1.{n}.0.1"),
    "ipv4": _numbered("404 not found", "127.0.0.1", "version 1.{n}.0.1"),
    "birthday": _of("July 4, 1776", "the first Monday in May", "October 12, 1492", "New Year's Eve"),
    "date_of_birth": _of("July 4, 1776", "the first Monday in May", "October 12, 1492", "New Year's Eve"),
    "us_passport": _NUMBER, "us_bank_number": _NUMBER, "medical_license": _NUMBER, "us_itin": _NUMBER,
}  # fmt: skip
"""The same slots with nothing personal: fictional figures, sights, codes of products, numbers that everybody knows."""

NEUTRAL: Mapping[str, Fill] = {
    "organization": _of(*_BODIES), "company": _of(*_BODIES), "country": _of(*_COUNTRIES), "nation": _of(*_COUNTRIES),
    "city": _of("Lisbon", "Nairobi", "Kyoto", "Montreal", "Valdivia", "Bergen"),
    "state": _of("Ohio", "Texas", "Maine"), "state_abbr": _of("OH", "TX", "ME"),
    "nationality": _of(*_PEOPLES), "nation_man": _of(*_PEOPLES), "nation_woman": _of(*_PEOPLES),
    "nation_plural": _of(*(f"the {people}" for people in _PEOPLES)),
    "url": _of("https://www.example.com/news", "http://example.org"), "domain_name": _of("example.com", "example.org"),
    "date_time": _of("Monday", "3 p.m.", "next week", "May 5"), "date": _of("Monday", "May 5", "the 12th"),
    "day_of_week": _of("Monday", "Friday"), "time": _of("3 p.m.", "noon"), "year": _of("1999", "2015"),
    "title": _of("Mr.", "Ms.", "Dr."), "prefix": _of("Mr.", "Ms.", "Dr."), "prefix_male": _of("Mr.", "Dr."),
    "prefix_female": _of("Ms.", "Dr."), "job": _of(*_JOBS), "religion": _of("Buddhism", "Islam", "Christianity"),
    "age": _of("30", "42", "six"), "swift": _of("the bank code"), "pin": _of("a PIN"), "norp": _of(*_PEOPLES),
}  # fmt: skip
"""Slots that point to nobody: filled alike whatever the label."""
