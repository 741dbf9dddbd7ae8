"""Which trainer a run is for."""

from model.training.classify import train_classifier
from model.training.options import TrainConfig
from model.training.trainer import Report, train

TRAINERS = {"generate": train, "classify": train_classifier}


def train_for_task(config: TrainConfig, report: Report) -> None:
    """Train and export as the configuration says; `report` gets a line at a time. Raises OptionError."""
    TRAINERS[config.task](config, report)
