"""How much of a metric's variation each hyperparameter explains, by functional ANOVA over the trials of a sweep.

Source: Hutter, Hoos and Leyton-Brown (2014), "An Efficient Approach for Assessing Hyperparameter Importance", as
Optuna has it.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

from src.figures import is_logarithmic

FEWEST = 4  # trials with a value below which nothing is said
Value = float | str


def importances(trials: Sequence[tuple[Mapping[str, Value], float]]) -> dict[str, float]:
    """Return the share of each key, the largest first; empty for few trials, one key that varies, or one value.

    Args:
        trials: values by key, the same keys in each, and the value of the metric.
    """
    keys = [key for key in (trials[0][0] if trials else ()) if len({values[key] for values, _ in trials}) > 1]
    if len(trials) < FEWEST or len(keys) < 2 or len({value for _, value in trials}) == 1:
        return {}
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces: dict[str, BaseDistribution] = {}
    for key in keys:
        known = [values[key] for values, _ in trials]
        if numbers := [value for value in known if isinstance(value, float)]:
            spaces[key] = FloatDistribution(min(numbers), max(numbers), log=is_logarithmic(numbers))
        if len(numbers) < len(known):
            spaces[key] = CategoricalDistribution(sorted(map(str, set(known))))
    study = optuna.create_study()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that its distributions find odd
        for values, value in trials:
            params = {key: values[key] for key in keys}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=value))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in found.items() if math.isfinite(share)}
