"""What can be named in a Spec, and the class behind each name.

The tables are literal: one line adds a transform, a model family or a file format. A name with a colon, `package.module:Class`,
is imported as it stands, so a user's own class needs no line here.
"""

from __future__ import annotations

import importlib
from typing import Any

from pipelines.errors import SpecError, did_you_mean

TRANSFORMS = {
    "impute": "pipelines.features.numeric:Impute",
    "scale": "pipelines.features.numeric:Scale",
    "clip": "pipelines.features.distribution:Clip",
    "log1p": "pipelines.features.distribution:Log1p",
    "quantile": "pipelines.features.distribution:Quantile",
    "bin": "pipelines.features.distribution:Bin",
    "index": "pipelines.features.categorical:Index",
    "hash": "pipelines.features.categorical:Hash",
    "frequency": "pipelines.features.categorical:Frequency",
    "onehot": "pipelines.features.categorical:OneHot",
    "length": "pipelines.features.text:Length",
    "ngrams": "pipelines.features.text:Ngrams",
    "parts": "pipelines.features.dates:Parts",
    "cyclic": "pipelines.features.dates:Cyclic",
    "since": "pipelines.features.dates:Since",
    "target_mean": "pipelines.features.target_mean:TargetMean",
    "cross": "pipelines.features.cross:Cross",
    "difference": "pipelines.features.difference:Difference",
    "pca": "pipelines.features.pca:PCA",
}

MODELS = {
    "lightgbm": "pipelines.models.boosting:LightGBM",
    "linear": "pipelines.models.network:Linear",
    "mlp": "pipelines.models.network:MLP",
    "tabm": "pipelines.models.network:TabM",
}

FORMATS = {
    "parquet": "pipelines.data.formats.columnar:Parquet",
    "csv": "pipelines.data.formats.delimited:CSV",
    "jsonl": "pipelines.data.formats.lines:JSONLines",
    "orc": "pipelines.data.formats.columnar:ORC",
    "arrow": "pipelines.data.formats.columnar:Arrow",
    "sql": "pipelines.data.formats.database:SQL",
}


def load(table: dict[str, str], name: str, where: str) -> Any:
    """Return the class that `name` stands for; `where` is the dotted path of the name in the Spec.

    Raises `SpecError` when the name is unknown or its module cannot be imported.
    """
    path = table.get(name, name)
    if ":" not in path:
        raise SpecError(f"{where} '{name}' is unknown{did_you_mean(name, table)}")
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in table:
            raise
        raise SpecError(f"{where} '{name}' cannot be imported: {error}; write it as 'package.module:Class'") from error
