"""From a trained module to the ONNX program that answers; refused unless both agree."""

from __future__ import annotations

import logging
import warnings
from typing import Final

import numpy as np
import torch

from pipelines.models.model import Matrix
from pipelines.models.network import INPUT, FittedNetwork, to_float32
from pipelines.models.network_modules import Answer, Network

TOLERANCE: Final = 1e-5
"""By what share of the largest raw score the program may be off: some roundings of float32."""
ROWS: Final = 500


def exported(network: Network, sample: Matrix) -> bytes:
    """Return the program of a module that stands in evaluation mode; `AssertionError` unless it answers as the module does.

    `sample` are rows as they come, some of which are compared, with missing, infinite and unknown values among them.
    """
    answer = Answer(network).eval()
    layout = network.layout
    rows = torch.zeros(3, layout.features)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says that torchvision is not there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of other parts of Torch
        # 3 and not 1 rows: a dimension of 1 would be taken for a constant.
        shape = {0: torch.export.Dim("rows")}
        made = torch.onnx.export(
            answer, (rows,), dynamo=True, input_names=[INPUT], output_names=["raw"], dynamic_shapes=(shape,), verbose=False
        )
    assert made is not None
    program: bytes = made.model_proto.SerializeToString()
    _compare(answer, program, sample)
    return program


def _compare(answer: Answer, program: bytes, sample: Matrix) -> None:
    layout = answer.network.layout
    rows = sample[:: max(1, len(sample) // ROWS)][:ROWS]
    strange = np.tile(rows[:1] if len(rows) else np.zeros((1, layout.features)), (4, 1))
    strange[0], strange[1], strange[2], strange[3] = np.nan, np.inf, -np.inf, 1e9
    rows = np.concatenate([rows, strange])
    plain = layout.model_copy(update={"center": 0.0, "scale": 1.0})
    found = FittedNetwork(plain, b"", program).predict(rows)
    with torch.no_grad():
        wanted = answer(torch.from_numpy(to_float32(rows))).double().numpy()
    assert found.shape == wanted.shape, f"the ONNX program answers {found.shape}, the module {wanted.shape}"
    off = float(np.max(np.abs(found - wanted), initial=0.0) / max(1.0, float(np.max(np.abs(wanted), initial=0.0))))
    assert off <= TOLERANCE, f"the ONNX program is off by {off:.3g} of the largest raw score"
