"""What a classifier must beat to be worth its size: logistic regression over which words a text has, in any order.

The words are the tokenizer's, each counted once a text, alone or with the pairs of neighbours too. Knows no networks.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.training.labelled import Ids, Labelled

DECAYS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)  # of the squared weights; the one that validates best is taken
FEWEST = 2  # texts that must have a feature


def bag_of_words(train: Labelled, valid: Labelled, test: Labelled, pairs: bool = False) -> float:
    """The part of `test` it gets right, the penalty chosen by `valid`."""
    bags = [_features(text, pairs) for text in train.texts]
    counts = Counter(feature for bag in bags for feature in bag)
    columns = {feature: i for i, feature in enumerate(sorted(f for f, num in counts.items() if num >= FEWEST))}
    table, labels = _table(train, columns, pairs), torch.from_numpy(train.labels)
    num_labels = int(train.labels.max()) + 1
    best = (-1.0, 0.0)
    for decay in DECAYS:
        weights = _fit(table, labels, num_labels, decay)
        found = _right(weights, valid, columns, pairs), _right(weights, test, columns, pairs)
        best = max(best, found, key=lambda each: each[0])  # what is held out chooses nothing
    return best[1]


def _features(text: Ids, pairs: bool) -> set[tuple[int, ...]]:
    ids = text.tolist()
    return {(i,) for i in ids} | (set(pairwise(ids)) if pairs else set())


def _table(texts: Labelled, columns: dict[tuple[int, ...], int], pairs: bool) -> Tensor:
    """[texts, features + 1] sparse: 1 where a text has a feature; the last column is 1 for all."""
    rows, places = list[int](), list[int]()
    for row, text in enumerate(texts.texts):
        found = [columns[each] for each in _features(text, pairs) if each in columns]
        places += [*found, len(columns)]
        rows += [row] * (len(found) + 1)
    size = (len(texts.texts), len(columns) + 1)
    where = torch.from_numpy(np.array([rows, places]))
    return torch.sparse_coo_tensor(where, torch.ones(len(rows)), size, check_invariants=True).coalesce()


def _fit(table: Tensor, labels: Tensor, num_labels: int, decay: float) -> Tensor:
    """[features + 1, labels]: the least mean loss plus `decay` times the squared weights, by L-BFGS."""
    weights = torch.zeros(table.shape[1], num_labels, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        penalty = decay * weights[:-1].square().sum()
        value: Tensor = F.cross_entropy(torch.sparse.mm(table, weights), labels) + penalty
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def _right(weights: Tensor, texts: Labelled, columns: dict[tuple[int, ...], int], pairs: bool) -> float:
    guesses = torch.sparse.mm(_table(texts, columns, pairs), weights).argmax(-1)
    return float((guesses == torch.from_numpy(texts.labels)).double().mean())
