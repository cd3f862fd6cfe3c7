"""Windows for hosts that own the loop: as our own loop has them, and what a host may do otherwise."""

import diffusers
import numpy as np
import pytest
import torch

from instantas.sampling.bridging import Dilated, Shift, Stage
from instantas.sampling.hosted import Place, Windowed, keep_eps, step_of
from instantas.sampling.noise import Level, levels
from instantas.sampling.sampler import sample
from instantas.testing.tiny import scheduler
from instantas.windows import WindowPlan

WINDOW = 8
BRIDGES = ["none", "shift", "economy", "centred", "dilated", "moments", "shift+moments"]


def noise(height, width, batch=1, channels=4, seed=0):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def network(windows):
    """Depends on the whole window, so that its place matters."""
    spread = torch.fft.ifft2(torch.fft.fft2(windows.float()).abs()).real
    return (0.5 * windows + 0.1 * torch.tanh(spread)).to(windows.dtype)


def of_x0(windows, sigma):
    """The same network's x_0 of x = x_0 + sigma eps."""
    return windows - sigma * network(windows / (sigma**2 + 1) ** 0.5)


def euler(prediction_type="epsilon", steps=9):
    chosen = scheduler(prediction_type, kind=diffusers.EulerDiscreteScheduler)
    chosen.set_timesteps(steps)
    return chosen


def hosted_run(host, x, steps=9):
    """k-diffusion's Euler, on x = x_0 + sigma eps, with a network that predicts noise."""
    own = euler(steps=steps)
    sigmas, marks, x = own.sigmas, levels(own), x * own.init_noise_sigma
    for i in range(steps):
        scaled = x / (sigmas[i] ** 2 + 1) ** 0.5
        eps = host(lambda windows, place: network(windows), scaled, i, steps, mark=marks[i])
        x = x + (sigmas[i + 1] - sigmas[i]) * eps
    return x


def own_run(x, bridging, steps=9, weight=None, **settings):
    plan = WindowPlan.minimum_coverage(*x.shape[-2:], WINDOW, **settings)
    given = dict(num_inference_steps=steps, bridging=bridging, weight=weight and plan.weight(weight))
    return sample(lambda w, t, context: network(w), x, plan, euler(), **given)


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("size", [(16, 16), (20, 13), (8, 24)])
@pytest.mark.parametrize("bridging", BRIDGES)
def test_a_hosts_loop_and_our_own_agree(bridging, size):
    x = noise(*size)
    assert difference(hosted_run(Windowed(WINDOW, bridging=bridging), x), own_run(x, bridging)) <= 1e-5


@pytest.mark.parametrize("bridging", ["none", "shift", "economy", "dilated"])
def test_windows_that_overlap_may_give_way_to_each_other_slowly(bridging):
    x = noise(20, 13)
    hosted = hosted_run(Windowed(WINDOW, bridging=bridging, weight="linear"), x)
    assert difference(hosted, own_run(x, bridging, weight="linear")) <= 1e-5
    assert difference(hosted, own_run(x, bridging)) > 1e-3


@pytest.mark.parametrize("bridging", ["none", "shift"])
def test_on_an_axis_that_wraps_too(bridging):
    x, wrap = noise(16, 20), (False, True)
    hosted = hosted_run(Windowed(WINDOW, bridging=bridging, wrap=wrap), x)
    assert difference(hosted, own_run(x, bridging, wrap=wrap)) <= 1e-5


@pytest.mark.parametrize("bridging", ["shift", "economy", "centred"])
def test_what_a_network_says_of_x_0_is_carried_as_its_noise(bridging):
    x, own = noise(20, 13), euler()
    host, sigmas, y = Windowed(WINDOW, bridging=bridging), own.sigmas.double(), noise(20, 13).double()
    y = y * own.init_noise_sigma
    for i, sigma in enumerate(sigmas[:-1]):
        call = lambda windows, place, sigma=sigma: of_x0(windows, sigma)  # noqa: E731
        step = step_of(sigmas, sigma)
        denoised = host(call, y, step, len(sigmas) - 1, carry=keep_eps, mark=sigma)
        y = y + (sigmas[i + 1] - sigma) * (y - denoised) / sigma
    assert difference(y, hosted_run(Windowed(WINDOW, bridging=bridging), x.double())) <= 1e-5


def test_v_is_carried_by_its_level():
    """A cell that is not evaluated again, on the path that its prediction says: the same x_0 at every level."""
    clean, eps, host = noise(8, 16), noise(8, 16, seed=1), Windowed(WINDOW, bridging=Half())
    marks = [Level(0.6, 0.8, "v_prediction"), Level(0.8, 0.6, "v_prediction")]
    for step, level in enumerate(marks):
        x, v = (level.signal * clean + level.noise * eps), (level.signal * eps - level.noise * clean)
        given = []
        said = host(
            lambda windows, place, v=v, given=given: given.append(len(windows)) or place.cut(v),
            x, step, 2, carry=lambda level: level.carry, mark=level,
        )  # fmt: skip
        torch.testing.assert_close(said, v, rtol=1e-5, atol=1e-5)
    assert given == [1]


class Half:
    """Evaluates the left window alone, but for the first step."""

    def step(self, step, steps, plan):
        return Stage(plan if step == 0 else plan.subset(plan.origins[:, 1] == 0))


def test_one_native_window_is_handed_through_untouched():
    x, seen = noise(WINDOW, WINDOW).requires_grad_(), []
    answer = x * 2

    def evaluate(windows, place):
        seen.append((windows, place.origins.tolist(), place.pictures.tolist()))
        return answer

    assert Windowed(WINDOW)(evaluate, x, 3, 9) is answer
    assert seen[0][0] is x and seen[0][1:] == ([[0, 0]], [0])
    small = noise(5, 7)
    assert Windowed(WINDOW)(lambda windows, place: windows, small, 0, 1) is small


def test_gradients_reach_a_large_canvas():
    x = noise(16, 12).requires_grad_()
    Windowed(WINDOW, bridging=None)(lambda windows, place: windows**2, x, 0, 1).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("channels", [1, 3, 9])
@pytest.mark.parametrize("bridging", ["none", "shift", "economy", "dilated"])
def test_predictions_may_have_other_channels_than_x(channels, bridging):
    host, x = Windowed(WINDOW, bridging=bridging), noise(20, 20, channels=5)
    for step in range(6):
        merged = host(lambda w, place: w.mean(1, keepdim=True).expand(-1, channels, -1, -1), x, step, 6)
        assert merged.shape == (1, channels, 20, 20)
        if bridging == "none":
            torch.testing.assert_close(merged, x.mean(1, keepdim=True).expand(-1, channels, -1, -1))


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("bridging", ["shift", "dilated"])
def test_windows_come_by_element_of_the_hosts_batch_in_any_batches(batch, bridging):
    """[uncond, cond] stays that in every call, and the result does not depend on how windows are batched."""
    x, text, sizes = noise(16, 24, batch=2), torch.tensor([[-1.0], [1.0]]), []

    def evaluate(windows, place):
        sizes.append(len(windows))
        rows = place.pick(text)
        assert rows.flatten().tolist() == [-1.0] * (len(windows) // 2) + [1.0] * (len(windows) // 2)
        assert torch.equal(place.cut(x), windows)
        return network(windows) * rows[..., None, None]

    host, whole = (Windowed(WINDOW, bridging=bridging, window_batch_size=size) for size in (batch, 99))
    for step in range(5):
        merged = host(evaluate, x, step, 5)
        calls, sizes[:] = list(sizes), []
        assert max(calls) <= 2 * batch
        torch.testing.assert_close(merged, whole(evaluate, x, step, 5), rtol=1e-6, atol=1e-6)
        sizes.clear()


def test_memory_that_runs_out_halves_the_batches_once():
    sizes = []

    def evaluate(windows, place):
        sizes.append(len(windows))
        if len(windows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return windows

    x, host = noise(16, 16, batch=2), Windowed(WINDOW, bridging=None)
    with pytest.warns(UserWarning, match="out of memory with 4 windows at once; going on with 2"):
        assert torch.equal(host(evaluate, x, 0, 2), x)
    host(evaluate, x, 1, 2)
    assert sizes == [8, 4, 4, 4, 4]


def test_streams_reuse_predictions_of_their_own():
    """A host may ask for conditions one by one, in any order and in batches of any size."""
    x, together, apart = noise(8, 16, batch=2), Windowed(WINDOW, bridging=Half()), Windowed(WINDOW, bridging=Half())
    for step in range(3):
        scale = torch.tensor([1.0, 5.0])[:, None, None, None] + step
        joined = together(lambda w, place, scale=scale: w * place.pick(scale), x, step, 3)
        for name in (1, 0) if step % 2 else (0, 1):
            alone = apart(lambda w, place, s=scale[name]: w * s, x[name : name + 1], step, 3, stream=name)
            assert torch.equal(alone, joined[name : name + 1])


def test_another_run_reuses_nothing():
    """A run that begins later in the schedule, after one that ended there, has every window evaluated first."""

    def windows_at(host, step, x):
        given = []
        host(lambda windows, place: given.append(len(windows)) or windows, x, step, 9)
        return sum(given)

    host, x = Windowed(WINDOW, bridging=Half()), noise(8, 16)
    assert [windows_at(host, step, x) for step in (0, 1, 2, 8)] == [2, 1, 1, 1]
    assert [windows_at(host, step, x) for step in (4, 5)] == [2, 1]
    assert windows_at(host, 6, noise(8, 24)) == 3
    host.reset()
    assert [windows_at(host, step, noise(8, 24)) for step in (6, 7)] == [3, 1]


def test_a_host_in_inference_mode():
    x = noise(20, 13)
    with torch.inference_mode():
        inside = hosted_run(Windowed(WINDOW), x)
    torch.testing.assert_close(inside, hosted_run(Windowed(WINDOW), x), rtol=0, atol=0)


@pytest.mark.parametrize("align", [2, 4])
@pytest.mark.parametrize("wrap", [(False, False), (True, True)])
def test_windows_begin_at_multiples_of_align(align, wrap):
    host, x, seen = Windowed(WINDOW, align=align, wrap=wrap), noise(20, 28), []

    def evaluate(windows, place):
        seen.extend(place.origins.tolist())
        return windows

    for step in range(12):
        torch.testing.assert_close(host(evaluate, x, step, 12), x, rtol=1e-6, atol=1e-6)
    assert not (np.array(seen) % align).any() and len(np.unique(seen, axis=0)) > 8


# Places


def place_of(plan, view=None, batch=2):
    return Place.of(Stage(plan, view=view), batch, 0.0, None, torch.device("cpu"))


@pytest.mark.parametrize("times", [1, 3])
def test_what_belongs_to_the_canvas_is_cut_like_the_windows(times):
    plan = WindowPlan.minimum_coverage(12, 20, WINDOW, wrap=(False, True), shift=(0, 5))
    place, pictures = place_of(plan), noise(12 * times, 20 * times, batch=2, channels=3)
    cells = torch.cat([pictures, pictures], dim=-1)
    for row, (picture, (y, x)) in zip(place.cut(pictures), zip(place.pictures.tolist(), place.origins.tolist())):
        side = WINDOW * times
        assert torch.equal(row, cells[picture, :, y * times : y * times + side, x * times : x * times + side])
    assert torch.equal(place.cut(pictures[:1]), place.cut(pictures[:1].expand(2, -1, -1, -1)))


@pytest.mark.parametrize("times", [1, 2])
def test_a_view_shows_what_belongs_to_the_canvas_as_it_shows_the_canvas(times):
    stage = Dilated().step(0, 10, WindowPlan.minimum_coverage(12, 20, WINDOW))
    place, canvas = place_of(stage.plan, stage.view, 1), noise(12, 20)
    large = canvas.repeat_interleave(times, -2).repeat_interleave(times, -1)
    small = place.cut(canvas).repeat_interleave(times, -2).repeat_interleave(times, -1)
    assert place.size == (12, 20) and torch.equal(place.cut(large), small)


def test_arguments_of_any_shape_are_fitted():
    plan = WindowPlan.minimum_coverage(8, 16, WINDOW)
    place, mask, text, other = place_of(plan), noise(16, 32, batch=1), torch.randn(2, 7, 5), torch.randn(3, 4)
    given = {"mask": mask, "list": [text, "word", None], "pair": (other, torch.tensor(3.0)), "scale": 2.0}
    fitted = place.fit(given, 2, (8, 16))
    assert torch.equal(fitted["mask"], place.cut(mask)) and torch.equal(fitted["list"][0], text[[0, 0, 1, 1]])
    assert fitted["list"][1:] == ["word", None] and fitted["scale"] == 2.0
    assert fitted["pair"][0] is other and fitted["pair"][1].item() == 3.0
    for wrong in (noise(8, 15), noise(16, 16), torch.zeros(8, 16)):
        with pytest.raises(ValueError, match="tensor: expected"):
            place.cut(wrong)


def test_steps_of_a_schedule():
    own = euler(steps=7)
    assert [step_of(own.sigmas, sigma) for sigma in own.sigmas[:-1]] == list(range(7))
    between = (own.sigmas[:-1] * own.sigmas[1:].clamp(min=0.01)) ** 0.5
    assert [step_of(own.sigmas, sigma.expand(2)) for sigma in between] == list(range(7))
    assert step_of(own.sigmas, 1e9) == 0 and step_of(own.sigmas, 0.0) == 6


# What is refused


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Windowed(0), "window: expected a positive integer"),
        (lambda: Windowed(8, align=3), r"align: expected a divisor of the window \(8, 8\), got 3"),
        (lambda: Windowed(8, bridging="shfit"), "bridging: expected one of"),
        (lambda: Windowed(8, weight="cubic"), "weight: expected one of uniform, linear"),
        (lambda: Windowed(8, window_batch_size=0), "window_batch_size: expected a positive integer or None"),
        (
            lambda: Windowed(8, align=4)(network, noise(10, 16), 0, 1),
            "x: expected sides that are multiples of align = 4",
        ),
        (lambda: Windowed(8)(network, noise(16, 16), 4, 4), "step: expected 0 to 3, got 4"),
        (lambda: Windowed(8)(lambda w, p: w[:1], noise(16, 16), 0, 4), "evaluate: expected predictions of 4 windows"),
        (lambda: Windowed(8, bridging="moments")(lambda w, p: w, noise(16, 16), 0, 4), "mark: expected a noise.Level"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mark_that_a_bridge_cannot_use_is_refused_before_the_network_is_evaluated():
    evaluated = []
    with pytest.raises(ValueError, match="mark: expected a noise.Level"):
        Windowed(8, bridging="moments")(lambda w, p: evaluated.append(w) or w, noise(16, 16), 0, 4, mark=0.5)
    assert not evaluated


def test_what_is_no_prediction_is_named():
    for evaluate, message in (
        (lambda windows, place: (windows,), "evaluate: expected a tensor of predictions, got tuple"),
        (None, "evaluate: expected a function, got NoneType"),
    ):
        with pytest.raises(TypeError, match="^" + message):
            Windowed(8)(evaluate, noise(16, 16), 0, 4)
    with pytest.raises(TypeError, match="^x: expected a tensor of floats, got torch.int64"):
        Windowed(8)(network, torch.zeros(1, 4, 16, 16, dtype=torch.int64), 0, 4)


def test_x_that_is_no_canvas_is_named():
    for wrong in (torch.zeros(4, 8, 8), "x"):
        with pytest.raises(TypeError, match=r"x: expected a tensor \(B, C, H, W\)"):
            Windowed(8)(network, wrong, 0, 1)


def test_a_shifted_rest_is_what_shift_says():
    host, x, seen = Windowed(WINDOW), noise(16, 16), []
    for step in range(4):
        host(lambda windows, place: seen.append(place.plan) or windows, x, step, 9)
    plan = WindowPlan.minimum_coverage(16, 16, WINDOW)
    assert seen == [Shift().step(step, 9, plan).plan for step in range(4)]


@pytest.mark.parametrize("bridging", ["shift", "economy"])
def test_streams_of_one_batch_keep_their_own_however_the_host_groups_them(bridging):
    """[uncond, cond] in one call at some steps, the other way round or one by one at others: as one by one always."""
    x, gains = noise(20, 13), {"cond": 1.0, "uncond": -0.5}
    groups = [["uncond", "cond"], ["cond"], ["uncond"], ["cond", "uncond"]]

    def run(of_step):
        host, found, count = Windowed(WINDOW, bridging=bridging), [], []
        for step in range(9):
            said = {}
            for streams in of_step(step):
                gain = torch.tensor([gains[each] + step for each in streams])[:, None, None, None]

                def evaluate(windows, place, gain=gain):
                    count.append(len(windows))
                    return network(windows) * place.pick(gain)

                merged = host(evaluate, x.repeat(len(streams), 1, 1, 1), step, 9, stream=streams)
                said |= dict(zip(streams, merged))
            found.append(torch.stack([said["cond"], said["uncond"]]))
        return torch.stack(found), sum(count)

    apart, count = run(lambda step: groups[1:3])
    grouped, same_count = run(lambda step: (groups[:1], groups[1:3], groups[3:])[step % 3])
    torch.testing.assert_close(grouped, apart, rtol=1e-6, atol=1e-6)
    assert count == same_count


def test_streams_divide_the_batch():
    for streams in ([], ["a", "b"]):
        with pytest.raises(ValueError, match="stream: expected as many as divide a batch of 3"):
            Windowed(WINDOW)(lambda windows, place: windows, noise(20, 13, batch=3), 0, 1, stream=streams)
