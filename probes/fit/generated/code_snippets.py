"""Short pieces of program code in ten languages, and prose of the same length that talks about programs."""

# ruff: noqa: E501 - code stands here as it will be shown
from __future__ import annotations

import random

__all__ = ["draw_prose", "draw_snippets"]

_NOUNS = ("user", "order", "price", "node", "score", "file", "item", "token", "row", "page", "city", "event", "color")
_VERBS = ("load", "count", "merge", "update", "find", "save", "check", "sort", "print", "split", "build", "reset")

# Doubled braces are braces of the code. One programming language is one group.
_SNIPPETS: dict[str, tuple[str, ...]] = {
    "python": (
        "def {verb}_{noun}s({noun}s):\n    total = {n}\n    for {noun} in {noun}s:\n        total += {noun}.value\n    return total",
        "import json\n\nwith open('{noun}.json') as stream:\n    {noun}s = json.load(stream)\nprint(len({noun}s) > {n})",
        "{noun}s = [x ** 2 for x in range({n}) if x % 2 == 0]\nassert sum({noun}s) >= 0",
        "class {Noun}:\n    def __init__(self, name):\n        self.name = name\n\n    def {verb}(self):\n        return self.name.upper()",
    ),
    "javascript": (
        "const {noun}s = await fetch('/api/{noun}s').then(r => r.json());\nconsole.log({noun}s.length > {n});",
        "function {verb}{Noun}({noun}) {{\n  if (!{noun}) {{ return null; }}\n  return {noun}.id === {n};\n}}",
        "document.getElementById('{noun}').addEventListener('click', () => {{ {verb}({n}); }});",
    ),
    "c": (
        '#include <stdio.h>\n\nint main(void) {{\n    int {noun} = {n};\n    printf("%d\\n", {noun});\n    return 0;\n}}',
        "static int {verb}_{noun}(const char *{noun}, size_t n) {{\n    return n > {n} ? -1 : (int)n;\n}}",
        "for (int i = 0; i < {n}; i++) {{\n    {noun}[i] = malloc(sizeof(*{noun}[i]));\n}}",
    ),
    "java": (
        "public class {Noun} {{\n    private final int id = {n};\n\n    public int {verb}() {{\n        return id;\n    }}\n}}",
        'List<String> {noun}s = new ArrayList<>();\n{noun}s.add("{verb}");\nSystem.out.println({noun}s.size());',
        "try {{\n    {verb}({noun});\n}} catch (IOException e) {{\n    throw new RuntimeException(e);\n}}",
    ),
    "sql": (
        "SELECT {noun}_id, COUNT(*) FROM {noun}s WHERE created_at > NOW() GROUP BY {noun}_id HAVING COUNT(*) > {n};",
        "UPDATE {noun}s SET status = '{verb}' WHERE id = {n};",
        "CREATE TABLE {noun}s (id SERIAL PRIMARY KEY, name VARCHAR({n}) NOT NULL);",
    ),
    "bash": (
        '#!/bin/bash\nfor f in *.{noun}; do\n  mv "$f" "${{f%.{noun}}}.bak"\ndone',
        "grep -rn '{noun}' src/ | awk '{{print $1}}' | sort | uniq -c | head -n {n}",
        'if [ -f "$HOME/.{noun}" ]; then source "$HOME/.{noun}"; fi',
    ),
    "html": (
        '<div class="{noun}">\n  <a href="/{verb}">{noun}</a>\n  <span>{n}</span>\n</div>',
        ".{noun} {{\n  margin: {n}px;\n  display: flex;\n}}\n.{noun}:hover {{ opacity: 0.5; }}",
        '<form action="/{verb}" method="post"><input name="{noun}" type="text"></form>',
    ),
    "rust": (
        "fn {verb}_{noun}(x: &[u32]) -> Option<u32> {{\n    x.iter().copied().filter(|v| *v > {n}).max()\n}}",
        'let mut {noun}s: Vec<String> = Vec::new();\n{noun}s.push(String::from("{verb}"));\nprintln!("{{:?}}", {noun}s);',
        'match {verb}({n}) {{\n    Ok({noun}) => println!("{{}}", {noun}),\n    Err(e) => eprintln!("{{}}", e),\n}}',
    ),
}
_PROSE = (
    "Explain how a {noun} is stored in a database and why one would {verb} it every night.",
    "My {noun} list has {n} lines now, and I would like to {verb} it before the weekend.",
    "In the meeting we talked about the new {noun} page: {n} people want it in green, the others in blue.",
    "What is the difference between a class and a function, and when should I use which? I am learning Python.",
    "She asked me to {verb} every {noun} by hand; it took {n} hours, and my eyes hurt afterwards.",
    "The manual says (on page {n}) that one has to {verb} the {noun} before one turns the machine on.",
    "Write a story about a {noun} that nobody wanted to {verb}, until one day {n} children came along.",
    "A variable is a name for a value. A loop repeats something, for example {n} times, until a condition holds.",
    "Do you know a good book about programming for beginners? I would spend up to {n} dollars on it.",
    "First {verb} the flour, then add {n} grams of butter; let it rest, and bake it for half an hour.",
    "The old {noun} in the attic belonged to my aunt, who used to {verb} stamps; there were {n} albums of them.",
    "Why do programmers count from zero, and what does it mean to {verb} a {noun}?",
    "Our website was down for {n} minutes because somebody forgot to {verb} the {noun} after the update.",
    "Dear team, please {verb} your {noun} until Friday. There are {n} places left; the rest goes to the waiting list.",
    "First you {verb} one {noun}, then the next.",
    "There were {n} of them, and we had to {verb} them all before noon.",
    "The function of a {noun} is to {verb} things, he said, and nobody answered.",
    "Loops, classes and variables were the topics of the first {n} lessons.",
    "Please {verb} the {noun} (it is in the drawer) and bring it to room {n}.",
    "A semicolon; a bracket; a dot: she loved small signs, and {n} of them hung on her wall.",
    "He wrote '{noun}' on the board, crossed it out and wrote '{verb}' below it {n} times.",
    "Python is a snake, Java is an island, and Rust is what happened to my {noun}.",
    "Which programming language should a {noun} designer learn first: Java, Rust or JavaScript?",
)


def draw_snippets(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Draw ``count`` snippets, the languages in turn: (code, language)."""
    languages = list(_SNIPPETS)
    chosen = [languages[place % len(languages)] for place in range(count)]
    return [(_filled(rng.choice(_SNIPPETS[language]), rng), language) for language in chosen]


def draw_prose(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Draw ``count`` pieces of one or two sentences: (text, its first form)."""
    drawn = []
    for _ in range(count):
        forms = rng.sample(_PROSE, 1 if rng.random() < 0.8 else 2)  # noqa: PLR2004 - most are as short as the code
        drawn.append((" ".join(_filled(form, rng) for form in forms), forms[0]))
    return drawn


def _filled(form: str, rng: random.Random) -> str:
    noun = rng.choice(_NOUNS)
    return form.format(noun=noun, Noun=noun.capitalize(), verb=rng.choice(_VERBS), n=rng.randint(2, 99))
