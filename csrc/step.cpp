// guided_step on the host.
#include <algorithm>

#include "host.h"
#include "step.h"

namespace instantas {

namespace {

constexpr int64_t GRAIN = 1 << 14;  // cells that are worth a thread

template <class T, class A = arithmetic_t<T>>
void run(const Step<T>& step, const Plan& plan, int64_t images) {
  const int64_t tiles = int64_t{plan.tiles_y()} * plan.tiles_x(), area = int64_t{plan.tile_y} * plan.tile_x;
  const int64_t grain = GRAIN / (area * plan.channels) + 1;
  // of a plan that covers the canvas, every cell has some weight
  const int64_t looked_at = step.keeps && step.weight ? plan.window_plane() * (step.weight_stride ? plan.windows : 1) : 0;
  const bool has_zeros = !std::all_of(step.weight, step.weight + looked_at, [](A weight) { return weight > 0; });
  const Overlap<A> overlap{step.weight, step.weight_stride, has_zeros};
  const Numbers<A> numbers(step.update);
  torch::stable::parallel_for(0, images * tiles, grain, [&](int64_t begin, int64_t end) {
    run_for_processor<Advance>(step, numbers, overlap, plan, begin, end);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> guided_step(Tensor cond, OptionalTensor uncond, Tensor sample, OptionalTensor weight,
                                               Tensor history, Tensor latest, Tensor coefficients, Tensor keep,
                                               Tensor carry, double guidance_scale, OptionalTensor guidance_map,
                                               Tensor origins, Tensor cover_start, Tensor cover_index,
                                               Geometry geometry) {
  const Plan plan = make_plan(origins, cover_start, cover_index, geometry, sample.size(1));
  const StepCall call(cond, uncond, sample, weight, history, latest, coefficients, keep, carry, guidance_scale,
                      guidance_map);
  if (sample.numel() == 0) return call.results();
  with_element(sample, [&](auto element) {
    run(call.step<decltype(element)>(), plan, sample.size(0));
  });
  return call.results();
}

}  // namespace instantas
