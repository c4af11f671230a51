"""Which values of the searched keys teach best: an Optuna study that outlives kills, for several processes.

Guarantees: a trial that a killed process had under way is done again with the same values, and counts once; with one
process a search that was stopped proposes what an unbroken one would have (each trial's sampler is seeded by the
search's seed and the trial's place, and knows the past from the storage); a trial that cannot be trained is noted with
its reason and does not end the search. What a trial is and how it is trained is the caller's: see :data:`Evaluate`.

Not guaranteed: with several processes, which values are proposed; that depends on who ends first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from slmops.errors import MissingExtraError, ModelError
from slmops.recipe import Range, SearchConfig
from slmops.trust import digest_json

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial
    from sqlalchemy import Engine

METRIC = "validation_loss"
PERCENT_STEP = 5
"""Intermediate losses are compared at equal shares of the training, in steps of so many percent."""
PRUNING_FROM_PERCENT = 10
BUSY_S = 60.0  # what another process may keep the storage locked
DIGITS = 4  # significant ones of a proposed number; what is trained is what the recipe will say
_KILLED, _WALL_S, _ERROR, _PLACE = "killed", "wall_s", "error", "place"

Observe = Callable[[float, float], None]
"""Share of the training that is done, 0 to 1, and the validation loss there. Raises to end the trial."""


@dataclass(frozen=True)
class Evaluated:
    """A trained trial: its validation loss, and where its result may be deleted once a better one is known."""

    loss: float
    place: Path | None = None


Evaluate = Callable[[Mapping[str, Any], Observe], Evaluated]
"""Trains with these values of the recipe's keys. A :class:`ModelError` counts as a failed trial."""


@dataclass(frozen=True)
class SearchPlace:
    """Where a study is kept: an SQLite file, its name in there, and the seed of its proposals."""

    file: Path
    study: str
    seed: int

    @property
    def asking(self) -> FileLock:
        return FileLock(self.file.with_suffix(".lock"), timeout=BUSY_S)


def open_search(place: SearchPlace, config: SearchConfig) -> Study:
    """The study at ``place``, made where it is missing.

    Raises:
        MissingExtraError: optuna is not installed.
    """
    check_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place.file.parent.mkdir(parents=True, exist_ok=True)
    with place.asking:  # two processes at once would both make the tables
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{place.file}", engine_kwargs={"connect_args": {"timeout": BUSY_S}}
        )
        _write_ahead(storage.engine)
        return optuna.create_study(
            storage=storage,
            study_name=place.study,
            direction="minimize",
            load_if_exists=True,
            pruner=_pruner(config),
        )


def check_optuna() -> None:
    """Raises :class:`MissingExtraError` where optuna is not installed. Imports nothing."""
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise MissingExtraError("A search (it needs optuna)", "search")


def _write_ahead(engine: Engine) -> None:
    """A trial writes dozens of times. With a log they cost no flush each; a kill loses none, a power cut the last."""
    from sqlalchemy import event

    def set_up(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(engine, "connect", set_up)
    engine.dispose()  # those that are open already were made without


def take_up(study: Study) -> int:
    """Put what a killed process had under way back in front; how many there were. Only while no other is at work."""
    from optuna.trial import TrialState

    cut_off = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in cut_off:
        study._storage.set_trial_user_attr(trial._trial_id, _KILLED, True)
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)
    return len(cut_off)


def run_trials(
    study: Study,
    place: SearchPlace,
    config: SearchConfig,
    evaluate: Evaluate,
    *,
    deadline_s: float | None = None,
    on_trial: Callable[[], None] = lambda: None,
) -> None:
    """Work on ``study`` until it has ``config.trials`` trials or :func:`time.time` passes ``deadline_s``.

    Several processes may do so at once. Errors but :class:`ModelError` end the search, and leave the trial to be
    done again.
    """
    import optuna

    while deadline_s is None or time.time() < deadline_s:
        with place.asking:
            asked = len(_counted(study))
            if asked >= config.trials:
                return
            study.sampler = _sampler(config, place.seed, asked)
            trial = study.ask()
            values = {key: _propose(trial, key, spec) for key, spec in config.space.items()}
        started = time.monotonic()
        try:
            found = evaluate(values, _observer(trial))
        except optuna.TrialPruned:
            trial.set_user_attr(_WALL_S, round(time.monotonic() - started, 3))
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        except ModelError as error:
            trial.set_user_attr(_ERROR, str(error))
            trial.set_user_attr(_WALL_S, round(time.monotonic() - started, 3))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            trial.set_user_attr(_WALL_S, round(time.monotonic() - started, 3))
            if found.place is not None:
                trial.set_user_attr(_PLACE, str(found.place))
            study.tell(trial, found.loss)
        on_trial()


def beaten_places(study: Study) -> Iterator[Path]:
    """Results of trials that are not the best."""
    done = [trial for trial in _counted(study) if trial.value is not None]
    if not done:
        return
    best = study.best_trial.user_attrs.get(_PLACE)
    yield from (
        Path(path) for path in {trial.user_attrs.get(_PLACE) for trial in done} if path is not None and path != best
    )


def summarize(study: Study, config: SearchConfig) -> dict[str, Any]:
    """What a report tells of a search, as plain JSON.

    ``trials``: ``number`` (0-based), ``state`` (complete, pruned, failed), ``values``, ``loss`` (the last one seen, for
    a pruned trial), ``percent`` of the training done, ``wall_s``, ``error``. ``best``: the number of the best one.
    ``importances``: key -> share of the differences in loss that it explains; empty below four complete trials.

    Raises:
        ModelError: no trial came to its end.
    """
    trials = [_told(number, trial, config) for number, trial in enumerate(_finished(study))]
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if not complete:
        reasons = [trial["error"] for trial in trials if trial["error"]]
        raise ModelError(
            f"None of {len(trials)} trials of the search came to its end."
            + (f" The first failed so: {reasons[0]}" if reasons else ""),
            remedy="Narrow search.space to what can be trained, or raise search.timeout_s.",
        )
    best = min(complete, key=lambda trial: (trial["loss"], trial["number"]))
    return {
        "metric": METRIC,
        "sampler": config.sampler,
        "pruner": config.pruner,
        "asked": config.trials,
        "trials": trials,
        "best": best["number"],
        "values": best["values"],
        "loss": best["loss"],
        "importances": _importances(study, complete),
        "log_keys": [key for key, spec in config.space.items() if isinstance(spec, Range) and spec.log],
    }


def finished_trials(study: Study) -> int:
    return len(_finished(study))


def wall_seconds(study: Study) -> float:
    return sum(float(trial.user_attrs.get(_WALL_S, 0.0)) for trial in _finished(study))


def _counted(study: Study) -> list[FrozenTrial]:
    """Trials that were begun, without those that a kill cut off: they are begun again."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state != TrialState.WAITING and _KILLED not in trial.user_attrs]


def _finished(study: Study) -> list[FrozenTrial]:
    return [trial for trial in _counted(study) if trial.state.is_finished()]


def _propose(trial: Trial, key: str, spec: Any) -> Any:
    if not isinstance(spec, Range):
        return trial.suggest_categorical(key, spec)
    if spec.whole:
        return trial.suggest_int(key, int(spec.low), int(spec.high), log=spec.log, step=int(spec.step or 1))
    value = trial.suggest_float(key, spec.low, spec.high, log=spec.log, step=spec.step)
    return min(float(spec.high), max(float(spec.low), float(f"{value:.{DIGITS}g}")))


def _observer(trial: Trial) -> Observe:
    import optuna

    reported: set[int] = set()

    def observe(share: float, loss: float) -> None:
        percent = int(100 * share) // PERCENT_STEP * PERCENT_STEP
        if percent in reported:
            return
        reported.add(percent)
        trial.report(loss, percent)
        if percent < 100 and trial.should_prune():
            raise optuna.TrialPruned

    return observe


def _sampler(config: SearchConfig, seed: int, number: int) -> BaseSampler:
    from optuna import samplers

    own_seed = int(digest_json([seed, number])[:8], 16)
    if config.sampler == "random":
        return samplers.RandomSampler(seed=own_seed)
    return samplers.TPESampler(seed=own_seed, n_startup_trials=max(3, min(10, config.trials // 3)))


def _pruner(config: SearchConfig) -> BasePruner:
    from optuna import pruners

    match config.pruner:
        case "none":
            return pruners.NopPruner()
        case "halving":
            return pruners.SuccessiveHalvingPruner(min_resource=PRUNING_FROM_PERCENT, reduction_factor=3)
        case "median":
            return pruners.MedianPruner(
                n_startup_trials=max(2, min(5, config.trials // 4)), n_warmup_steps=PRUNING_FROM_PERCENT
            )


def _told(number: int, trial: FrozenTrial, config: SearchConfig) -> dict[str, Any]:
    seen = trial.intermediate_values
    percent = max(seen, default=0)
    return {
        "number": number,
        "state": {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed"),
        "values": {
            key: _as_trained(trial.params[key], config.space[key]) for key in config.space if key in trial.params
        },
        "loss": trial.value if trial.value is not None else seen.get(percent),
        "percent": 100 if trial.state.name == "COMPLETE" else percent,
        "wall_s": trial.user_attrs.get(_WALL_S),
        "error": trial.user_attrs.get(_ERROR),
    }


def _as_trained(value: Any, spec: Any) -> Any:
    """The value as :func:`_propose` rounded it."""
    if isinstance(spec, Range) and not spec.whole:
        return min(float(spec.high), max(float(spec.low), float(f"{value:.{DIGITS}g}")))
    return value


def _importances(study: Study, complete: list[dict[str, Any]]) -> dict[str, float]:
    if len(complete) < 4 or len({trial["loss"] for trial in complete}) < 2:
        return {}
    import optuna

    with _quiet():
        return {key: float(share) for key, share in optuna.importance.get_param_importances(study).items()}


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
