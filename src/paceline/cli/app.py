"""The command tree. A verb imports what it needs inside its function, so `--help` is quick."""

from __future__ import annotations

import typer

from paceline.cli.collect import collect
from paceline.cli.data import data
from paceline.cli.demo import demo
from paceline.cli.distill import distill
from paceline.cli.doctor import doctor
from paceline.cli.drafters import drafters
from paceline.cli.evaluate import evaluate
from paceline.cli.experiment import experiment
from paceline.cli.generate import generate
from paceline.cli.layer_search import layer_search
from paceline.cli.learn import learn
from paceline.cli.next_steps import ResumingVerb, Verb
from paceline.cli.paraphrase import paraphrase
from paceline.cli.pretrain import pretrain
from paceline.cli.profile import profile
from paceline.cli.route import route
from paceline.cli.trigram import trigram

app = typer.Typer(
    name="paceline",
    help="A language model answers faster, without changing what it answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_VERBS = (
    demo,
    generate,
    doctor,
    drafters,
    profile,
    collect,
    data,
    learn,
    evaluate,
    route,
    paraphrase,
    distill,
    pretrain,
    layer_search,
    experiment,
)
_RESUMING = (collect, distill, pretrain, layer_search, experiment)
for verb in _VERBS:
    app.command(cls=ResumingVerb if verb in _RESUMING else Verb)(verb)
app.add_typer(trigram)


@app.callback()
def root() -> None:
    """Typer needs a callback to keep a lone verb a verb."""
