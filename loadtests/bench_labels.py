"""What a trained classifier has to beat: `python -m loadtests.bench_labels DATA.csv [--model FOLDER]`.

On the same held-out texts as `millrace train --task classify` with the same fractions: always the most frequent label,
and logistic regression over bags of characters, and of characters and their pairs, fitted here to its end with the
penalty that serves the validation texts best. With a model, its accuracy beside them.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.engine.engine import Engine
from model.request import Request, SamplingParams
from model.training.labelled import Split, load_labelled

PENALTIES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LEAST = 2  # texts that a feature occurs in
AT_ONCE = 32


def features(text: str, longest: int) -> set[str]:
    """Runs of up to `longest` characters, each once."""
    return {text[i : i + n] for n in range(1, longest + 1) for i in range(len(text) - n + 1)}


def table(texts: list[str], numbers: dict[str, int], longest: int) -> Tensor:
    """Sparse [texts, features]: 1 where one occurs; the last is always there."""
    at = [(i, numbers[f]) for i, text in enumerate(texts) for f in features(text, longest) if f in numbers]
    at += [(i, len(numbers)) for i in range(len(texts))]
    index = torch.tensor(at).T
    size, ones = (len(texts), len(numbers) + 1), torch.ones(index.shape[1])
    return torch.sparse_coo_tensor(index, ones, size, check_invariants=True).coalesce()


def fitted(x: Tensor, y: Tensor, num_labels: int, penalty: float) -> Tensor:
    """Weights [features, labels] of the least loss."""
    weight = torch.zeros(x.shape[1], num_labels, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(torch.sparse.mm(x, weight), y) + penalty * weight[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach()


def regression(split: Split, longest: int) -> tuple[float, int]:
    """Accuracy on the test texts, and how many features there were."""
    counts = Counter(f for _, text in split.train for f in features(text, longest))
    numbers = {f: i for i, f in enumerate(sorted(f for f, count in counts.items() if count >= LEAST))}
    labels = {label: i for i, label in enumerate(split.labels)}
    parts = []
    for part in (split.train, split.valid, split.test):
        known = torch.tensor([labels[label] for label, _ in part])
        parts.append((table([text for _, text in part], numbers, longest), known))
    (x, y), valid, test = parts

    def right(weight: Tensor, part: tuple[Tensor, Tensor]) -> float:
        return int((torch.sparse.mm(part[0], weight).argmax(-1) == part[1]).sum()) / len(part[1])

    best = max((fitted(x, y, len(labels), penalty) for penalty in PENALTIES), key=lambda weight: right(weight, valid))
    return right(best, test), len(numbers)


def of_model(split: Split, folder: Path) -> float:
    """The accuracy of a model through the engine; overlong texts are cut as in training."""
    engine, num_right = Engine.load(folder, dtype="float32"), 0
    labels, longest = engine.runner.decoder.config.labels, engine.config.max_model_len
    for first in range(0, len(split.test), AT_ONCE):
        part = split.test[first : first + AT_ONCE]
        for i, (_, text) in enumerate(part):
            ids = engine.tokenizer.encode(text)
            ids = ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]
            engine.add(Request(str(i), tuple(ids), SamplingParams(max_tokens=0), task="classify"))
        while engine.has_work():
            for delta in engine.step():
                if delta.result:
                    best = torch.frombuffer(bytearray(delta.result), dtype=torch.float32).argmax()
                    num_right += labels[int(best)] == part[int(delta.id)][0]
    return num_right / len(split.test)


def main() -> None:
    """A line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--valid-fraction", type=float, default=0.05)
    parser.add_argument("--test-fraction", type=float, default=0.2)
    args = parser.parse_args()
    split = load_labelled(args.data, args.valid_fraction, args.test_fraction)
    most = Counter(label for label, _ in split.train).most_common(1)[0][0]
    told = [("always " + most, sum(label == most for label, _ in split.test) / len(split.test))]
    for longest, name in ((1, "characters"), (2, "characters and pairs")):
        accuracy, num = regression(split, longest)
        told.append((f"logistic regression, {num:,} {name}", accuracy))
    if args.model:
        told.append((f"{args.model.name}, through the engine", of_model(split, args.model)))
    for name, accuracy in told:
        sys.stdout.write(f"{accuracy:7.2%}  {name}  ({len(split.test):,} texts)\n")


if __name__ == "__main__":
    main()
