"""``asyncdcp completion``: the script that lets a shell complete commands, options, paths and tensor names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from asyncdcp.cli.output import say


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash:  eval "$(asyncdcp completion bash)"            in ~/.bashrc
    zsh:   eval "$(asyncdcp completion zsh)"             in ~/.zshrc
    fish:  asyncdcp completion fish | source             in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    say(kind(ctx.find_root().command, {}, "asyncdcp", "_ASYNCDCP_COMPLETE").source())
