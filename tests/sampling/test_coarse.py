"""Starts on a smaller canvas: what is carried up, from where the run goes on, and what it costs."""

import diffusers
import pytest
import torch

from instantas.sampling import bridging, coarse
from instantas.sampling.coarse import CoarseStart
from instantas.sampling.noise import levels
from instantas.sampling.sampler import sample
from instantas.sampling.spectrum import basis, carry, normal, with_detail
from instantas.windows import WindowPlan
from tests.sampling.runs import of

CIRCLES = [(False, False), (True, False), (False, True), (True, True)]
KINDS = [
    "DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
    "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "LCM", "TCD",
]  # fmt: skip
STEPS = 10


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(windows, t, context):
    return 0.3 * torch.tanh(windows)


def spectrum(x, wrap=(False, False)):
    rows, columns = (basis(side, wraps).to(x) for side, wraps in zip(x.shape[-2:], wrap))
    return rows @ x @ columns.T


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 16])
def test_bases_are_orthonormal(length, wraps):
    rows = basis(length, wraps)
    torch.testing.assert_close(rows @ rows.T, torch.eye(length, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_circle_has_no_beginning():
    """Carried up, a canvas that is rolled by half is the rolled larger one; one that does not wrap is not."""
    x = draw(0, 1, 1, 8, 8)
    for wrap, same in (((False, True), True), ((False, False), False)):
        rolled = carry(x.roll(4, -1), (12, 12), wrap)
        assert torch.allclose(rolled, carry(x, (12, 12), wrap).roll(6, -1), atol=1e-5) is same


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("length, cycles", [(8, 0), (8, 1), (8, 3.5), (8, 4), (7, 3)])
def test_a_wave_stays_where_it_is(length, cycles, wraps):
    """Enlarged, every cell of a canvas becomes two with a mean of its sign: the finest wave that it has too."""
    place = (torch.arange(length) + 0.5) / length
    wave = torch.sin(2 * torch.pi * cycles * place) if cycles else torch.ones(length)
    larger = carry(wave.expand(1, 1, 1, length), (1, 2 * length), (False, wraps)).flatten()
    pairs, clear = larger.unflatten(0, (length, 2)).mean(1), wave.abs() > 0.3
    assert torch.equal(pairs.sign()[clear], wave.sign()[clear])


@pytest.mark.parametrize("wrap", CIRCLES)
def test_white_noise_carried_down_and_up_is_white(wrap):
    """Down: orthonormal rows of the larger canvas. Up: the same energy, all of it in the corner of low frequencies."""
    larger = torch.eye(12 * 10).reshape(1, -1, 12, 10)
    smaller = carry(larger, (6, 7), wrap).flatten(2)[0]
    torch.testing.assert_close(smaller.T @ smaller, torch.eye(42), atol=1e-5, rtol=0)
    noise = draw(1, 4, 4, 6, 7)
    up = spectrum(carry(noise, (12, 10), wrap), wrap)
    torch.testing.assert_close(up[..., :6, :7], spectrum(noise, wrap), atol=1e-5, rtol=0)
    up[..., :6, :7] = 0
    assert up.abs().max() < 1e-5
    torch.testing.assert_close(carry(carry(noise, (12, 10), wrap), (6, 7), wrap), noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "FlowMatchEulerDiscrete"])
def test_the_noise_that_a_larger_canvas_goes_on_with_is_white(kind):
    """Of an empty picture: a flat spectrum over every octave, with the deviation of the timestep."""
    chosen = diffusers.FlowMatchEulerDiscreteScheduler() if kind.startswith("Flow") else of(kind)
    chosen.set_timesteps(STEPS)
    begin, generator = coarse._begin(chosen, 1.5), torch.Generator().manual_seed(0)
    empty = with_detail(torch.zeros(64, 4, 8, 8), (16, 16), (False, False), generator)
    x = coarse.noised(chosen, empty, normal(empty, generator), begin)
    level = levels(chosen)[begin]
    deviation = level.noise / level.signal if kind == "EulerDiscrete" else level.noise
    power = spectrum(x).square().mean((0, 1)) / deviation**2
    radius = torch.hypot(torch.arange(16.0)[:, None], torch.arange(16.0)[None])
    for low, high in ((0, 4), (4, 8), (8, 16), (16, 23)):
        octave = (radius >= low) & (radius < high)
        error = (2 / (64 * 4 * int(octave.sum()))) ** 0.5
        assert power[octave].mean() == pytest.approx(1, abs=4 * error)


def test_detail_has_the_power_that_the_picture_has_at_its_frequency():
    """Of a field whose power falls with frequency alone, at every distance above the smaller canvas's band."""
    size = torch.hypot(torch.arange(16.0)[:, None], torch.arange(16.0)[None]).clamp(min=1) / 32
    clean = (basis(16, False).T @ (draw(0, 256, 4, 16, 16).double() / size) @ basis(16, False)).float()
    larger = spectrum(with_detail(clean, (32, 32), (False, False), torch.Generator().manual_seed(1)))
    torch.testing.assert_close(larger[..., :16, :16], 2 * spectrum(clean), atol=1e-3, rtol=1e-4)
    radius = torch.hypot(torch.arange(32.0)[:, None], torch.arange(32.0)[None]) / 64
    expected, power = radius.clamp(min=1 / 64) ** -2, larger.square().mean((0, 1))
    above = torch.ones(32, 32, dtype=torch.bool)
    above[:16, :16] = False
    for low, high in ((0.25, 0.35), (0.35, 0.5), (0.5, 0.68)):
        ring = above & (radius >= low) & (radius < high)
        assert power[ring].mean() / expected[ring].mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["Heun", "Flow"])
def test_a_gaussian_field_keeps_its_spectrum(kind, monkeypatch):
    """With its exact denoiser, of a field that looks the same at every scale: its mean power, within 2%.

    Noise is drawn with just as much of every frequency, and each picture has a twin with the opposite of what is added
    to it: in the mean over both what was there and what is added have nothing in common.
    """
    chosen = of("HeunDiscrete", "v_prediction") if kind == "Heun" else diffusers.FlowMatchHeunDiscreteScheduler()

    def power(rows, columns):
        radius = torch.hypot(torch.arange(rows)[:, None] / (2 * rows), torch.arange(columns)[None] / (2 * columns))
        return 0.01 * radius.clamp(min=1 / (2 * rows)) ** -2

    def exact(windows, t, context):
        level, p = context.level, power(*windows.shape[-2:])
        rows, columns = (basis(side, False).float() for side in windows.shape[-2:])
        gain = level.signal * p / (level.signal**2 * p + level.noise**2)
        return level.prediction(rows.T @ (gain * spectrum(windows)) @ columns, windows)

    def even(seed):
        seen, rows = spectrum(draw(seed, 64, 1, 12, 12)), basis(12, False).float()
        return rows.T @ (seen / seen.square().mean(0).sqrt()) @ rows

    class Whole:
        """The field's denoiser knows no windows."""

        def step(self, step, steps, plan):
            return bridging.Stage(WindowPlan.minimum_coverage(plan.height, plan.width, (plan.height, plan.width)))

    added = iter([even(1), even(2)])
    for drawn in ("coarse.normal", "spectrum.normal"):
        monkeypatch.setattr(
            f"instantas.sampling.{drawn}", lambda like, generator: (lambda e: torch.cat([e, -e]))(next(added))
        )
    settings = dict(num_inference_steps=60, start=CoarseStart(steps=1.0), bridging=Whole(), window_batch_size=128)
    latents, plan = even(0).repeat(2, 1, 1, 1), WindowPlan.minimum_coverage(12, 12, 6)
    found = spectrum(sample(exact, latents, plan, chosen, **settings)).square().mean((0, 1)) / power(12, 12)
    radius = torch.hypot(torch.arange(12.0)[:, None], torch.arange(12.0)[None])
    for low, high in ((1, 3), (3, 6), (6, 9), (9, 16)):
        assert found[(radius >= low) & (radius < high)].mean() == pytest.approx(1, abs=0.02), (low, high)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scheduler_whose_levels_are_known(kind):
    """Windows evaluated are those that were counted before, on the canvases that were said; the callback counts on."""
    chosen, plan, seen, told = of(kind), WindowPlan.minimum_coverage(16, 24, 8), [], []

    def denoiser(windows, t, context):
        seen.append((context.size, len(windows), context.step, context.steps))
        return network(windows, t, context)

    settings = dict(num_inference_steps=STEPS, bridging="shift", window_batch_size=9, start="coarse")
    generator = torch.Generator().manual_seed(0)
    result = sample(
        denoiser, draw(0, 2, 4, 16, 24), plan, chosen, generator=generator, **settings,
        callback=lambda step, t, latents: told.append((step, float(t), tuple(latents.shape[2:]))),
    )  # fmt: skip
    assert result.shape == (2, 4, 16, 24) and result.isfinite().all()
    chosen.set_timesteps(STEPS)
    small, last = coarse.legs(CoarseStart(), plan, chosen)
    assert (small.plan.height, small.plan.width, small.plan.count) == (8, 12, 2)
    assert {size for size, *_ in seen} == {(8, 12), (16, 24)}
    assert sum(windows for _, windows, *_ in seen) == 2 * coarse.evaluations("shift", [small, last])
    assert [step for step, *_ in told] == list(range(small.steps + last.steps))
    assert [t for _, t, size in told if size == (16, 24)] == [float(t) for t in chosen.timesteps[last.begin :]]
    level = levels(chosen)[last.begin]
    assert level.noise / level.signal == pytest.approx(1.5, rel=0.35)  # the nearest of ten steps


def test_the_last_run_is_one_that_begins_with_the_carried_sample():
    plan, latents = WindowPlan.minimum_coverage(16, 16, 8), draw(0, 1, 4, 16, 16)
    started = sample(
        network, latents, plan, of("DPMSolverMultistep"), num_inference_steps=STEPS, start="coarse",
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    chosen = of("DPMSolverMultistep")
    chosen.set_timesteps(STEPS)
    small, last = coarse.legs(CoarseStart(), plan, chosen)
    assert small.steps == 4
    generator = torch.Generator().manual_seed(5)
    clean = sample(
        network, carry(latents, (8, 8), plan.wrap), small.plan, of("DPMSolverMultistep"), num_inference_steps=4
    )
    enlarged = with_detail(clean, (16, 16), plan.wrap, generator)
    x = chosen.add_noise(enlarged, torch.randn(enlarged.shape, generator=generator), chosen.timesteps[last.begin][None])
    assert torch.equal(started, sample(network, x, plan, chosen, num_inference_steps=STEPS, begin=last.begin))


@pytest.mark.parametrize("steps", [25, 50])
@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_evaluations_on_stable_diffusions_schedules(kind, steps):
    """At most 0.65 of the windows at every step, from 2 x 2 windows on."""
    chosen, plan = of(kind), WindowPlan.minimum_coverage(128, 128, 64)
    chosen.set_timesteps(steps)
    whole = bridging.evaluations("shift", plan, len(chosen.timesteps))
    assert coarse.evaluations("shift", coarse.legs(CoarseStart(), plan, chosen)) <= 0.65 * whole


def test_a_picture_does_not_depend_on_the_others_of_its_batch():
    plan, latents = WindowPlan.minimum_coverage(16, 16, 8), draw(0, 3, 4, 16, 16)

    def run(some):
        generators = [torch.Generator().manual_seed(i) for i in range(3)][some]
        return sample(
            network, latents[some], plan, of("DDIM"), num_inference_steps=5, start="coarse", generator=generators
        )

    torch.testing.assert_close(run(slice(None))[1:2], run(slice(1, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "size, scale, sizes",
    [
        ((8, 8), 3.0, []),
        ((8, 40), 3.0, []),  # one row of windows
        ((16, 16), 3.0, [(8, 8)]),
        ((13, 20), 3.0, [(8, 12)]),
        ((24, 24), 3.0, [(8, 8)]),
        ((32, 48), 2.0, [(8, 12), (16, 24)]),
        ((72, 72), 3.0, [(8, 8), (24, 24)]),
    ],
)
def test_smaller_canvases(size, scale, sizes):
    """The smallest has the native length on the axis with fewer windows, and the canvas's proportions."""
    assert CoarseStart(scale=scale).sizes(WindowPlan.minimum_coverage(*size, 8)) == sizes


@pytest.mark.parametrize("kind", ["PNDM", "LMSDiscrete"])
def test_schedulers_that_count_steps_from_the_first_are_refused(kind):
    plan = WindowPlan.minimum_coverage(16, 16, 8)
    with pytest.raises(ValueError, match=f"start: expected a scheduler whose steps can begin.*got {kind}Scheduler"):
        sample(network, draw(0, 1, 4, 16, 16), plan, of(kind), num_inference_steps=STEPS, start="coarse")


@pytest.mark.parametrize("value", ["3", 14.5, 100, -1, True])
def test_evaluations_are_checked_before_they_are_counted(value):
    plan = WindowPlan.minimum_coverage(16, 16, 8)
    with pytest.raises((TypeError, ValueError), match=f"evaluations: expected .*got {value!r}"):
        sample(
            network, draw(0, 1, 4, 16, 16), plan, of("DDIM"), num_inference_steps=20, start="coarse", evaluations=value
        )


def test_noise_is_that_of_the_timestep_wherever_the_scheduler_was_set_to_begin():
    chosen, clean, noise = of("EulerDiscrete"), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    chosen.set_timesteps(STEPS)
    right = coarse.noised(chosen, clean, noise, 4)
    chosen.set_begin_index(0)
    assert torch.equal(coarse.noised(chosen, clean, noise, 4), right) and right < 5


def test_the_state_of_a_callback_is_told_on():
    class Counting:
        def __call__(self, step, timestep, latents):
            self.steps = step + 1

        def state_dict(self):
            return dict(steps=self.steps)

        def load_state_dict(self, state):
            self.steps = state["steps"]

    callback = Counting()
    for told in (coarse.counted_from(callback, 3), coarse._told(callback, 3, [])):
        told(2, None, None)
        assert told.state_dict() == dict(steps=6)
        told.load_state_dict(dict(steps=1))
        assert callback.steps == 1


def test_stages_go_on_from_their_own_level():
    plan, seen = WindowPlan.minimum_coverage(32, 32, 8), []

    def denoiser(windows, t, context):
        seen.append((context.size, context.step, context.steps))
        return network(windows, t, context)

    chosen, start = of("EulerDiscrete"), CoarseStart(scale=2.0)
    sample(denoiser, draw(0, 1, 4, 32, 32), plan, chosen, num_inference_steps=STEPS, start=start, window_batch_size=16)
    legs = coarse.legs(start, plan, chosen)
    assert [leg.plan.count for leg in legs] == [1, 4, 16]
    assert [leg.begin is None for leg in legs] == [True, False, False] and 0 < legs[1].begin < 4
    assert seen == [((leg.plan.height,) * 2, step, leg.steps) for leg in legs for step in range(leg.steps)]


def test_one_window_starts_as_ever():
    latents = draw(0, 1, 4, 8, 8)
    plan, settings = WindowPlan.minimum_coverage(8, 8, 8), dict(num_inference_steps=4)
    plain = sample(network, latents, plan, of("DDIM"), **settings)
    assert torch.equal(sample(network, latents, plan, of("DDIM"), start="coarse", **settings), plain)


def test_a_guidance_map_is_made_smaller():
    """2 on the left half and 6 on the right, on both canvases."""
    plan, scales = WindowPlan.minimum_coverage(16, 16, 8), []

    def denoiser(windows, t, context):
        return windows, torch.zeros_like(windows)

    guidance = torch.full((16, 16), 2.0)
    guidance[:, 8:] = 6.0

    def told(context):
        scales.append(context.size)
        return guidance

    settings = dict(num_inference_steps=4, start="coarse")
    runs = [
        sample(denoiser, draw(0, 1, 4, 16, 16), plan, of("DDIM"), guidance_scale=g, **settings,
               generator=torch.Generator().manual_seed(0))
        for g in (guidance, told)
    ]  # fmt: skip
    assert torch.equal(*runs) and {(8, 8), (16, 16)} == set(scales)


def test_the_run_may_end_on_the_smaller_canvas():
    """With a picture of the size that was asked for, all the same; and the latents that the callback gives count."""
    plan, latents = WindowPlan.minimum_coverage(16, 16, 8), draw(0, 1, 4, 16, 16)

    def stop(step, t, given):
        assert given.shape == (1, 4, 8, 8)
        raise StopIteration(torch.full_like(given, 3.0))

    ended = sample(network, latents, plan, of("DDIM"), num_inference_steps=4, start="coarse", callback=stop)
    torch.testing.assert_close(ended, torch.full((1, 4, 16, 16), 3.0))


def test_where_the_run_ends_is_counted_from_its_beginning():
    plan, seen = WindowPlan.minimum_coverage(16, 16, 8), []
    settings = dict(
        num_inference_steps=STEPS, start="coarse", evaluations=8, generator=torch.Generator().manual_seed(0)
    )
    chosen = of("DDIM")
    sample(
        network, draw(0, 1, 4, 16, 16), plan, chosen, callback=lambda i, t, x: seen.append((int(t), len(x[0, 0]))),
        **settings,
    )  # fmt: skip
    last = coarse.legs(CoarseStart(), plan, chosen, 8)[-1]
    assert [t for t, side in seen if side == 16] == chosen.timesteps[last.begin : 8].tolist()


def test_the_models_own_level_is_taken_where_the_start_has_none():
    assert coarse.start_of("coarse") == CoarseStart(sigma=coarse.SIGMA) and coarse.start_of("none", 0.7) is None
    assert coarse.start_of("coarse", 0.7) == CoarseStart(sigma=0.7)
    assert coarse.start_of(CoarseStart(steps=0.2), 0.7) == CoarseStart(sigma=0.7, steps=0.2)
    assert coarse.start_of(CoarseStart(sigma=2.0), 0.7) == CoarseStart(sigma=2.0)
    for wrong in (0, -1.0, float("nan"), "1.5"):
        with pytest.raises((TypeError, ValueError), match="coarse_sigma: expected"):
            coarse.start_of("coarse", wrong)


def test_without_a_level_a_run_goes_on_from_the_default():
    chosen, plan = of("DDIM"), WindowPlan.minimum_coverage(16, 16, 8)
    chosen.set_timesteps(50)
    stated = [coarse.legs(CoarseStart(sigma=sigma), plan, chosen)[-1].begin for sigma in (coarse.SIGMA, 0.7)]
    assert coarse.legs(CoarseStart(), plan, chosen)[-1].begin == stated[0] < stated[1]


REFUSED = {
    "name": (dict(start="fine"), ValueError, "start: expected one of none, coarse, got 'fine'"),
    "kind": (dict(start=2), TypeError, "start: expected a name or a CoarseStart, got int"),
    "begin": (dict(begin=3), ValueError, "begin: expected None with a start"),
    "end": (dict(evaluations=3), ValueError, "start: expected to go on before the run's end, after 3 timesteps"),
    "strided": (dict(plan=WindowPlan.strided(16, 16, 8, 4)), ValueError, "start: expected a plan of the fewest"),
    "scheduler": (dict(scheduler=of("DDIM", "epsilon")), ValueError, "start: expected a scheduler whose noise levels"),
}  # fmt: skip


@pytest.mark.parametrize("given, kind, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_start_so_is_refused_before_the_network_is_called(given, kind, message):
    settings = dict(plan=WindowPlan.minimum_coverage(16, 16, 8), scheduler=of("DDIM"), start="coarse") | given
    if message.endswith("noise levels"):
        settings["scheduler"].register_to_config(prediction_type="other")

    def never(*_):
        raise AssertionError("the denoiser was called")

    with pytest.raises(kind, match=message):
        sample(never, draw(0, 1, 4, 16, 16), num_inference_steps=STEPS, **settings)


@pytest.mark.parametrize("name, value", [("sigma", 0), ("sigma", -1.0), ("steps", 0), ("steps", 1.5), ("scale", 1.0)])
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        CoarseStart(**{name: value})
