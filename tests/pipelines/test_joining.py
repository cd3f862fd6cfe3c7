"""What is painted joins the picture around it: no edge, and not one of the picture's pixels another."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from instantas import InstantASPipeline
from instantas.pipelines.joining import joined
from instantas.testing.tiny import tiny_pipeline
from tests.pipelines.starting import NATIVE, photo, seeded

PLAIN = (False, False)


def ellipse(rows=48, columns=40):
    """(1, 1, rows, columns) bool, in the middle."""
    drawn = Image.new("1", (columns, rows))
    ImageDraw.Draw(drawn).ellipse((8, 10, columns - 9, rows - 7), fill=1)
    return torch.from_numpy(np.array(drawn))[None, None]


def test_an_error_that_is_the_same_everywhere_is_gone_at_the_edge_and_there_in_full_within():
    new, picture = ellipse(), 0.3 + 0.4 * torch.rand(2, 3, 48, 40, generator=seeded())
    found = joined(picture - 0.1, picture, new, 6, PLAIN)
    off, inside = found - picture, new.expand_as(picture)
    assert torch.equal(found[~inside], picture[~inside])
    rim = inside & (F.max_pool2d((~new).float(), 3, 1, 1) > 0)
    deep = inside & (F.max_pool2d((~new).float(), 13, 1, 6) == 0)
    torch.testing.assert_close(off[rim], torch.full_like(off[rim], -0.1 / 6))
    torch.testing.assert_close(off[deep], torch.full_like(off[deep], -0.1))
    assert (off[inside] < 0).all() and deep.any()


def test_a_border_wider_than_the_picture_takes_no_more_passes_than_one_as_wide(monkeypatch):
    new, picture, passes, pool = ellipse(), 0.3 + 0.4 * torch.rand(1, 3, 48, 40, generator=seeded()), [], F.max_pool2d
    monkeypatch.setattr(F, "max_pool2d", lambda *args, **how: passes.append(args) or pool(*args, **how))
    off, inside = joined(picture - 0.1, picture, new, 500, PLAIN) - picture, new.expand_as(picture)
    away = sum(1 - pool((~new).float(), 2 * i + 1, 1, i) for i in range(24)).expand_as(off)  # from what stays
    assert len(passes) <= 48 + 1
    torch.testing.assert_close(off[inside], -0.1 / 500 * away[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("blend", [0, 16])
@pytest.mark.parametrize("new", [torch.zeros(1, 1, 9, 7), torch.ones(1, 1, 9, 7)], ids=["nothing new", "all new"])
def test_masks_that_hold_nothing_or_everything(new, blend):
    painted, picture = torch.rand(2, 2, 3, 9, 7, generator=seeded())
    assert torch.equal(joined(painted, picture, new.bool(), blend, PLAIN), painted if new.any() else picture)


def test_masks_of_their_own_are_joined_each_by_itself():
    new = torch.cat([ellipse(), ~ellipse(), torch.zeros(1, 1, 48, 40, dtype=torch.bool)])
    painted, picture = torch.rand(2, 3, 3, 48, 40, generator=seeded())
    each = [joined(p[None], s[None], n[None], 8, PLAIN) for p, s, n in zip(painted, picture, new)]
    torch.testing.assert_close(joined(painted, picture, new, 8, PLAIN), torch.cat(each))


def test_edges_that_join_are_no_edges():
    """As in the middle of the picture, so at a border that wraps."""
    new, picture = ellipse(), 0.3 + 0.4 * torch.rand(1, 3, 48, 40, generator=seeded())
    rolled = [t.roll((24, 20), (2, 3)) for t in (picture - 0.1, picture, new)]
    found = joined(*rolled, 4, (True, True)).roll((-24, -20), (2, 3))
    torch.testing.assert_close(found, joined(picture - 0.1, picture, new, 4, PLAIN))


def test_the_pipeline_draws_what_it_paints_to_the_picture():
    ours, mask = InstantASPipeline.from_pipe(tiny_pipeline()), Image.new("L", (NATIVE, NATIVE))
    ImageDraw.Draw(mask).ellipse((24, 30, 90, 100), fill="white")
    call = dict(image=photo(), mask_image=mask, num_inference_steps=1, output_type="np")
    hard, soft, default = (
        ours("grass", generator=seeded(), **call | given).images[0] for given in (dict(blend=0), dict(blend=9), {})
    )
    held = np.asarray(mask) > 0
    assert not (hard - soft)[~held].any() and (hard != soft)[held].any()
    assert (default != soft)[held].any()

    def across(picture):
        return np.concatenate([np.abs(np.diff(picture, axis=a))[np.diff(held, axis=a)] for a in (0, 1)]).mean()

    assert across(soft) < across(hard)
    with pytest.raises(ValueError, match="blend: expected an integer from 0 up, got -1"):
        ours("grass", **call, blend=-1)


def test_what_is_unsafe_stays_black():
    ours, mask = InstantASPipeline.from_pipe(tiny_pipeline()), Image.new("L", (NATIVE, NATIVE))
    ImageDraw.Draw(mask).rectangle((24, 32, 47, 55), fill="white")
    ours.pipe.safety_checker = object()
    ours.pipe.run_safety_checker = lambda images, device, dtype: (torch.zeros_like(images), [True] * len(images))
    settings = dict(num_inference_steps=1, output_type="np", generator=seeded())
    painted = ours("grass", image=photo(), mask_image=mask, **settings)
    assert painted.nsfw_content_detected == [True]
    assert not painted.images[0][np.asarray(mask) > 0].any() and painted.images[0][np.asarray(mask) == 0].all(-1).any()
    assert not ours.extend(photo(), right=64, prompt="grass", **settings).images[0][:, NATIVE:].any()
