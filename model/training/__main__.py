"""`python -m model.training`: the trainer alone."""

import argparse
import sys

from model.training.options import add_arguments, from_arguments
from model.training.tasks import train_for_task

parser = argparse.ArgumentParser(prog="python -m model.training", description="Train a model from text files.")
add_arguments(parser)
train_for_task(from_arguments(parser.parse_args()), lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
