"""The ``vlafleet`` command, composed from the packages.

Every command imports what it needs when it runs: Flower takes three seconds to import and lerobot ten.
"""

import sys

import click
import typer

import app.cli
import app.demo_data
import app.report
import app.watch
import certs.cli
import superlink.cli
import supernode.cli
from certs import logs
from certs.errors import FleetError

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of SmolVLA over mutual TLS.",
)
cli.add_typer(certs.cli.cli, name="certs")
cli.command()(superlink.cli.superlink)
cli.command()(superlink.cli.enrolment)
for command in (
    supernode.cli.join,
    supernode.cli.enrol,
    supernode.cli.check,
    supernode.cli.request,
    supernode.cli.accept,
    supernode.cli.run,
    supernode.cli.stop,
):
    superlink.cli.site.command()(command)
cli.add_typer(superlink.cli.site, name="site")
cli.command()(superlink.cli.run)
cli.command()(superlink.cli.simulate)
cli.command()(superlink.cli.demo)
cli.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(superlink.cli.flwr)
cli.command()(supernode.cli.supernode)
cli.command()(app.cli.superexec)
cli.command()(app.cli.trainer)
cli.command()(app.cli.exporter)
cli.command()(app.watch.status)
cli.command()(app.watch.watch)
cli.command()(certs.cli.health)
app.demo_data.cli.command()(app.cli.check)
cli.add_typer(app.demo_data.cli, name="data", help="Make demonstration data, check any data.")
cli.command()(app.report.report)


def main() -> None:
    """Run the command line; an expected failure is one sentence and its class's exit code."""
    try:
        logs.configure()
        # Without standalone mode typer hands back the code of a command that asked to exit.
        code = cli(standalone_mode=False)
    except FleetError as error:
        logs.say(str(error))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        logs.say("interrupted")
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
