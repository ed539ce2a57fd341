"""The command line: one subcommand per workflow. Heavy modules are imported inside the commands."""

from __future__ import annotations

import click

from hpc_xvr.cli import adapt, data, fetch, reconstruct, register, results, submit, train
from hpc_xvr.cli import view as viewing
from hpc_xvr.cli.ending import run
from hpc_xvr.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hpc-xvr")
def cli() -> None:
    """A fast blurry camera and a slow sharp one in, a fast sharp x-ray movie out.

    \b
    From two cameras' files to a movie, with the weights that come with the package:
      hpc-xvr reconstruct builtin --lr fast.tif --hr sharp.tif --gap 20 \\
          --out movie.tif
      hpc-xvr adapt builtin --lr fast.tif --hr sharp.tif --gap 20 \\
          --out mine.safetensors                    the same, fitted to a recording

    \b
    Where and when one camera saw what the other did:
      hpc-xvr register fast.tif sharp.tif --out cameras.yaml

    \b
    With a network of your own:
      hpc-xvr ingest run12/*.mraw --corpus corpus   camera files -> corpus
      hpc-xvr inspect corpus                        list and check the corpus
      mpirun -n 4 hpc-xvr train my.yaml             corpus -> model in runs/NAME
      mpirun -n 4 hpc-xvr evaluate runs/NAME        score it on held-out data
      hpc-xvr report runs/NAME                      curves, tables and pictures
      hpc-xvr reconstruct runs/NAME --lr fast.tif --hr sharp.tif --gap 20 \\
          --out movie.tif                           two camera files -> movie

    On a cluster, `hpc-xvr submit --site SITE --time HH:MM:SS COMMAND ...` runs any of these
    commands as a job.

    No camera files yet? `hpc-xvr simulate configs/quickstart.yaml` makes a corpus of simulated
    experiments. Any value of a config can be changed with --set section.key=value.
    """


for _command in (
    data.simulate,
    data.ingest,
    fetch.fetch,
    data.inspect,
    data.edit,
    register.register,
    train.train,
    results.evaluate,
    reconstruct.reconstruct,
    adapt.adapt,
    results.export,
    results.report,
    viewing.view,
    submit.submit,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; bad input is one line and exit code 2, on one rank or many."""
    run(cli)
