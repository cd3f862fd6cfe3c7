"""Digests of what a run is made of: the same for the same contents, in every process."""

import dataclasses

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from instantas.sampling.bridging import Shift
from instantas.sampling.fingerprint import digest
from instantas.testing.tiny import scheduler, unet
from instantas.windows import WindowPlan

PLAN = WindowPlan.minimum_coverage(20, 50, 16)
OTHER = torch.randn(2, 4, 20, 50, generator=torch.Generator().manual_seed(1))


def never(windows, timestep, context):
    raise AssertionError("not called")


def of(name):
    return scheduler(kind=getattr(diffusers, f"{name}Scheduler"))


def test_a_scheduler_is_the_same_in_every_process():
    """Its configuration lists what was not given in the order of a set, which hashes of texts decide."""
    one, another = (diffusers.DDIMScheduler() for _ in range(2))
    names = one.config["_use_default_values"]
    assert len(names) > 1
    another._internal_dict = FrozenDict({**another.config, "_use_default_values": names[::-1]})
    assert digest(one) == digest(another) != digest(diffusers.DDIMScheduler(steps_offset=1))


def test_digests_are_of_contents():
    picture = Image.new("RGB", (3, 2), "red")
    net, other = unet(), unet()
    with torch.no_grad():
        other.conv_in.bias[0] += 1
    alike = [
        (1, 1.0),
        (np.float64(0.5), 0.5),
        ((1, "a"), [1, "a"]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (OTHER, OTHER.clone().to(memory_format=torch.channels_last)),
        (PLAN, WindowPlan.minimum_coverage(20, 50, (16, 16))),
        (picture, picture.copy()),
        (Shift(0.5), Shift(share=0.5)),
        (net, unet()),
        (torch.device("cpu"), torch.device("meta")),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)),
    ]
    for one, another in alike:
        assert digest(one) == digest(another)
    different = [
        *(None, 0, True, "0", 0.5, -1, "", [], [[]], [[], []], ["a", "b"], ["ab"], {}, {"a": 1}, {"a": 2}, set(), {1}),
        *(OTHER, OTHER.double(), OTHER[:1], OTHER.view(4, 2, 20, 50), OTHER + 1, OTHER.numpy()[0], np.zeros(3)),
        *(picture, Image.new("RGB", (2, 3), "red"), Image.new("RGB", (3, 2), "blue"), Shift(), Shift(0.5)),
        *(PLAN, WindowPlan.minimum_coverage(20, 50, 16, wrap=True), PLAN.subset([0]), never, of, net, other),
        *(torch.Generator().manual_seed(1), torch.float32, torch.float16, of("DDIM"), of("DDPM")),
        dataclasses.replace(PLAN, height=20, width=64, origins=PLAN.origins, partial=True),
    ]
    assert len({digest(value) for value in different}) == len(different)
