"""Which roles a distillation refuses."""

from dataclasses import replace

import pytest
import torch

import distill.options as distill_options
import distill.roles as roles
from scorefield.denoiser import NetworkDenoiser
from scorefield.schedule import VariancePreserving


@pytest.mark.parametrize(("schedule", "changes", "refused"), [
    (VariancePreserving.linear(), {"student_ratio": 0.0}, True), (VariancePreserving.linear(), {}, False),
    (VariancePreserving.linear(), {"student_ratio": 0.0, "precision": "no"}, False),
    (VariancePreserving.scaled_linear(), {"student_ratio": 0.0}, False),
])  # fmt: skip
def test_an_eps_student_in_bf16_is_not_asked_where_rounding_is_all_it_would_show(schedule, changes, refused):
    denoiser = NetworkDenoiser(torch.nn.Linear(2, 2), schedule, "eps")
    config = replace(distill_options.auto(), precision="bf16")
    config = replace(config, **changes)
    if refused:
        with pytest.raises(ValueError, match=r"sigma / alpha = 157; 20 is the most.*--student-ratio 3.5"):
            roles.check_rounding(config, denoiser)
    else:
        roles.check_rounding(config, denoiser)
    roles.check_rounding(config, replace(denoiser, kind="v"))
