"""Parameters that name columns of the data, as LightGBM wants them: by feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pipelines.errors import SpecError, did_you_mean
from pipelines.explain import dotted
from pipelines.features.transform import Feature

if TYPE_CHECKING:
    from pipelines.models.boosting_params import LightGBMParams

BY_COLUMN: Final = {"monotone_constraints", "feature_contri", "max_bin_by_feature", "interaction_constraints"}
WHERE: Final = ("model", "params")


def by_feature(params: LightGBMParams, features: Sequence[Feature]) -> dict[str, Any]:
    """Return what is said by column as LightGBM's lists; `SpecError` for an unknown column, or where it cannot be."""
    own: dict[str, Any] = {}
    if params.monotone_constraints:
        own["monotone_constraints"] = _directions(params.monotone_constraints, features)
    if params.feature_contri:
        own["feature_contri"] = _each("feature_contri", params.feature_contri, features, 1.0)
    if params.max_bin_by_feature:
        own["max_bin_by_feature"] = _each("max_bin_by_feature", params.max_bin_by_feature, features, params.max_bin)
    if params.interaction_constraints:
        own["interaction_constraints"] = _groups(params.interaction_constraints, features)
    return own


def _directions(constraints: Mapping[str, int], features: Sequence[Feature]) -> list[int]:
    """A direction for each feature: that of its column, where it goes along with it."""
    directions = [0] * len(features)
    for column, direction in constraints.items():
        found = _made_of("monotone_constraints", column, features)
        if direction == 0:
            continue
        free = [i for i in found if features[i].order != "constant"]
        wrong = [features[i].name for i in free if features[i].order != "rising" or features[i].kind != "numeric"]
        if wrong or not free:
            listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise SpecError(
                f"{dotted((*WHERE, 'monotone_constraints', column))}: it becomes {listed}, not plain numbers in its order; "
                "give it no steps but impute, scale, clip, log1p, quantile and since under features.columns and leave it out of "
                "features.groups, or take the constraint out"
            )
        for i in free:
            directions[i] = direction
    return directions


def _each(name: str, values: Mapping[str, Any], features: Sequence[Feature], default: Any) -> list[Any]:
    found = [default] * len(features)
    for column, value in values.items():
        for i in _made_of(name, column, features):
            found[i] = value
    return found


def _groups(groups: list[list[str]], features: Sequence[Feature]) -> list[list[int]]:
    """The features of each group of columns, and of the columns in none."""
    for column in (column for group in groups for column in group):
        _made_of("interaction_constraints", column, features)
    named = {column for group in groups for column in group}
    rest = {column for feature in features for column in feature.columns} - named
    sets = [set(group) for group in groups] + ([rest] if rest else [])
    for feature in features:
        if not any(set(feature.columns) <= group for group in sets):
            raise SpecError(
                f"model.params.interaction_constraints: feature '{feature.name}' is made of {' and '.join(feature.columns)}, "
                "which no group has together; put them into one, or take it out of features.groups"
            )
    return [[i for i, feature in enumerate(features) if set(feature.columns) <= group] for group in sets]


def _made_of(name: str, column: str, features: Sequence[Feature]) -> list[int]:
    """The features that a column goes into."""
    found = [i for i, feature in enumerate(features) if column in feature.columns]
    if not found:
        known = {column for feature in features for column in feature.columns}
        raise SpecError(f"model.params.{name}: no feature is made of a column '{column}'{did_you_mean(column, known)}")
    return found
