"""Scores that need no network: each an `evaluate.Metric`, with a standard error beside it.

`evaluate.load("accuracy")` downloads a script; the metrics here need only this file. Scores are
fractions from 0 to 1. `evaluate` and scikit-learn take seconds to import, so that happens inside
the functions that need them.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recipelib.runtime import UserError

if TYPE_CHECKING:
    import evaluate

RESAMPLES = 200

Values = dict[str, float]
Classes = Sequence[str] | None


@dataclass(frozen=True)
class Definition:
    """How one metric is computed.

    Attributes:
        takes: `label` (a string against a string), `text` (a string against one or several golds)
            or `entities` (a list of (type, text) pairs against another).
        row: a prediction and its reference -> named values; the first is the score of the row.
        total: all predictions, references and the classes (None: those that occur) -> named
            values; the first is the score. None where that is the mean of the rows.
        resampler: the same -> a function from the rows' weights to the score, for the bootstrap;
            given together with `total`.
    """

    takes: str
    row: Callable[[Any, Any], Values]
    total: Callable[[list, list, Classes], Values] | None = None
    resampler: Callable[[list, list, Classes], Callable[[np.ndarray], float]] | None = None


def _accuracy_row(prediction: str, reference: str) -> Values:
    return {"accuracy": float(prediction == reference)}


def _classes(predictions: list[str], references: list[str], classes: Classes) -> list[str]:
    """The classes, or those that occur; no answer is a miss, not a class."""
    return list(classes or sorted({*references, *(label for label in predictions if label)}))


def _macro_f1(predictions: list[str], references: list[str], classes: Classes) -> Values:
    from sklearn.metrics import f1_score

    labels = _classes(predictions, references, classes)
    score = f1_score(references, predictions, labels=labels, average="macro", zero_division=0)
    return {"macro_f1": float(score)}


def _matthews(predictions: list[str], references: list[str], classes: Classes) -> Values:
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": float(matthews_corrcoef(references, predictions))}


def _resampler(score: Callable[[np.ndarray, int], float]):
    """A `Definition.resampler`: the score comes from counts, [gold, predicted], in which the
    classes stand first; a hundred times faster than scikit-learn on strings.
    """

    def resampler(predictions: list[str], references: list[str], classes: Classes):
        classes = _classes(predictions, references, classes)
        places = {
            label: place
            for place, label in enumerate(dict.fromkeys([*classes, *references, *predictions]))
        }
        cells = [
            places[gold] * len(places) + places[said]
            for gold, said in zip(references, predictions, strict=True)
        ]

        def of_weighted(weights: np.ndarray) -> float:
            counts = np.bincount(cells, weights, len(places) ** 2)
            return score(counts.reshape(len(places), -1), len(classes))

        return of_weighted

    return resampler


def _macro_f1_of(counts: np.ndarray, classes: int) -> float:
    """A class that no drawn row mentions counts 0, as in the score itself."""
    sizes = (counts.sum(0) + counts.sum(1))[:classes]
    return float(np.mean(2 * counts.diagonal()[:classes] / np.maximum(sizes, 1)))


def _matthews_of(counts: np.ndarray, classes: int) -> float:
    """Gorodkin's (2004), 0 where all rows are of one class or are said to be."""
    said, gold, rows = counts.sum(0), counts.sum(1), counts.sum()
    spread = (rows**2 - said @ said) * (rows**2 - gold @ gold)
    return float((rows * counts.trace() - said @ gold) / math.sqrt(spread)) if spread else 0.0


def _exact_match_row(prediction: str, references: list[str]) -> Values:
    golds = references or [""]  # as in SQuAD: without a gold answer, saying nothing is right
    return {"exact_match": float(prediction.strip() in {gold.strip() for gold in golds})}


def _squad_normal(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _squad_row(prediction: str, references: list[str]) -> Values:
    """SQuAD v1.1 (Rajpurkar et al. 2016): the best exact match and token F1 over the gold answers.

    Two answers of which the normalization leaves nothing ("The", "--") are equal, F1 included.
    """
    said = _squad_normal(prediction)
    golds = [_squad_normal(gold) for gold in references or [""]]
    return {
        "f1": max(_token_f1(said.split(), gold.split()) for gold in golds),
        "exact_match": float(said in golds),
    }


def _token_f1(said: list[str], gold: list[str]) -> float:
    common = (Counter(said) & Counter(gold)).total()
    return _f1(common, len(said), len(gold))


def _f1(hits: float, predicted: float, gold: float) -> float:
    """F1 of counts; 1 where there was nothing to find and nothing was found."""
    return float(2 * hits / (predicted + gold)) if predicted + gold else 1.0


_NUMBER = re.compile(
    r"""
    (?: (?<![\w)\]]) (?P<minus> -[$€£¥]? | [$€£¥]- ) )?   # after a word or a bracket: no sign
    (?P<digits> \d{1,3} (?:,\d{3})+ (?!\d) (?:\.\d+)? | \d+ (?:\.\d+)? | (?<!\.)\.\d+ )
    (?: [eE] (?P<exponent> [+-]?\d{1,3} ) (?!\d) )?       # 1e999999999 would fill the memory
    (?: / (?P<divisor> 0*[1-9]\d* ) )?
    """,
    re.VERBOSE,
)


def _last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly: `#### 1,000` and `$1000.00` are equal."""
    matches = list(_NUMBER.finditer(text.replace("−", "-")))
    if not matches:
        return None
    match = matches[-1]
    # Through Decimal, because int() refuses more than 4,300 digits and a model may repeat itself.
    digits = match["digits"].replace(",", "") + "e" + (match["exponent"] or "0")
    value = Fraction(Decimal(digits)) / Fraction(Decimal(match["divisor"] or 1))
    return -value if match["minus"] else value


def _numeric_match_row(prediction: str, references: list[str]) -> Values:
    golds = {_last_number(gold) for gold in references} - {None}
    if not golds:
        raise ValueError(f"no number in the reference {str(references)[:80]}")
    return {"numeric_match": float(_last_number(prediction) in golds)}


def _entity_counts(prediction: Sequence, reference: Sequence) -> tuple[int, int, int]:
    """Hits, predicted and gold entities of a row; a repeated one counts as often as it occurs."""
    predicted = Counter(tuple(entity) for entity in prediction)
    gold = Counter(tuple(entity) for entity in reference)
    return (predicted & gold).total(), predicted.total(), gold.total()


def _entity_f1_row(prediction: Sequence, reference: Sequence) -> Values:
    return {"entity_f1": _f1(*_entity_counts(prediction, reference))}


def _entity_f1(predictions: list, references: list, classes: Classes) -> Values:
    counts = [_entity_counts(*row) for row in zip(predictions, references, strict=True)]
    hits, predicted, gold = (sum(column) for column in zip(*counts, strict=True))
    return {
        "entity_f1": _f1(hits, predicted, gold),
        "precision": hits / predicted if predicted else float(not gold),
        "recall": hits / gold if gold else float(not predicted),
    }


def _entity_f1_resampler(predictions: list, references: list, classes: Classes):
    counts = np.array([_entity_counts(*row) for row in zip(predictions, references, strict=True)])
    return lambda weights: _f1(*(weights @ counts))


METRICS: dict[str, Definition] = {
    "accuracy": Definition("label", _accuracy_row),
    "macro_f1": Definition("label", _accuracy_row, _macro_f1, _resampler(_macro_f1_of)),
    "matthews": Definition("label", _accuracy_row, _matthews, _resampler(_matthews_of)),
    "exact_match": Definition("text", _exact_match_row),
    "squad": Definition("text", _squad_row),
    "numeric_match": Definition("text", _numeric_match_row),
    "entity_f1": Definition("entities", _entity_f1_row, _entity_f1, _entity_f1_resampler),
}


def load_metric(name: str, classes: Classes = None) -> evaluate.Metric:
    """A metric that works like one of `evaluate.load`, without network and without files.

    Args:
        name: a key of `METRICS`, or "f1 CLASS": what a template's `metric:` may say.
        classes: those over which `macro_f1` is the mean; by default those that occur.

    Returns:
        An `evaluate.Metric`; `compute(predictions=..., references=...)` gives a dictionary of
        fractions: `squad` gives `f1` and `exact_match`, `entity_f1` adds `precision` and `recall`,
        the others give one value of their own name.

    Raises:
        UserError: there is no such metric; in `compute`, a reference that the metric cannot use.
        ValueError: in `compute`, no rows, a None, or predictions and references that differ in
            number or have the wrong type.
    """
    definition = _definition(name)

    import evaluate
    from datasets import Features, List, Value

    text, entities = Value("string"), List(List(Value("string")))
    prediction = entities if definition.takes == "entities" else text
    gold = [List(text), text] if definition.takes == "text" else [prediction]

    class RecipeMetric(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description=f"{name}: see recipelib/evaluation/metrics.py",
                citation="",
                inputs_description="",
                features=[Features(predictions=prediction, references=kind) for kind in gold],
            )

        def _build_data_dir(self):
            return ""  # kept in memory: evaluate would leave an empty folder in the user's cache

        def add_batch(self, *, predictions=None, references=None):
            """Add rows; a reference of a text metric is a string or a list of strings."""
            _refuse_missing(name, predictions, references)
            references = _golds(definition, references)
            evaluate.Metric.add_batch(self, predictions=predictions, references=references)

        def _compute(self, predictions, references):
            predictions, references = list(predictions), _golds(definition, references)
            if definition.total:
                return definition.total(predictions, references, classes)
            return _means(_rows(name, definition, predictions, references))

    RecipeMetric.__name__ = name  # what `evaluate.combine` puts before values of the same name
    return RecipeMetric(keep_in_memory=True)


def answer_key(name: str, prediction: str) -> str:
    """A key that is equal for two answers if the metric takes them for the same."""
    if name == "numeric_match":
        number = _last_number(prediction)
        return prediction if number is None else str(number)
    return _squad_normal(prediction) if name == "squad" else prediction.strip()


class Scored(NamedTuple):
    """A score, its standard error, the score of each row, and further values of the metric."""

    score: float
    stderr: float
    rows: list[float]
    details: Values


def score_rows(
    name: str,
    predictions: Sequence,
    references: Sequence,
    classes: Classes = None,
    *,
    uncertainty: bool = True,
) -> Scored:
    """Score predictions, with the uncertainty that comes from having only these rows.

    Args:
        name, classes: as in `load_metric`.
        predictions: [n] strings, or lists of (type, text) pairs for `entity_f1`.
        references: [n] strings, lists of strings (text metrics) or lists of pairs.
        uncertainty: False where only the score is wanted: its standard error is then NaN.

    Returns:
        The score (for `squad` the F1), its standard error, the score of each of the n rows, and
        what else the metric's `compute` gives, all from one pass over the rows. The error is the
        rows' standard deviation (ddof=1) / sqrt(n) where the score is their mean; for the others
        it is the deviation over 200 bootstrap samples of the rows (Efron 1979), always the same
        samples. It is NaN for a single row.

    Raises:
        UserError, ValueError: as `load_metric`.
    """
    definition = _definition(name)
    _refuse_missing(name, predictions, references)
    references = _golds(definition, references)
    row_values = _rows(name, definition, predictions, references)
    if definition.total:
        values = definition.total(predictions, references, classes)
    else:
        values = _means(row_values)
    # The first value is the score itself.
    score, *_ = values.values()
    details = {key: float(value) for key, value in list(values.items())[1:]}
    rows = [next(iter(row.values())) for row in row_values]
    if len(rows) == 1 or not uncertainty:
        stderr = math.nan
    elif definition.resampler:
        stderr = _bootstrap(definition.resampler(predictions, references, classes), len(rows))
    else:
        stderr = float(np.std(rows, ddof=1) / math.sqrt(len(rows)))
    return Scored(score, stderr, rows, details)


def _refuse_missing(name: str, predictions: Sequence, references: Sequence) -> None:
    if len(predictions) == 0:
        raise ValueError(f"metric {name}: there are no rows to score")
    if len(predictions) != len(references):
        counts = f"{len(predictions)} predictions and {len(references)} references"
        raise ValueError(f"metric {name}: {counts}; give each prediction its own")
    for number, row in enumerate(zip(predictions, references, strict=False), 1):
        if None in row:  # evaluate looks at the first row only
            raise ValueError(f"metric {name}, evaluated row {number}: None instead of a value")


def _definition(name: str) -> Definition:
    if name.startswith("f1 "):  # of one class: macro F1 over it alone
        macro, alone = METRICS["macro_f1"], [name[3:]]
        return replace(
            macro,
            total=lambda said, gold, _: {name: _macro_f1(said, gold, alone)["macro_f1"]},
            resampler=lambda said, gold, _: macro.resampler(said, gold, alone),
        )
    if name not in METRICS:
        known = ", ".join([*METRICS, "f1 CLASS"])
        raise UserError(f"metric: there is no {name!r}; choose one of {known}")
    return METRICS[name]


def _golds(definition: Definition, references: Sequence) -> list:
    """The references as a list; those of a text metric as lists of golds, one gold included."""
    if definition.takes != "text":
        return list(references)
    return [[gold] if isinstance(gold, str) else gold for gold in references]


def _rows(
    name: str, definition: Definition, predictions: Sequence, references: Sequence
) -> list[Values]:
    rows = []
    for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True), 1):
        try:
            rows.append(definition.row(prediction, reference))
        except ValueError as error:
            raise UserError(
                f"metric {name}, evaluated row {number}: {error}; mend it or take exact_match"
            ) from None
    return rows


def _means(rows: list[Values]) -> Values:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _bootstrap(score: Callable[[np.ndarray], float], n: int) -> float:
    draw = np.random.default_rng(0)
    samples = [score(np.bincount(draw.integers(n, size=n), minlength=n)) for _ in range(RESAMPLES)]
    return float(np.std(samples, ddof=1))
