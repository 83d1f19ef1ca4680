"""``telltale key``."""

from __future__ import annotations

from typing import Annotated

import typer

from monitor.access import KeyScope

key_app = typer.Typer(name="key", help="Make API keys.", no_args_is_help=True, rich_markup_mode=None)


@key_app.command("new")
def new(
    scopes: Annotated[
        list[KeyScope], typer.Option("--scope", help="What it is good for; may be repeated.", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="What to call it in the policy file.")] = "new",
) -> None:
    """Make a key, and what to write into the policy file. The key is shown once and kept nowhere."""
    from serving.api.keyring import digest_of, new_key

    key, said = new_key(), ", ".join(dict.fromkeys(scope.value for scope in scopes))
    typer.echo(f"key: {key}")
    typer.echo("Whoever has it needs nothing else, and it cannot be shown again. Into the policy file:")
    typer.echo(f'access:\n  keys:\n    - {{name: {name}, key_sha256: "{digest_of(key)}", scopes: [{said}]}}')


@key_app.callback()
def _group() -> None:
    """A group, although it has one command."""
