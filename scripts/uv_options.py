"""Translates pip's settings into options of uv, which does not read them; prints one option per line.

Run by the Python whose pip is configured: `python scripts/uv_options.py`. Indexes in local folders that do not exist
are left out and named on the standard error.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

# What pip calls it, what uv calls it.
_LIST_OPTIONS = {
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}
# Later sections win, as in pip.
_SECTIONS = ("global", "install", ":env:")


def pip_settings() -> dict[str, str]:
    """The settings that `pip install` would use, by name, from its files and its environment variables."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        name = name.lstrip(".")
        if section in found and value:
            found[section][name] = str(ast.literal_eval(value))
    return {name: value for section in _SECTIONS for name, value in found[section].items()}


def uv_options(settings: dict[str, str]) -> list[str]:
    """The same settings as options of `uv pip install`."""
    options: list[str] = []
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        options.append("--no-index")
    if "index-url" in settings:
        options += ["--index-url", settings["index-url"]]
    for name, option in _LIST_OPTIONS.items():
        for value in settings.get(name, "").split():
            if name == "trusted-host" or is_reachable_folder(value):
                options += [option, value]
            else:
                print(f"install: pip's {name} names {value}, which does not exist; left out", file=sys.stderr)
    # pip takes the best version from all indexes together; uv would stop at the first that has the name.
    return [*options, "--index-strategy", "unsafe-best-match"]


def is_reachable_folder(value: str) -> bool:
    """Whether a folder exists; true for an address on the network, which is not tried here."""
    parsed = urlparse(value)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path)).exists()
    if "://" in value:
        return True
    return Path(value).expanduser().exists()


def main() -> None:
    """Print the options; certificate bundles go to uv by `SSL_CERT_FILE`, printed first as an assignment."""
    settings = pip_settings()
    certificates = os.environ.get("SSL_CERT_FILE") or settings.get("cert", "")
    print(f"SSL_CERT_FILE={certificates}")
    print("\n".join(uv_options(settings)))


if __name__ == "__main__":
    main()
